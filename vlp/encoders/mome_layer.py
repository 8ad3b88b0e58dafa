"""A layer of a transformer with modality experts: shared attention, and a feed-forward expert per modality (VLMo, fig. 2).

All text tokens of a batch come first, then all image tokens, without padding (`vlp.encoders.ragged`). So the tokens of an expert
are a slice, and linear layers process real tokens only. Attention processes padded rows of one text and one image each.

n rows, W tokens of the longest text, P tokens of an image, N = W + P, T text tokens of all rows, S = T + n P, M selected tokens,
D width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.ragged import OutputPositions, RaggedBatch, upload
from vlp.types import computing_on_host

Expert = Literal["image", "text", "vl"]


class SharedAttention(nn.Module):
    """Multi-head self-attention with biases of queries and values. A bias of the keys would have no effect.

    Args:
        width: D.
        heads: h.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(
        self,
        states: Tensor,
        batch: RaggedBatch,
        bias: Tensor | None,
        gamma: Tensor | None = None,
        outputs: OutputPositions | None = None,
    ) -> Tensor:
        """Attend within each row.

        Args:
            states: (S, D).
            batch: Where the S tokens are.
            bias: (h, N, N) added to the scores, or None. The scores are float32 in any precision. On a GPU the bias is rounded
                to the precision of the queries, since fused attention supports no other.
            gamma: (D,) factor of the output, or None.
            outputs: The tokens to compute outputs of. None computes all.

        Returns:
            (S, D), or (M, D) of ``outputs``.
        """
        if outputs is None:
            own = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            query, key, value = self._heads(batch.pad(F.linear(states, self.qkv.weight, own)), 3)
            return scaled(self.out, batch.pack(self._attend(query, key, value, batch, bias)), gamma)
        q_weight, kv_weight = self.qkv.weight.tensor_split([len(self.q_bias)])
        own = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        key, value = self._heads(batch.pad(F.linear(states, kv_weight, own)), 2)
        selected = F.linear(states[outputs.packed], q_weight, self.q_bias)  # (M, D)
        (query,) = self._heads(outputs.pad(selected), 1)  # (n, h, outputs.width, D / h)
        bias = None if bias is None else bias[:, : outputs.width]
        return scaled(self.out, outputs.pack(self._attend(query, key, value, batch, bias)), gamma)

    def _heads(self, x: Tensor, count: int) -> Sequence[Tensor]:
        """Split (n, N, count * D) into ``count`` tensors (n, h, N, D / h)."""
        return x.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, bias: Tensor | None) -> Tensor:
        mask = batch.attention_mask  # (n, 1, 1, N)
        if bias is not None:
            mask = bias[None] if mask is None else torch.where(mask, bias, -torch.inf)  # (n, h, N, N)
            mask = mask.to(query.dtype) if query.is_cuda else mask
        with torch.autocast(query.device.type, enabled=False):  # which would round the bias, too
            return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)  # (n, N, D)


