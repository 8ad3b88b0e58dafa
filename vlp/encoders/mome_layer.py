"""A layer of a transformer with modality experts: attention that all share, a feed-forward part for each (VLMo, fig. 2).

Tokens stand side by side without padding: those of the n texts, then those of the n images. So an expert's tokens are a slice,
and linear layers see real tokens only. Attention sees rows of one text and one image each.

n rows, W tokens of the longest text, P of an image, N = W + P, T tokens of all texts, S = T + n P, D width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Expert = Literal["image", "text", "vl"]


@dataclass(frozen=True)
class Rows:
    """How many tokens each row has, and so where they are among the S. All sizes are known to the host.

    Args:
        lengths: n numbers of text tokens; 0 = there are no texts.
        patches: P, class token included; 0 = there are no images.
        least_width: W is at least this.
    """

    lengths: tuple[int, ...]
    patches: int
    device: torch.device
    least_width: int = 0

    @classmethod
    def of_texts(cls, mask: Tensor, patches: int = 0) -> Rows:
        """Of (n, L) bool, padded on the right; a text without any token has one. A GPU's host waits for the lengths."""
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return cls(tuple((mask * places).amax(1).clamp(min=1).tolist()), patches, mask.device)

    @cached_property
    def width(self) -> int:
        return max(*self.lengths, self.least_width)

    @cached_property
    def text_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def padded(self) -> bool:
        return min(self.lengths) < self.width

    @cached_property
    def starts(self) -> Tensor:
        """(n,) int64 where the first token of each row is."""
        if not self.width:
            return torch.arange(0, len(self.lengths) * self.patches, self.patches, device=self.device)
        lengths = torch.tensor(self.lengths)
        return (lengths.cumsum(0) - lengths).to(self.device)

    @cached_property
    def real(self) -> Tensor:
        """(n, W) bool."""
        return (torch.arange(self.width) < torch.tensor(self.lengths)[:, None]).to(self.device)

    @cached_property
    def index(self) -> Tensor:
        """(T,) int64 of text tokens in the flattened (n * W)."""
        lengths = torch.tensor(self.lengths)
        ends = lengths.cumsum(0)
        row = torch.repeat_interleave(lengths)
        column = torch.arange(self.text_tokens) - (ends - lengths)[row]
        return (row * self.width + column).to(self.device)

    @cached_property
    def owner(self) -> Tensor:
        """(S,) int64 the row of each token, on the host."""
        text, image = (
            torch.repeat_interleave(torch.tensor(e)) for e in (self.lengths, [self.patches] * len(self.lengths))
        )
        return torch.cat([text, image])

    def take(self, kept: Tensor) -> tuple[Rows, Tensor]:
        """Some rows, by (n,) bool on the host, as wide as all are; and (S',) int64 where their tokens are among the S."""
        lengths = tuple(length for length, keep in zip(self.lengths, kept.tolist()) if keep)
        place = kept[self.owner].nonzero()[:, 0].to(self.device)
        return Rows(lengths, self.patches, self.device, self.width), place

    @cached_property
    def mask(self) -> Tensor | None:
        """(n, 1, 1, N) bool, True where there is a token; None = everywhere."""
        return F.pad(self.real, (0, self.patches), value=True)[:, None, None] if self.padded else None

    def pad(self, states: Tensor) -> Tensor:
        """(S, C) to (n, N, C), zero where there is no token."""
        n, parts = len(self.lengths), []
        if self.width:
            text = states[: self.text_tokens]
            if self.padded:
                text = text.new_zeros(n * self.width, text.shape[1]).index_copy(0, self.index, text)
            parts.append(text.unflatten(0, (n, self.width)))
        if self.patches:
            parts.append(states[self.text_tokens :].unflatten(0, (n, self.patches)))
        return torch.cat(parts, 1) if len(parts) == 2 else parts[0]

    def pack(self, rows: Tensor) -> Tensor:
        """(n, N, C) to (S, C)."""
        if not self.width:
            return rows.flatten(0, 1)
        text = rows[:, : self.width].flatten(0, 1)
        text = text[self.index] if self.padded else text
        return torch.cat([text, rows[:, self.width :].flatten(0, 1)]) if self.patches else text


@dataclass(frozen=True)
class Wanted:
    """The tokens whose outputs are wanted of a last layer, M of them, all of them of one expert.

    Args:
        place: (M,) int64 among the S.
        slot: (M,) int64 in the flattened (n * ``width``): where their queries stand in the rows.
        width: queries of a row, from the row's first token on.
        row: (M,) int64.
    """

    place: Tensor
    slot: Tensor
    width: int
    row: Tensor

    @classmethod
    def first(cls, rows: Rows) -> Wanted:
        row = torch.arange(len(rows.lengths), device=rows.device)
        return cls(rows.starts, row, 1, row)

    @classmethod
    def at(cls, rows: Rows, row: Tensor, column: Tensor) -> Wanted:
        """Tokens of texts, or of images where there are no texts, by (M,) row and column."""
        width = rows.width or rows.patches
        return cls(rows.starts[row] + column, row * width + column, width, row)


