"""Batches of rows of different length, stored without padding.

A row is a text, an image, or a text followed by an image. Texts differ in length, images do not. Packed, the text tokens of all
rows come first and the image tokens of all rows follow. Linear layers process packed tokens, attention processes padded rows.

n rows, L tokens of a text as given, W tokens of the longest text, P tokens of an image, N = W + P, T text tokens of all rows,
S = T + n P packed tokens, M selected tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RaggedBatch:
    """The number of tokens of each row, and from it where each token is, packed and padded.

    The host knows all sizes, so that nothing here waits for the device.

    Args:
        lengths: n numbers of text tokens, 0 without texts. None for texts that are not packed, see `of_texts`.
        patches: P, 0 without images.
        device: Of the tokens.
        least_width: Lower bound of W.
        padding_mask: (n, W) bool of the real tokens, only where ``lengths`` is None.
    """

    lengths: tuple[int, ...] | None
    patches: int
    device: torch.device
    least_width: int = 0
    padding_mask: Tensor | None = None

    @classmethod
    def of_texts(cls, mask: Tensor, patches: int = 0, pack: bool = True) -> RaggedBatch:
        """Describe n texts, and the image of each.

        A text without any token counts as one of its first: attention over nothing is NaN.

        Args:
            mask: (n, L) bool, padding on the right.
            patches: P.
            pack: On a GPU packing costs one host-device sync, for the lengths. False treats all L positions as tokens of
                the linear layers, and masks padding in attention only.
        """
        if not pack:
            mask = mask.clone()
            mask[:, 0] = True
            return cls(None, patches, mask.device, padding_mask=mask)
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths = (mask * positions).amax(1).clamp(min=1).tolist()
        return cls(tuple(lengths), patches, mask.device)

    @classmethod
    def of_images(cls, rows: int, patches: int, device: torch.device) -> RaggedBatch:
        """Describe n images of P tokens."""
        return cls((0,) * rows, patches, device)

    @cached_property
    def rows(self) -> int:
        """n."""
        return len(self.padding_mask if self.lengths is None else self.lengths)

    @cached_property
    def width(self) -> int:
        """W, 0 without texts."""
        return self.padding_mask.shape[1] if self.lengths is None else max(*self.lengths, self.least_width)

    @cached_property
    def text_tokens(self) -> int:
        """T."""
        return self.rows * self.width if self.lengths is None else sum(self.lengths)

    @cached_property
    def mask(self) -> Tensor | None:
        """(n, W) bool, True at real text tokens. None if all are."""
        if self.lengths is None:
            return self.padding_mask
        if min(self.lengths) == self.width:
            return None
        return (torch.arange(self.width) < torch.tensor(self.lengths)[:, None]).to(self.device)

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """(n, 1, 1, N) bool, True at real tokens. None if all are."""
        return None if self.mask is None else F.pad(self.mask, (0, self.patches), value=True)[:, None, None]

    @cached_property
    def index(self) -> Tensor | None:
        """(T,) int64 positions of the packed text tokens in the flattened (n * W). None if they are all, in order."""
        if self.lengths is None or min(self.lengths) == self.width:
            return None
        lengths = torch.tensor(self.lengths)
        row = torch.repeat_interleave(lengths)
        column = torch.arange(self.text_tokens) - (lengths.cumsum(0) - lengths)[row]
        return (row * self.width + column).to(self.device)

    @cached_property
    def starts(self) -> Tensor:
        """(n,) int64 positions of the first token of each row among the packed ones."""
        if self.index is None:
            return torch.arange(self.rows, device=self.device) * (self.width or self.patches)
        lengths = torch.tensor(self.lengths)
        return (lengths.cumsum(0) - lengths).to(self.device)

    @cached_property
    def owner(self) -> Tensor:
        """(S,) int64 row of each packed token, on the host."""
        text = torch.repeat_interleave(torch.tensor(self.lengths))
        return torch.cat([text, torch.arange(self.rows).repeat_interleave(self.patches)])

    def pad(self, packed: Tensor) -> Tensor:
        """Pad (S, C) packed tokens to (n, N, C) rows, zero at padding."""
        parts = []
        if self.width:
            parts.append(_pad(packed[: self.text_tokens], self.index, self.rows, self.width))  # (n, W, C)
        if self.patches:
            parts.append(packed[self.text_tokens :].unflatten(0, (self.rows, self.patches)))  # (n, P, C)
        return torch.cat(parts, 1) if len(parts) == 2 else parts[0]

    def pack(self, padded: Tensor) -> Tensor:
        """Pack (n, N, C) rows to (S, C) tokens."""
        if not self.width:
            return padded.flatten(0, 1)
        text = _pack(padded[:, : self.width], self.index)  # (T, C)
        return torch.cat([text, padded[:, self.width :].flatten(0, 1)]) if self.patches else text

    def tokens_of(self, texts: Tensor, pairs: RaggedBatch) -> Tensor:
        """Return where the tokens of pairs are among the packed tokens here.

        Args:
            texts: (n',) int64 row here of each pair.
            pairs: The n' pairs.

        Returns:
            (T',) int64 in the order of the packed tokens of ``pairs``.
        """
        flat = torch.arange(pairs.text_tokens, device=self.device) if pairs.index is None else pairs.index
        return self.starts[texts[flat // pairs.width]] + flat % pairs.width

    def select_rows(self, kept: Tensor) -> tuple[RaggedBatch, Tensor]:
        """Return a batch of some of the rows, as wide as all of them.

        Args:
            kept: (n,) bool on the host.

        Returns:
            The batch, and (S',) int64 positions of its tokens among the S.
        """
        lengths = tuple(length for length, keep in zip(self.lengths, kept.tolist()) if keep)
        positions = kept[self.owner].nonzero()[:, 0].to(self.device)
        return RaggedBatch(lengths, self.patches, self.device, self.width), positions

    def first_tokens(self) -> OutputPositions:
        """Select the first token of each row."""
        return OutputPositions(self.starts, None, self.rows, 1)

    def tokens_at(self, row: Tensor, column: Tensor) -> OutputPositions:
        """Select real tokens of the texts, or of the images in a batch without texts.

        Args:
            row: (M,) int64.
            column: (M,) int64 position in the row.
        """
        width = self.width or self.patches
        return OutputPositions(self.starts[row] + column, row * width + column, self.rows, width)


@dataclass(frozen=True)
class OutputPositions:
    """Selected tokens of a batch: the only ones whose outputs a last layer computes.

    Args:
        packed: (M,) int64 positions among the S packed tokens.
        slots: (M,) int64 positions in the flattened (n * ``width``) queries. None if they are all, in order.
        rows: n.
        width: Queries per row.
    """

    packed: Tensor
    slots: Tensor | None
    rows: int
    width: int

    @property
    def row(self) -> Tensor:
        """(M,) int64 row of each token."""
        slots = torch.arange(self.rows, device=self.packed.device) if self.slots is None else self.slots
        return slots // self.width

    def pad(self, selected: Tensor) -> Tensor:
        """Pad (M, C) selected tokens to (n, ``width``, C) queries, zero elsewhere."""
        return _pad(selected, self.slots, self.rows, self.width)

    def pack(self, padded: Tensor) -> Tensor:
        """Return the (M, C) selected tokens of (n, ``width``, C) queries."""
        return _pack(padded, self.slots)


def _pad(packed: Tensor, index: Tensor | None, rows: int, width: int) -> Tensor:
    if index is not None:
        packed = packed.new_zeros(rows * width, packed.shape[1]).index_copy(0, index, packed)
    return packed.unflatten(0, (rows, width))


def _pack(padded: Tensor, index: Tensor | None) -> Tensor:
    flat = padded.flatten(0, 1)
    return flat if index is None else flat[index]
