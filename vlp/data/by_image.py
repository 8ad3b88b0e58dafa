"""Annotations for evaluation, grouped by image: every line once, and every image read and encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Dataset

from vlp.data.image import decode
from vlp.data.other_images import exchange
from vlp.data.reading.annotated import AnnotatedReader
from vlp.data.reading.shards import RawSample, content_id
from vlp.errors import BadSample, UserError


@dataclass
class AnnotatedImage:
    """An image, or a pair of images, with all its annotations.

    Args:
        images: (3, H, W) uint8 each, or tuples that begin with it, as the transform returns them.
        lines: The annotations without their encoded images, in the order of the file.
    """

    images: list[Any]
    lines: list[RawSample]


class AnnotatedImageDataset(Dataset):
    """Indices of images to `AnnotatedImage` objects and quarantine entries of unusable lines, for `evaluation_batches`.

    Images are in the order of their first line. Answers may be missing or unknown, see `AnnotatedReader.annotation`.

    Args:
        transform: Transform of an evaluated image. It returns (3, H, W) uint8, or a tuple that begins with it.
        preprocess: Format of the image tower.
    """

    def __init__(self, reader: AnnotatedReader, transform, preprocess, max_pixels: int):
        self.reader, self.transform, self.preprocess, self.max_pixels = reader, transform, preprocess, max_pixels
        groups: dict[tuple, list[int]] = {}
        for row in range(len(reader)):
            try:
                groups.setdefault(reader.names(row), []).append(row)
            except BadSample:  # a group of its own: __getitems__ reports the reason
                groups[(row,)] = [row]
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[AnnotatedImage], list[dict]] | UserError:
        found, bad = [], []
        try:
            for rows in (self.groups[index] for index in indices):
                lines, unusable = self._lines(rows)
                try:
                    if lines:
                        found.append(self._image(rows[0], lines))
                except BadSample as e:
                    unusable = [self.reader.quarantine_entry(0, row, str(e)) for row in rows]
                bad += unusable
        except UserError as e:  # returned, as in `TrainDataset`
            return e
        return found, bad

    def with_image_of(self, sample: AnnotatedImage, other: AnnotatedImage | None) -> AnnotatedImage:
        """Return a sample with the images of another one, black ones for None."""
        others = [None] * len(sample.images) if other is None else other.images
        return replace(sample, images=[exchange(*pair) for pair in zip(sample.images, others, strict=True)])

    def _lines(self, rows: list[int]) -> tuple[list[RawSample], list[dict]]:
        lines, bad = [], []
        for row in rows:
            try:
                lines.append(self.reader.annotation(row))
            except BadSample as e:
                bad.append(self.reader.quarantine_entry(0, row, str(e)))
        return lines, bad

    def _image(self, row: int, lines: list[RawSample]) -> AnnotatedImage:
        size, interpolation = self.preprocess.size, self.preprocess.interpolation
        encoded = self.reader.images(row)
        pixels = [self.transform(decode(image, self.max_pixels), size, interpolation) for image in encoded]
        image_id = content_id(encoded[0])  # two names of one image are one image
        return AnnotatedImage(pixels, [replace(line, image_id=image_id) for line in lines])
