"""Pictures that stand twice, or in training and in evaluation data, by their content.

"bytes": the file is the same. Checksum and size, which a shard's index has, tell most apart without reading them; what is left
is compared byte by byte. "pixels": it looks the same, scaled or encoded anew: of 16 x 16 places whether it gets brighter to
the right (a difference hash of 256 bits, at most 10 of which may differ), and of 8 x 8 places the mean colour (which may differ
by 12 of 255). Crops, mirrored and recoloured pictures are not found.

n and m pictures.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from vlp.data.annotated import AnnotatedReader
from vlp.data.image import decode
from vlp.data.labelled import PICTURES
from vlp.data.shards import IMAGES, ShardReader
from vlp.errors import BadSample, UserError

HASH, COLOURS = 16, 8  # places a side
MOST_BITS, MOST_COLOUR = 10, 12
MARGIN = 2  # of 255, that brightness has to rise: noise of flat areas is no gradient
Progress = Callable[[int, int], None]


class Shards:
    """The pictures of shards."""

    def __init__(self, location: str):
        self.reader = ShardReader(location)

    def __len__(self) -> int:
        return len(self.reader)

    def keys(self) -> Iterator[tuple[int, int]]:
        """(CRC-32, bytes) of each picture, from the indexes alone."""
        for shard in range(len(self.reader.shards)):
            for members in self.reader.index(shard).members:
                _, size, crc = next(members[e] for e in IMAGES if e in members)
                yield crc, size

    def read(self, number: int) -> bytes:
        return self.reader.read(*self.reader.place(number)).image

    def name(self, number: int) -> str:
        shard, row = self.reader.place(number)
        return f"{Path(self.reader.shards[shard]).name}/{self.reader.index(shard).keys[row]}"


class _WithoutIndex:
    """Pictures that must be read to be told apart."""

    def keys(self) -> Iterator[tuple[int, int]]:
        """(CRC-32, bytes) of each picture."""
        for number in range(len(self)):
            data = self.read(number)
            yield zlib.crc32(data), len(data)


class Files(_WithoutIndex):
    """Picture files."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, number: int) -> bytes:
        try:
            return self.paths[number].read_bytes()
        except OSError:
            return b""

    def name(self, number: int) -> str:
        return str(self.paths[number])


class Named(_WithoutIndex):
    """The pictures that annotations name, each once."""

    def __init__(self, annotations: AnnotatedReader):
        self.pictures, names = annotations.pictures, {}
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
            return self.pictures.read(self.names[number])
        except BadSample:
            return b""

    def name(self, number: int) -> str:
        return self.names[number]


Collection = Shards | Files | Named


def open_pictures(location: str) -> Collection:
    """Shards, or a folder with picture files at any depth. Raises UserError where there is neither."""
    folder = Path(location)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
        if not paths:
            raise UserError(f"{location} holds neither shards nor pictures; give a folder of either")
        return Files(paths)
    return Shards(location)


@dataclass(frozen=True)
class Twins:
    """Two pictures with the same content; the second is of the other collection, where there are two."""

    by: Literal["bytes", "pixels"]
    first: str
    second: str


def same_bytes(a: Collection, b: Collection | None = None) -> list[tuple[int, int]]:
    """Numbers of pictures with the same bytes: of ``a`` and ``b``, or, where there is no ``b``, of ``a`` and an earlier one."""
    places = defaultdict(list)
    for number, key in enumerate((b or a).keys()):
        places[key].append(number)
    found = []
    for number, key in enumerate(a.keys()):
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
    """All twins, those by bytes first, and how many pictures could not be decoded.

    Args:
        workers: threads that decode.
        progress: called with (pictures decoded, pictures).
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
    """What pictures look like: (n, 256) bool, and (n, 192) mean colours; all zero where one cannot be decoded.

    Args:
        decoded: (n,) bool.
    """

    bits: torch.Tensor
    colours: torch.Tensor
    decoded: torch.Tensor


def print_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 to (256,) bool and (192,) uint8."""
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((HASH + 1, HASH), Image.Resampling.BOX), dtype=np.int16)
    colours = np.asarray(image.resize((COLOURS, COLOURS), Image.Resampling.BOX))
    return (grey[:, 1:] - grey[:, :-1] > MARGIN).ravel(), colours.ravel()


def _prints(pictures: Collection, workers: int, progress: Callable[[int], None]) -> tuple[Prints, int]:
    def one(number: int):
        try:
            return print_of(decode(pictures.read(number)))
        except BadSample:
            return None

    prints = Prints(
        torch.zeros(len(pictures), HASH * HASH, dtype=torch.bool),
        torch.zeros(len(pictures), 3 * COLOURS**2, dtype=torch.uint8),
        torch.zeros(len(pictures), dtype=torch.bool),
    )
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pictures), 512):
            numbers = range(start, min(start + 512, len(pictures)))
            for number, found in zip(numbers, pool.map(one, numbers)):
                if found is not None:
                    prints.bits[number], prints.colours[number] = map(torch.from_numpy, map(np.copy, found))
                    prints.decoded[number] = True
            progress(numbers.stop)
    return prints, int((~prints.decoded).sum())


def same_pixels(a: Prints, b: Prints | None = None, chunk: int = 512) -> list[tuple[int, int]]:
    """As `same_bytes`, by looks: every picture is compared with every other, ``chunk`` of them at a time."""
    other, found = b or a, []
    keys = other.bits.float()
    ones = keys.sum(1)
    for start in range(0, len(a.bits), chunk):
        bits = a.bits[start : start + chunk].float()
        differing = bits.sum(1, keepdim=True) + ones - 2 * bits @ keys.T  # (chunk, m)
        near = (differing <= MOST_BITS) & a.decoded[start : start + chunk, None] & other.decoded
        if b is None:
            near &= torch.arange(len(keys)) < torch.arange(start, start + len(bits))[:, None]
        rows, columns = near.nonzero(as_tuple=True)
        apart = (a.colours[start + rows].int() - other.colours[columns].int()).abs().amax(1)
        for row, column in zip((start + rows)[apart <= MOST_COLOUR].tolist(), columns[apart <= MOST_COLOUR].tolist()):
            if not found or found[-1][0] != row:  # one twin of each is enough
                found.append((row, column))
    return found
