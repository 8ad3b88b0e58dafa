"""Duplicate images within a collection, or between training and evaluation data.

"bytes": the files are equal. Checksum and size, which the index of a shard contains, exclude most pairs without reading the
images; the remaining ones are compared byte by byte. "pixels": the images look the same, also if one was rescaled or
re-encoded. Two fingerprints decide: a difference hash of 16 x 16 bits (brighter to the right or not; at most 10 bits may
differ), and the mean colours of 8 x 8 cells (which may differ by 12 of 255). Crops, mirrored and recoloured images are not
found.

n and m images.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from vlp.data.image import decode
from vlp.data.reading.annotated import AnnotatedReader
from vlp.data.reading.index import IMAGES
from vlp.data.reading.labelled import IMAGE_SUFFIXES
from vlp.data.reading.locations import is_remote
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError
from vlp.files import local_path, read_regular

HASH, COLOURS = 16, 8  # cells per side
MOST_BITS, MOST_COLOUR = 10, 12
MARGIN = 2  # of 255: a smaller rise in brightness is noise of a flat area
Progress = Callable[[int, int], None]


class ShardCollection:
    """Images of shards."""

    def __init__(self, location: str):
        self.reader = ShardReader(location)

    def __len__(self) -> int:
        return len(self.reader)

    def checksums(self) -> Iterator[tuple[int, int]]:
        """Yield (CRC-32, bytes) of each image, read from the indexes."""
        for shard in range(len(self.reader.shards)):
            for members in self.reader.index(shard).members:
                _, size, crc = next(members[e] for e in IMAGES if e in members)
                yield crc, size

    def read(self, number: int) -> bytes:
        """Return the encoded image, empty if it cannot be read."""
        try:
            return self.reader.read(*self.reader.locate(number)).image
        except BadSample:  # damaged since it was indexed
            return b""

    def name(self, number: int) -> str:
        shard, row = self.reader.locate(number)
        return f"{Path(self.reader.shards[shard]).name}/{self.reader.index(shard).keys[row]}"


class _WithoutIndex:
    """Base of collections whose checksums require reading the images."""

    @cached_property
    def _checksums(self) -> list[tuple[int, int]]:
        images = map(self.read, range(len(self)))
        return [(zlib.crc32(data), len(data)) for data in images]

    def checksums(self) -> Iterator[tuple[int, int]]:
        """Yield (CRC-32, bytes) of each image. Images are read once, on first access."""
        return iter(self._checksums)


class FileCollection(_WithoutIndex):
    """Image files."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, number: int) -> bytes:
        try:
            return read_regular(self.paths[number])
        except OSError:
            return b""

    def name(self, number: int) -> str:
        return str(self.paths[number])


class AnnotatedCollection(_WithoutIndex):
    """Images that annotations name, each once."""

    def __init__(self, annotations: AnnotatedReader):
        self.store, names = annotations.store, {}
        for row in range(len(annotations)):
            try:
                names |= dict.fromkeys(annotations.names(row))
            except BadSample:
                continue
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> bytes:
        try:
            return self.store.read(self.names[number])
        except BadSample:
            return b""

    def name(self, number: int) -> str:
        return self.names[number]


Collection = ShardCollection | FileCollection | AnnotatedCollection


def open_collection(location: str) -> Collection:
    """Open shards, or a folder with image files at any depth.

    Raises:
        UserError: if the location has neither.
    """
    folder = Path(location) if is_remote(location) else local_path(location)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise UserError(f"{location} contains neither shards nor images; give a folder of either")
        return FileCollection(paths)
    return ShardCollection(location)


@dataclass(frozen=True)
class Twins:
    """Two images with the same content; the second is from the other collection if there are two."""

    by: Literal["bytes", "pixels"]
    first: str
    second: str