class FeedForward(nn.Module):
    """A feed-forward expert: its own norm and two linear layers.

    Args:
        width: D.
        hidden_size: Width between the linear layers.
        eps: Of the norm.
    """

    def __init__(self, width: int, hidden_size: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.expand, self.contract = nn.Linear(width, hidden_size), nn.Linear(hidden_size, width)

    def forward(self, states: Tensor, gamma: Tensor | None) -> Tensor:
        return scaled(self.contract, F.gelu(self.expand(self.norm(states))), gamma)


def scaled(linear: nn.Linear, x: Tensor, gamma: Tensor | None) -> Tensor:
    """Return ``gamma * linear(x)``. Scaling the weights instead of the output saves storing the output for the backward."""
    if gamma is None:
        return linear(x)
    return F.linear(x, gamma[:, None] * linear.weight, gamma * linear.bias)


class MomeLayer(nn.Module):
    """``x + g1 attention(norm(x))``, then ``x + g2 expert(x)``, with the same ``g1`` and ``g2`` for all experts.

    Args:
        width: D.
        heads: h.
        hidden_size: Of the experts.
        eps: Of the norms.
        experts: The experts of this layer.
        layer_scale: Initial value of g1 and g2 (LayerScale). None leaves them out.
        drop_path: Rate at which a row skips a residual branch (stochastic depth).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden_size: int,
        eps: float,
        experts: Sequence[Expert],
        layer_scale: float | None,
        drop_path: float,
    ):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width, eps=eps), SharedAttention(width, heads)
        self.experts = nn.ModuleDict({name: FeedForward(width, hidden_size, eps) for name in experts})
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))
        self.drop_path = drop_path

    def forward(
        self,
        states: Tensor,
        batch: RaggedBatch,
        bias: Tensor | None,
        joint: bool,
        outputs: OutputPositions | None = None,
    ) -> Tensor:
        """Apply attention and experts.

        Args:
            states: (S, D).
            batch: Where the S tokens are.
            bias: (h, N, N) relative position biases, or None.
            joint: All tokens go to the vision-language expert. Otherwise each goes to the expert of its modality.
            outputs: The tokens to compute outputs of, all of one expert. None computes all.

        Returns:
            (S, D), or (M, D) of ``outputs``.
        """
        if outputs is None:
            states = self._add(states, batch, lambda x, rows: self.attention(self.norm(x), rows, bias, self.gamma_1))
            return self._add(states, batch, lambda x, rows: self._experts(x, rows, joint))
        attended = self.attention(self.norm(states), batch, bias, self.gamma_1, outputs)
        states = states[outputs.packed] + self._drop_rows(batch, outputs, attended)  # (M, D)
        return states + self._drop_rows(batch, outputs, self._experts(states, batch, joint))

    def _experts(self, states: Tensor, batch: RaggedBatch, joint: bool) -> Tensor:
        if joint:
            return self.experts["vl"](states, self.gamma_2)
        if not (batch.width and batch.patches):
            return self.experts["text" if batch.width else "image"](states, self.gamma_2)
        text, image = states.tensor_split([batch.text_tokens])
        return torch.cat([self.experts["text"](text, self.gamma_2), self.experts["image"](image, self.gamma_2)])

    def _add(self, states: Tensor, batch: RaggedBatch, branch: Callable[[Tensor, RaggedBatch], Tensor]) -> Tensor:
        """Add a residual branch, computed only for the rows that do not skip it."""
        kept, factor = self._draw_kept_rows(batch)
        if kept.all():
            return states + factor * branch(states, batch) if factor != 1 else states + branch(states, batch)
        rows, positions = batch.select_rows(kept)
        return states.index_add(0, positions, branch(states[positions], rows).to(states.dtype), alpha=factor)

    def _drop_rows(self, batch: RaggedBatch, outputs: OutputPositions, branch: Tensor) -> Tensor:
        """Set the (M, D) outputs of a branch to 0 in the rows that skip it."""
        kept, factor = self._draw_kept_rows(batch)
        if kept.all() and factor == 1:
            return branch
        factors = upload(factor * kept, branch.device).to(branch.dtype)  # (n,)
        return factors[outputs.row, None] * branch

    @computing_on_host()
    def _draw_kept_rows(self, batch: RaggedBatch) -> tuple[np.ndarray, float]:
        """Draw (n,) bool on the host, the rows that take a branch, and the factor that makes up for the others.

        If all rows skip the branch, one is computed with factor 0: every process needs a gradient for every parameter.
        """
        rate = self.drop_path if self.training else 0.0
        if not rate:
            return np.ones(batch.rows, dtype=bool), 1.0
        kept = torch.rand(batch.rows).numpy() >= rate
        if not kept.any():
            return np.arange(len(kept)) == 0, 0.0
        return kept, 1 / (1 - rate)
