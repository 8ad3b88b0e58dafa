"""One layer of fusion: BERT's, with cross-attention between its two parts, on packed texts.

B images, n pairs, P image tokens, W of the longest text, D width, h heads, T real tokens of all texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.ragged import Layout

Attend = Callable[..., Tensor]  # of (query, key, value), and of a mask where there is one


class Attention(nn.Module):
    """Multi-head attention; the caller projects, since keys are projected once and queries often.

    Args:
        width: D of the queries and of the output.
        source: width of what keys and values are made from; None = they are made elsewhere.
    """

    def __init__(self, width: int, source: int | None, heads: int, dropout: float):
        super().__init__()
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        if source is not None:
            self.key, self.value = nn.Linear(source, width), nn.Linear(source, width)
        self.heads, self.dropout = heads, dropout

    def split(self, x: Tensor) -> Tensor:
        """(n, W, D) to (n, heads, W, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)


class FusionLayer(nn.Module):
    """BERT's layer with cross-attention: self-attention, cross-attention, feed-forward, each with its norm behind it.

    Args:
        image_width: None = its twin makes the keys and values of images for it.
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

    def read_text(
        self, states: Tensor, layout: Layout, out: Layout | None = None, pick: Tensor | None = None
    ) -> Tensor:
        """Self-attention of (T, D) states; with ``pick`` of these alone, which stand as ``out`` says."""
        attention, wanted, out = self.self_attention, states if pick is None else states[pick], out or layout
        query = attention.split(out.pad(attention.query(wanted)))
        key, value = (attention.split(layout.pad(part(states))) for part in (attention.key, attention.value))
        mask = None if layout.mask is None else layout.mask[:, None, None]
        attended = out.pack(merge_heads(attention.attend(query, key, value, mask)))
        return self.self_norm(wanted + self.dropout(attention.out(attended)))

    def read_image(
        self,
        states: Tensor,
        layout: Layout,
        keys: Tensor,
        values: Tensor | None,
        images: Tensor | None = None,
        attend: Attend | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Cross-attention of (T, D) states to (B, P, D) keys and values, and the feed-forward part behind it.

        Args:
            values: None = ``keys`` are the image tokens, (B, P, image width), see `_absorb`.
            images: see `FusionEncoder.forward`.
            attend: in the place of fused attention.
            mask: (B, P) bool, which tokens are real; None = all. Not with image tokens.
        """
        attention = self.cross_attention
        query, attend = attention.query(states), attend or attention.attend
        if values is None:
            attended = self._absorb(query, layout, keys, images, attend)
        elif len(keys) == 1 and images is None:  # one image for all: neither padding nor order matters
            given = map(attention.split, (query[None], keys, values))
            attended = merge_heads(attend(*given, *(() if mask is None else (mask[:, None, None],))))[0]
        else:
            padded = attention.split(layout.pad(query))
            attended = _in_place(padded, attention.split(keys), attention.split(values), images, attend, mask)
            attended = layout.pack(merge_heads(attended))
        states = self.cross_norm(states + self.dropout(attention.out(attended)))
        return self.norm(states + self.dropout(self.contract(F.gelu(self.expand(states)))))

    def _absorb(self, query: Tensor, layout: Layout, tokens: Tensor, images: Tensor | None, attend: Attend) -> Tensor:
        """(T, D) attention to image tokens that nobody projected: q . (K x + b) = (K^T q) . x + q . b.

        The work is then with the texts and not with the images, at ``image width`` multiplications for each pair of
        tokens and head instead of D / heads. q . b is the same for all x, the softmax does not see it.
        """
        attention, width = self.cross_attention, tokens.shape[-1]
        heads = attention.heads
        key, value = (part.weight.unflatten(0, (heads, -1)) for part in (attention.key, attention.value))
        query = torch.einsum("thd,hdc->thc", query.unflatten(-1, (heads, -1)), key)
        query = layout.pad(query.flatten(1)) * math.sqrt(width / key.shape[1])  # attention divides by sqrt(width)
        one_head = query.unflatten(-1, (heads, -1)).flatten(1, 2)[:, None]  # (n, 1, W * heads, image width)
        attended = _in_place(one_head, tokens[:, None], tokens[:, None], images, attend)
        attended = layout.pack(attended[:, 0].unflatten(1, (-1, heads)).flatten(2)).unflatten(-1, (heads, -1))
        return torch.einsum("thc,hdc->thd", attended, value).flatten(1) + attention.value.bias


def _in_place(
    query: Tensor, keys: Tensor, values: Tensor, images: Tensor | None, attend: Attend, mask: Tensor | None = None
) -> Tensor:
    """(n, h, W, d) queries, (B, h, P, d) keys and values and their (B, P) mask, to (n, h, W, d).

    Texts of one image stand side by side, so that keys and values are copied for what ``images`` names alone.
    """
    aligned, parts = len(query) - (0 if images is None else len(images)), []
    given = (keys, values) if mask is None else (keys, values, mask[:, None, None])
    if aligned % len(keys):
        raise ValueError(f"{aligned} texts in the order of {len(keys)} images: give whole rounds of them")
    if aligned:
        rounds = query[:aligned].unflatten(0, (-1, len(keys)))  # (n / B, B, h, W, d)
        side_by_side = rounds.permute(1, 2, 0, 3, 4).flatten(2, 3)
        attended = attend(side_by_side, *given).unflatten(2, (len(rounds), -1))
        parts.append(attended.permute(2, 0, 1, 3, 4).flatten(0, 1))
    if aligned < len(query):
        parts.append(attend(query[aligned:], *(x[images] for x in given)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def merge_heads(x: Tensor) -> Tensor:
    """(n, h, W, d) to (n, W, h * d)."""
    return x.transpose(1, 2).flatten(2)