class SharedAttention(nn.Module):
    """Multi-head self-attention with biases of queries and values: a bias of the keys would change nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(
        self,
        states: Tensor,
        rows: Rows,
        bias: Tensor | None,
        gamma: Tensor | None = None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """(S, D) to (S, D), or to (M, D) of what is wanted.

        Args:
            bias: (h, N, N) added to the scores, which are float32 inside whatever the precision of the rest. On a GPU it is rounded to that
                of the queries first, since the fused forms there take no other.
            gamma: (D,) that the output is multiplied by.
        """
        if wanted is None:
            own = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            query, key, value = self._heads(rows.pad(F.linear(states, self.qkv.weight, own)), 3)
            return scaled(self.out, rows.pack(self._attend(query, key, value, rows, bias)), gamma)
        q_weight, kv_weight = self.qkv.weight.tensor_split([len(self.q_bias)])
        own = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        key, value = self._heads(rows.pad(F.linear(states, kv_weight, own)), 2)
        flat = F.linear(states[wanted.place], q_weight, self.q_bias)
        n = len(rows.lengths)
        if len(flat) != n * wanted.width or wanted.width > 1:
            flat = flat.new_zeros(n * wanted.width, flat.shape[1]).index_copy(0, wanted.slot, flat)
        (query,) = self._heads(flat.unflatten(0, (n, wanted.width)), 1)
        bias = None if bias is None else bias[:, : wanted.width]
        return scaled(self.out, self._attend(query, key, value, rows, bias).flatten(0, 1)[wanted.slot], gamma)

    def _heads(self, x: Tensor, count: int) -> Sequence[Tensor]:
        """(n, N, count * D) to ``count`` times (n, h, N, D / h)."""
        return x.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        mask = rows.mask
        if bias is not None:
            mask = bias[None] if mask is None else torch.where(mask, bias, -torch.inf)
            mask = mask.to(query.dtype) if query.is_cuda else mask
        with torch.autocast(query.device.type, enabled=False):  # which would round it, too
            return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """An expert: its own norm, and two linear layers."""

    def __init__(self, width: int, hidden_size: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.expand, self.contract = nn.Linear(width, hidden_size), nn.Linear(hidden_size, width)

    def forward(self, states: Tensor, gamma: Tensor | None) -> Tensor:
        return scaled(self.contract, F.gelu(self.expand(self.norm(states))), gamma)


def scaled(linear: nn.Linear, x: Tensor, gamma: Tensor | None) -> Tensor:
    """``gamma * linear(x)``, by way of the weights: then nobody needs what the layer gave out."""
    if gamma is None:
        return linear(x)
    return F.linear(x, gamma[:, None] * linear.weight, gamma * linear.bias)


class MomeLayer(nn.Module):
    """``x + g1 attention(norm(x))``, then ``x + g2 expert(x)``; ``g1`` and ``g2`` are the same for all experts.

    Args:
        experts: which there are.
        layer_scale: initial value of g1 and g2; None = there are none.
        drop_path: rate at which a row skips a branch.
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
        self, states: Tensor, rows: Rows, bias: Tensor | None, joint: bool, wanted: Wanted | None = None
    ) -> Tensor:
        """(S, D) to (S, D), or to (M, D) of what is wanted.

        Args:
            joint: all tokens go to the vision-language expert; else each to its own modality's.
        """
        if wanted is None:
            states = self._add(states, rows, lambda x, some: self.attention(self.norm(x), some, bias, self.gamma_1))
            return self._add(states, rows, lambda x, some: self._experts(x, some, joint))
        attended = self.attention(self.norm(states), rows, bias, self.gamma_1, wanted)
        states = states[wanted.place] + self._share(rows, wanted, attended)
        return states + self._share(rows, wanted, self._experts(states, rows, joint))

    def _experts(self, states: Tensor, rows: Rows, joint: bool) -> Tensor:
        if joint:
            return self.experts["vl"](states, self.gamma_2)
        if not (rows.width and rows.patches):
            return self.experts["text" if rows.width else "image"](states, self.gamma_2)
        text, image = states.tensor_split([rows.text_tokens])
        return torch.cat([self.experts["text"](text, self.gamma_2), self.experts["image"](image, self.gamma_2)])

    def _add(self, states: Tensor, rows: Rows, branch: Callable[[Tensor, Rows], Tensor]) -> Tensor:
        """``states + branch``, computed for the rows alone that do not skip it."""
        kept, share = self._draw(rows)
        if kept.all():
            return states + share * branch(states, rows) if share != 1 else states + branch(states, rows)
        some, place = rows.take(kept)
        return states.index_add(0, place, branch(states[place], some).to(states.dtype), alpha=share)

    def _share(self, rows: Rows, wanted: Wanted, branch: Tensor) -> Tensor:
        """(M, D) of a branch, 0 where the row skips it."""
        kept, share = self._draw(rows)
        if kept.all() and share == 1:
            return branch
        return (share * kept.to(branch.dtype)).to(branch.device)[wanted.row, None] * branch

    def _draw(self, rows: Rows) -> tuple[Tensor, float]:
        """(n,) bool on the host, which rows take a branch, and what makes up for the others.

        One row is computed in any case, if only for nothing: every process has a gradient for every parameter.
        """
        rate = self.drop_path if self.training else 0.0
        if not rate:
            return torch.ones(len(rows.lengths), dtype=torch.bool), 1.0
        kept = torch.rand(len(rows.lengths)) >= rate
        if not kept.any():
            return torch.arange(len(kept)) == 0, 0.0
        return kept, 1 / (1 - rate)
