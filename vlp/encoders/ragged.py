"""Padded texts without their padding: real tokens side by side for linear layers, and back to rows for attention.

n rows, A texts, L tokens, W <= L of the longest row, D width, T real tokens of all rows, M tokens of interest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where packed tokens stand in padded texts.

    Args:
        rows: n.
        width: W.
        mask: (n, W) bool, True where there is a token; None = everywhere.
        index: (T,) int64 of the packed tokens in the flattened (n * W); None = all, in order.
    """

    rows: int
    width: int
    mask: Tensor | None = None
    index: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, packed: bool) -> Layout:
        """Of (n, L) bool; ``packed`` costs a GPU one synchronisation."""
        mask = mask.clone()
        mask[:, 0] = True  # attention over nothing is NaN, so a text without any token has one
        if not packed:
            return cls(*mask.shape, mask)
        longest = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax()
        count, width = torch.stack([mask.sum(), longest]).tolist()
        mask = mask[:, :width]
        if count == mask.numel():
            return cls(*mask.shape)
        return cls(*mask.shape, mask, mask.flatten().byte().argsort(descending=True, stable=True)[:count])

    def pad(self, states: Tensor) -> Tensor:
        """(T, D) to (n, W, D), zero elsewhere."""
        if self.index is not None:
            states = states.new_zeros(self.rows * self.width, states.shape[1]).index_copy(0, self.index, states)
        return states.unflatten(0, (self.rows, self.width))

    def pack(self, padded: Tensor) -> Tensor:
        """(n, W, D) to (T, D)."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def packed(self, flat: Tensor) -> Tensor:
        """Positions in the flattened (n * W), of real tokens, to those among the T."""
        if self.index is None:
            return flat
        place = self.index.new_zeros(self.rows * self.width)
        place[self.index] = torch.arange(len(self.index), device=flat.device)
        return place[flat]

    def source(self, texts: Tensor, width: int) -> Tensor:
        """(T,) where the packed tokens stand in the flattened (A * ``width``) texts of which row i here is ``texts[i]``."""
        flat = torch.arange(self.rows * self.width, device=texts.device) if self.index is None else self.index
        return texts[flat // self.width] * width + flat % self.width

    def part(self, at: Tensor | Literal["first"], length: int, device: torch.device) -> tuple[Layout, Tensor]:
        """The layout of some tokens alone, and where they are among the T.

        Args:
            at: "first" of each text, or (M,) int64 in the flattened (n * ``length``).
        """
        if isinstance(at, str):
            return Layout(self.rows, 1), self.packed(self.width * torch.arange(self.rows, device=device))
        flat = at // length * self.width + at % length
        return Layout(self.rows, self.width, index=flat), self.packed(flat)
