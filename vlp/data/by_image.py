"""Annotations to evaluate: every line once, those of the same picture together, so that it is read and encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from vlp.data.annotated import AnnotatedReader
from vlp.data.image import decode
from vlp.data.shards import RawSample
from vlp.errors import BadSample, UserError


@dataclass
class Pictured:
    """A picture, or a pair of them, with all that is said of it.

    Args:
        images: (3, H, W) uint8 each.
        lines: without their pictures, in the order of the file.
    """

    images: list[Tensor]
    lines: list[RawSample]


class ByPicture(Dataset):
    """Numbers of pictures -> what is `Pictured`, and complaints of lines that had to be left out; for `evaluation_batches`.

    Answers may be missing or unknown, see `AnnotatedReader.annotation`. Pictures are in the order of their first line.

    Args:
        transform: of an evaluated picture.
        preprocess: of the image tower.
    """

    def __init__(self, reader: AnnotatedReader, transform, preprocess, max_pixels: int):
        self.reader, self.transform, self.preprocess, self.max_pixels = reader, transform, preprocess, max_pixels
        groups: dict[tuple, list[int]] = {}
        for row in range(len(reader)):
            try:
                groups.setdefault(reader.names(row), []).append(row)
            except BadSample:  # said of it when it is its turn
                groups[(row,)] = [row]
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[list[Pictured], list[dict]] | UserError:
        found, bad = [], []
        try:
            for rows in (self.groups[number] for number in numbers):
                lines, complaints = self._lines(rows)
                try:
                    if lines:
                        found.append(Pictured(self._pixels(rows[0]), lines))
                except BadSample as e:
                    complaints = [self.reader.complaint(0, row, str(e)) for row in rows]
                bad += complaints
        except UserError as e:  # returned, as in `TrainDataset`
            return e
        return found, bad

    def _lines(self, rows: list[int]) -> tuple[list[RawSample], list[dict]]:
        lines, bad = [], []
        for row in rows:
            try:
                lines.append(self.reader.annotation(row))
            except BadSample as e:
                bad.append(self.reader.complaint(0, row, str(e)))
        return lines, bad

    def _pixels(self, row: int) -> list[Tensor]:
        size, interpolation = self.preprocess.size, self.preprocess.interpolation
        decoded = [decode(image, self.max_pixels) for image in self.reader.images(row)]
        return [self.transform(pixels, size, interpolation) for pixels in decoded]
