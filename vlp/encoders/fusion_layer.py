"""A fusion layer: a BERT layer with cross-attention between self-attention and feed-forward, on packed texts.

B images, n pairs, P image tokens, W tokens of the longest text, D width, h heads, d = D / h, T text tokens of all pairs, M
selected tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.ragged import OutputPositions, RaggedBatch

Attend = Callable[..., Tensor]
"""Attention of (query, key, value), and of a mask where there is one."""


class Attention(nn.Module):
    """Multi-head attention. The caller applies the projections, since keys are projected once and queries often.

    Args:
        width: D of the queries and of the output.
        source: Width of the tokens that keys and values are projected from. None if another layer projects them.
        heads: h.
        dropout: Rate on the attention probabilities.
    """

    def __init__(self, width: int, source: int | None, heads: int, dropout: float):
        super().__init__()
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        if source is not None:
            self.key, self.value = nn.Linear(source, width), nn.Linear(source, width)
        self.heads, self.dropout = heads, dropout

    def split(self, x: Tensor) -> Tensor:
        """Split (n, W, D) into heads, (n, h, W, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)


class FusionLayer(nn.Module):
    """BERT's layer with cross-attention: self-attention, cross-attention and feed-forward, each followed by its norm.

    Args:
        width: D.
        image_width: Width of the image tokens. None if the twin of this layer projects them.
        heads: h.
        hidden_size: Of the feed-forward part.
        dropout: Rate, for hidden states and attention alike.
        eps: Of the norms.
    """

    def __init__(self, width: int, image_width: int | None, heads: int, hidden_size: int, dropout: float, eps: float):
        super().__init__()
        self.self_attention = Attention(width, width, heads, dropout)
        self.self_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = Attention(width, image_width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.expand, self.contract = nn.Linear(width, hidden_size), nn.Linear(hidden_size, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def read_text(self, states: Tensor, batch: RaggedBatch, outputs: OutputPositions | None = None) -> Tensor:
        """Self-attention with its residual branch and norm.

        Args:
            states: (T, D).
            batch: Where the T tokens are.
            outputs: The tokens to compute outputs of. None computes all.

        Returns:
            (T, D), or (M, D) of ``outputs``.
        """
        attention, rows = self.self_attention, outputs or batch
        residual = states if outputs is None else states[outputs.packed]  # (M, D)
        query = attention.split(rows.pad(attention.query(residual)))  # (n, h, W, d)
        key, value = (attention.split(batch.pad(part(states))) for part in (attention.key, attention.value))
        attended = rows.pack(merge_heads(attention.attend(query, key, value, batch.attention_mask)))  # (M, D)
        return self.self_norm(residual + self.dropout(attention.out(attended)))

    def read_image(
        self,
        states: Tensor,
        rows: RaggedBatch | OutputPositions,
        keys: Tensor,
        values: Tensor | None,
        images: Tensor | None = None,
        attend: Attend | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Cross-attention and feed-forward, with their residual branches and norms.

        Args:
            states: (T, D).
            rows: Where the T tokens are.
            keys: (B, P, D), or (B, P, image width) image tokens that were not projected, see `_attend_to_tokens`.
            values: (B, P, D), None with image tokens.
            images: See `vlp.encoders.fusion.FusionEncoder.forward`.
            attend: Replaces fused attention.
            mask: (B, P) bool of the real tokens. None if all are. Not supported with image tokens.

        Returns:
            (T, D).
        """
        attention = self.cross_attention
        query, attend = attention.query(states), attend or attention.attend
        if values is None:
            attended = self._attend_to_tokens(query, rows, keys, images, attend)
        elif len(keys) == 1 and images is None:  # one image for all texts: they need neither padding nor grouping
            inputs = map(attention.split, (query[None], keys, values))
            attended = merge_heads(attend(*inputs, *(() if mask is None else (mask[:, None, None],))))[0]  # (T, D)
        else:
            padded = attention.split(rows.pad(query))  # (n, h, W, d)
            attended = _attend_by_image(padded, attention.split(keys), attention.split(values), images, attend, mask)
            attended = rows.pack(merge_heads(attended))  # (T, D)
        states = self.cross_norm(states + self.dropout(attention.out(attended)))
        return self.norm(states + self.dropout(self.contract(F.gelu(self.expand(states)))))

    def _attend_to_tokens(
        self, query: Tensor, rows: RaggedBatch | OutputPositions, tokens: Tensor, images: Tensor | None, attend: Attend
    ) -> Tensor:
        """Attend to image tokens that were not projected, by q . (K x + b) = (K^T q) . x + q . b.

        The projection is applied to the queries instead of the image tokens. It takes ``image width`` multiplications per
        pair of tokens and head instead of d. q . b is the same for all x, so the softmax does not depend on it.
        """
        attention, width = self.cross_attention, tokens.shape[-1]
        heads = attention.heads
        key, value = (
            part.weight.unflatten(0, (heads, -1)) for part in (attention.key, attention.value)
        )  # (h, d, width)
        query = torch.einsum("thd,hdc->thc", query.unflatten(-1, (heads, -1)), key)  # (T, h, image width)
        query = rows.pad(query.flatten(1)) * math.sqrt(width / key.shape[1])  # attention divides by sqrt(width)
        one_head = query.unflatten(-1, (heads, -1)).flatten(1, 2)[:, None]  # (n, 1, W * h, image width)
        attended = _attend_by_image(one_head, tokens[:, None], tokens[:, None], images, attend)
        attended = rows.pack(attended[:, 0].unflatten(1, (-1, heads)).flatten(2)).unflatten(-1, (heads, -1))
        return torch.einsum("thc,hdc->thd", attended, value).flatten(1) + attention.value.bias  # (T, D)


def _attend_by_image(
    query: Tensor, keys: Tensor, values: Tensor, images: Tensor | None, attend: Attend, mask: Tensor | None = None
) -> Tensor:
    """Attend to the image of each text, with the texts of one image side by side in one row.

    So keys and values are read in place. They are copied only for the images that ``images`` names.

    Args:
        query: (n, h, W, d).
        keys: (B, h, P, d).
        values: (B, h, P, d).
        images: See `vlp.encoders.fusion.FusionEncoder.forward`.
        attend: Attention.
        mask: (B, P) bool, or None.

    Returns:
        (n, h, W, d).
    """
    in_order, parts = len(query) - (0 if images is None else len(images)), []
    source = (keys, values) if mask is None else (keys, values, mask[:, None, None])
    if in_order % len(keys):
        raise ValueError(f"{in_order} texts in the order of {len(keys)} images: give whole rounds of them")
    if in_order:
        rounds = query[:in_order].unflatten(0, (-1, len(keys)))  # (n / B, B, h, W, d)
        side_by_side = rounds.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, h, n / B * W, d)
        attended = attend(side_by_side, *source).unflatten(2, (len(rounds), -1))  # (B, h, n / B, W, d)
        parts.append(attended.permute(2, 0, 1, 3, 4).flatten(0, 1))
    if in_order < len(query):
        parts.append(attend(query[in_order:], *(x[images] for x in source)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def merge_heads(x: Tensor) -> Tensor:
    """Merge (n, h, W, d) heads to (n, W, D)."""
    return x.transpose(1, 2).flatten(2)
