"""Batches of rows of different length, stored without padding.

A row is a text, an image, or a text followed by an image. Texts differ in length, images do not. Packed, the text tokens of all
rows come first and the image tokens of all rows follow. Linear layers process packed tokens, attention processes padded rows.

n rows, L tokens of a text as given, W tokens of the longest text, P tokens of an image, N = W + P, T text tokens of all rows,
S = T + n P packed tokens, M selected tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.types import on_host


def text_lengths(mask: Tensor) -> np.ndarray:
    """Return the (n,) positions after the last real token of texts with an (n, L) mask, 0 for a text without any.

    Free for the masks of a batch, see `vlp.types.on_host`.
    """
    host = on_host(mask)
    return (host * np.arange(1, host.shape[1] + 1)).max(1, initial=0)


def bound_lengths(texts: Tensor, bounds: np.ndarray) -> Tensor:
    """Attach upper bounds of lengths to texts that the device has chosen, so that nothing waits for their lengths.

    Args:
        texts: (n, L) mask of the texts, or (n,) positions of texts in another batch.
        bounds: (n,) upper bounds of the lengths.
    """
    texts.length_bounds = bounds  # type: ignore[attr-defined]
    return texts


def length_bounds(texts: Tensor) -> np.ndarray | None:
    """Return what `bound_lengths` attached, or None."""
    return vars(texts).get("length_bounds")


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device. The host does not wait for the copy."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@dataclass(frozen=True)
class RaggedBatch:
    """The number of tokens of each row, and from it where each token is, packed and padded.

    The host knows all sizes, so that nothing here waits for the device.

    Args:
        lengths: n numbers of text tokens, 0 without texts.
        patches: P, 0 without images.
        device: Of the tokens.
        least_width: Lower bound of W.
        padding_mask: (n, W) bool of the real tokens, where ``lengths`` are upper bounds: padding up to them counts as tokens
            of the linear layers, and only attention masks it. None if all tokens are real.
    """

    lengths: tuple[int, ...]
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
            pack: False treats all L positions as tokens of the linear layers, and masks padding in attention only.
        """
        bounds = length_bounds(mask)
        if not pack:
            bounds = np.full(len(mask), mask.shape[1])
        if bounds is None:
            return cls(tuple(text_lengths(mask).clip(1).tolist()), patches, mask.device)
        mask = mask[:, : bounds.max()].clone()
        mask[:, 0] = True
        return cls(tuple(bounds.tolist()), patches, mask.device, padding_mask=mask)

    @classmethod
    def of_pairs(cls, mask: Tensor, texts: Tensor, patches: int = 0, pack: bool = True) -> RaggedBatch:
        """Describe pairs, like `of_texts`, by the (n,) int64 text of each pair among those of an (A, L) mask."""
        chosen = mask[texts]
        bounds = length_bounds(texts)
        return cls.of_texts(chosen if bounds is None else bound_lengths(chosen, bounds), patches, pack)

    @classmethod
    def of_images(cls, rows: int, patches: int, device: torch.device) -> RaggedBatch:
        """Describe n images of P tokens."""
        return cls((0,) * rows, patches, device)

    @cached_property
    def rows(self) -> int:
        """n."""
        return len(self.lengths)

    @cached_property
    def width(self) -> int:
        """W, 0 without texts."""
        return max(*self.lengths, self.least_width)

    @cached_property
    def text_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def mask(self) -> Tensor | None:
        """(n, W) bool, True at real text tokens. None if all are."""
        if self.padding_mask is not None:
            return self.padding_mask
        if min(self.lengths) == self.width:
            return None
        return upload(np.arange(self.width) < np.array(self.lengths)[:, None], self.device)

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """(n, 1, 1, N) bool, True at real tokens. None if all are."""
        return None if self.mask is None else F.pad(self.mask, (0, self.patches), value=True)[:, None, None]

    @cached_property
    def index(self) -> Tensor | None:
        """(T,) int64 positions of the packed text tokens in the flattened (n * W). None if they are all, in order."""
        if min(self.lengths) == self.width:
            return None
        return upload(np.flatnonzero(np.arange(self.width) < np.array(self.lengths)[:, None]), self.device)

    @cached_property
    def starts(self) -> Tensor:
        """(n,) int64 positions of the first token of each row among the packed ones."""
        if self.index is None:
            return torch.arange(self.rows, device=self.device) * (self.width or self.patches)
        return upload(np.cumsum(self.lengths) - self.lengths, self.device)

    @cached_property
    def owner(self) -> np.ndarray:
        """(S,) row of each packed token, on the host."""
        rows = np.arange(self.rows)
        return np.concatenate([rows.repeat(self.lengths), rows.repeat(self.patches)])

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
        text, column = texts[flat // pairs.width], flat % pairs.width
        if (
            pairs.padding_mask is not None
        ):  # padding of a pair may be beyond the text here; its last token stands for it
            column = column.minimum(upload(np.array(self.lengths), self.device)[text] - 1)
        return self.starts[text] + column

    def select_rows(self, kept: np.ndarray) -> tuple[RaggedBatch, Tensor]:
        """Return a batch of some of the rows, as wide as all of them.

        Args:
            kept: (n,) bool on the host.

        Returns:
            The batch, and (S',) int64 positions of its tokens among the S.
        """
        mask, lengths = self.padding_mask, tuple(np.array(self.lengths)[kept].tolist())
        if mask is not None:
            mask = mask[upload(np.flatnonzero(kept), self.device)]
        positions = upload(np.flatnonzero(kept[self.owner]), self.device)
        return RaggedBatch(lengths, self.patches, self.device, self.width, mask), positions

    def real_tokens(self, lengths: np.ndarray) -> Tensor:
        """Return the (M,) int64 packed positions of the first tokens of each text, as many as ``lengths`` (n,) says."""
        starts = np.cumsum(self.lengths) - self.lengths
        offsets = np.arange(lengths.sum()) - (np.cumsum(lengths) - lengths).repeat(lengths)
        return upload(starts.repeat(lengths) + offsets, self.device)

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
