"""Public sets of labelled images in their own forms: CIFAR's binary files, and ObjectNet's folders and mappings.

Their images are parts of files, so they have a method ``pixels()`` instead of bytes to decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlp.data.image import decode
from vlp.data.reading.tables import read_json, read_text
from vlp.errors import BadSample, UserError
from vlp.files import open_regular, read_regular

SIDE = 32  # pixels of CIFAR's images
BORDER = 2  # pixels that published evaluations remove from ObjectNet's images, which have a red frame
MAPPING = ("objectnet_to_imagenet_1k.json", "folder_to_objectnet_label.json")


@dataclass(frozen=True)
class Cifar:
    """One of the two sets.

    Args:
        label_bytes: Bytes of labels before an image, of which the last is the class.
        names: File with the names of the classes.
        files: Files of each split.
    """

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
    """An image at an offset of a CIFAR file: 1,024 bytes each of red, green and blue, row by row."""

    file: Path
    offset: int

    def pixels(self, max_pixels: int) -> np.ndarray:
        """Return (32, 32, 3) uint8 pixels. Raises BadSample if the file ends inside the image."""
        with open_regular(self.file) as file:
            file.seek(self.offset)
            data = file.read(3 * SIDE * SIDE)
        if len(data) < 3 * SIDE * SIDE:
            raise BadSample("the file ends inside the image")
        return np.frombuffer(bytearray(data), np.uint8).reshape(3, SIDE, SIDE).transpose(1, 2, 0)

    def __str__(self) -> str:
        return f"{self.file} at {self.offset}"


@dataclass(frozen=True, order=True)
class FramedImage:
    """An image file with a frame that is removed."""

    path: Path

    def pixels(self, max_pixels: int) -> np.ndarray:
        """Return (H, W, 3) uint8 pixels. Raises BadSample as `vlp.data.image.decode`."""
        return decode(read_regular(self.path), max_pixels)[BORDER:-BORDER, BORDER:-BORDER]

    def __str__(self) -> str:
        return str(self.path)


def find_cifar(folder: Path) -> Cifar | None:
    """Return which of the two sets the folder contains, or None.

    Raises:
        UserError: for the version that has to be unpickled.
    """
    if (folder / "batches.meta").is_file() or ((folder / "meta").is_file() and (folder / "train").is_file()):
        raise UserError(
            f"{folder} contains CIFAR as Python pickles, which would run code on loading; fetch the binary version"
        )
    return next((cifar for cifar in CIFARS if (folder / cifar.names).is_file()), None)


def cifar_names(folder: Path, cifar: Cifar) -> list[str]:
    """Return the names of all classes, in the order of their numbers."""
    return read_text(folder / cifar.names).split()


def read_cifar(folder: Path, cifar: Cifar, split: str | None) -> Iterator[tuple[CifarImage, int, str]]:
    """Yield (image, class, name) of the split "train" or "test", or of both for None.

    Raises:
        UserError: if there is no such split, or a file is missing or damaged.
    """
    if split not in (None, *cifar.files):
        raise UserError(f"CIFAR has no split {split!r}, but train and test; set split=test")
    names = cifar_names(folder, cifar)
    size = cifar.label_bytes + 3 * SIDE * SIDE
    for file in [folder / name for part in ([split] if split else cifar.files) for name in cifar.files[part]]:
        try:
            records = np.frombuffer(read_regular(file), np.uint8)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); fetch CIFAR's binary version again") from None
        if not len(records) or len(records) % size:
            raise UserError(
                f"{file} has {len(records):,} bytes, which are not a multiple of the record size {size}; fetch it again"
            )
        for n, label in enumerate(records.reshape(-1, size)[:, cifar.label_bytes - 1].tolist()):
            if label >= len(names):
                raise UserError(f"{file} has the class {label}, which {cifar.names} does not name; fetch both again")
            yield CifarImage(file, n * size + cifar.label_bytes), label, names[label]


def read_objectnet(folder: Path) -> dict[str, str] | None:
    """Return folder to name of the 113 classes that ImageNet also has, by the data set's mappings, or None.

    As in published evaluations, the model chooses among these 113 classes under ObjectNet's names.
    """
    paths = [folder / "mappings" / name for name in MAPPING]
    if not all(path.is_file() for path in paths):
        return None
    try:
        shared, labels = map(read_json, paths)
        return {name: label.lower() for name, label in labels.items() if label in shared}
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/mappings cannot be read ({error}); fetch ObjectNet's mappings again") from None