def same_bytes(a: Collection, b: Collection | None = None) -> list[tuple[int, int]]:
    """Return index pairs of images with equal bytes: of ``a`` and ``b``, or of ``a`` and an earlier image of ``a``."""
    places = defaultdict(list)
    for number, key in enumerate((b or a).checksums()):
        places[key].append(number)
    found = []
    for number, key in enumerate(a.checksums()):
        others = places.get(key, ())
        data = None
        for other in others:
            if not b and other >= number:
                continue
            data = a.read(number) if data is None else data
            if data and data == (b or a).read(other):
                found.append((number, other))
                break
    return found


def find_twins(
    a: Collection, b: Collection | None = None, workers: int = 1, progress: Progress = lambda done, total: None
) -> tuple[list[Twins], int]:
    """Find all duplicates.

    Args:
        workers: Number of decoding threads.
        progress: Called with (decoded images, images).

    Returns:
        The duplicates, those by bytes first, and the number of images that could not be decoded.
    """
    exact = same_bytes(a, b)
    total = len(a) + (len(b) if b else 0)
    of_a, bad = _prints(a, workers, lambda done: progress(done, total))
    of_b, others = (of_a, 0) if b is None else _prints(b, workers, lambda done: progress(len(a) + done, total))
    near = same_pixels(of_a, None if b is None else of_b)
    known = {number for number, _ in exact}
    other = b or a
    return [
        *(Twins("bytes", a.name(x), other.name(y)) for x, y in exact),
        *(Twins("pixels", a.name(x), other.name(y)) for x, y in near if x not in known),
    ], bad + others


@dataclass
class Prints:
    """Fingerprints of n images; zero for an image that cannot be decoded.

    Args:
        bits: (n, 256) bool difference hash.
        colours: (n, 192) uint8 mean colours.
        decoded: (n,) bool.
    """

    bits: torch.Tensor
    colours: torch.Tensor
    decoded: torch.Tensor


def print_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the (256,) bool hash and the (192,) uint8 mean colours of (H, W, 3) uint8 pixels."""
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((HASH + 1, HASH), Image.Resampling.BOX), dtype=np.int16)
    colours = np.asarray(image.resize((COLOURS, COLOURS), Image.Resampling.BOX))
    return (grey[:, 1:] - grey[:, :-1] > MARGIN).ravel(), colours.ravel()


def _prints(images: Collection, workers: int, progress: Callable[[int], None]) -> tuple[Prints, int]:
    def one(number: int):
        try:
            return print_of(decode(images.read(number)))
        except BadSample:
            return None

    prints = Prints(
        torch.zeros(len(images), HASH * HASH, dtype=torch.bool),
        torch.zeros(len(images), 3 * COLOURS**2, dtype=torch.uint8),
        torch.zeros(len(images), dtype=torch.bool),
    )
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images), 512):
            numbers = range(start, min(start + 512, len(images)))
            for number, found in zip(numbers, pool.map(one, numbers)):
                if found is not None:
                    prints.bits[number], prints.colours[number] = map(torch.from_numpy, map(np.copy, found))
                    prints.decoded[number] = True
            progress(numbers.stop)
    return prints, int((~prints.decoded).sum())


def same_pixels(a: Prints, b: Prints | None = None, chunk: int = 512) -> list[tuple[int, int]]:
    """Return index pairs as `same_bytes` does, of images that look the same.

    Every image is compared with every other one, ``chunk`` images at a time.
    """
    other, found = b or a, []
    keys = other.bits.float()
    ones = keys.sum(1)
    for start in range(0, len(a.bits), chunk):
        bits = a.bits[start : start + chunk].float()
        differing = bits.sum(1, keepdim=True) + ones - 2 * bits @ keys.T  # (chunk, m) Hamming distances
        near = (differing <= MOST_BITS) & a.decoded[start : start + chunk, None] & other.decoded
        if b is None:
            near &= torch.arange(len(keys)) < torch.arange(start, start + len(bits))[:, None]
        rows, columns = near.nonzero(as_tuple=True)
        apart = (a.colours[start + rows].int() - other.colours[columns].int()).abs().amax(1)
        for row, column in zip((start + rows)[apart <= MOST_COLOUR].tolist(), columns[apart <= MOST_COLOUR].tolist()):
            if not found or found[-1][0] != row:  # one duplicate per image is enough
                found.append((row, column))
    return found
