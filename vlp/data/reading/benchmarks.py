"""Public sets of labelled pictures that come in forms of their own: CIFAR's binary files, and ObjectNet's folders and mappings.

A picture of these is no file of its own, or not all of one: it has ``pixels()`` instead of bytes to decode.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlp.data.image import decode
from vlp.errors import BadSample, UserError

SIDE = 32  # pixels of CIFAR's pictures
BORDER = 2  # pixels that published evaluations cut from ObjectNet's pictures, which have a red frame
MAPPING = ("objectnet_to_imagenet_1k.json", "folder_to_objectnet_label.json")


@dataclass(frozen=True)
class Cifar:
    """One of the two sets: bytes of labels before a picture, which of them is the class, and the names of its files."""

    label_bytes: int
    names: str
    files: dict[str, tuple[str, ...]]


CIFARS = (
    Cifar(
        1, "batches.meta.txt", {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)}
    ),
    Cifar(2, "fine_label_names.txt", {"train": ("train.bin",), "test": ("test.bin",)}),
)


@dataclass(frozen=True, order=True)
class CifarImage:
    """A picture at an offset of a file of CIFAR's: 1,024 bytes each of red, green and blue, row by row."""

    file: Path
    offset: int

    def pixels(self, max_pixels: int) -> np.ndarray:
        """(32, 32, 3) uint8. Raises BadSample where the file ends before."""
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            data = f.read(3 * SIDE * SIDE)
        if len(data) < 3 * SIDE * SIDE:
            raise BadSample("the file ends within the picture")
        return np.frombuffer(bytearray(data), np.uint8).reshape(3, SIDE, SIDE).transpose(1, 2, 0)

    def __str__(self) -> str:
        return f"{self.file} at {self.offset}"


@dataclass(frozen=True, order=True)
class FramedImage:
    """A picture file whose frame is no part of it."""

    path: Path

    def pixels(self, max_pixels: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises BadSample as `vlp.data.image.decode`."""
        return decode(self.path.read_bytes(), max_pixels)[BORDER:-BORDER, BORDER:-BORDER]

    def __str__(self) -> str:
        return str(self.path)


def find_cifar(folder: Path) -> Cifar | None:
    """Which of the two the folder is.

    Raises:
        UserError: for the version that has to be unpickled.
    """
    if (folder / "batches.meta").is_file() or ((folder / "meta").is_file() and (folder / "train").is_file()):
        raise UserError(
            f"{folder} holds CIFAR as pickles of Python, which would run code on loading; fetch the binary version"
        )
    return next((cifar for cifar in CIFARS if (folder / cifar.names).is_file()), None)


def read_cifar(folder: Path, cifar: Cifar, split: str | None) -> Iterator[tuple[CifarImage, int, str]]:
    """(picture, class, name) of the split "train" or "test"; None = both.

    Raises:
        UserError: where there is no such split, or a file is missing or no CIFAR file.
    """
    if split not in (None, *cifar.files):
        raise UserError(f"CIFAR has no split {split!r}, but train and test; set split=test")
    names = (folder / cifar.names).read_text().split()
    size = cifar.label_bytes + 3 * SIDE * SIDE
    for file in [folder / name for part in ([split] if split else cifar.files) for name in cifar.files[part]]:
        try:
            records = np.frombuffer(file.read_bytes(), np.uint8)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); fetch CIFAR's binary version again") from None
        if not len(records) or len(records) % size:
            raise UserError(f"{file} has {len(records):,} bytes, which are no whole records of {size}; fetch it again")
        for n, label in enumerate(records.reshape(-1, size)[:, cifar.label_bytes - 1].tolist()):
            if label >= len(names):
                raise UserError(f"{file} has the class {label}, of which {cifar.names} gives no name; fetch both again")
            yield CifarImage(file, n * size + cifar.label_bytes), label, names[label]


def read_objectnet(folder: Path) -> dict[str, str] | None:
    """Folder -> name of the 113 classes that ImageNet has too, by the data set's own mappings; None where it is no ObjectNet.

    As published evaluations do, the model chooses among these 113, called as ObjectNet calls them.
    """
    paths = [folder / "mappings" / name for name in MAPPING]
    if not all(path.is_file() for path in paths):
        return None
    try:
        shared, labels = (json.loads(path.read_text()) for path in paths)
        return {name: label.lower() for name, label in labels.items() if label in shared}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder}/mappings cannot be read ({error}); fetch ObjectNet's mappings again") from None
