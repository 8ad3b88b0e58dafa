"""Images with one class each: a folder per class, a labels.jsonl, or a public set in its own form.

Used by zero-shot classification, kNN and linear probe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vlp.data.augment import Resize
from vlp.data.image import decode
from vlp.data.preprocess import Preprocess
from vlp.data.reading.benchmarks import CifarImage, FramedImage, cifar_names, find_cifar, read_cifar, read_objectnet
from vlp.data.reading.tables import Lines, as_text
from vlp.errors import BadSample, UserError
from vlp.files import is_possible_path, local_path, read_regular, relative_to, why_not_local

# Files with the later suffixes cannot be decoded here. They are read all the same, to be counted and named as bad.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
IMAGE_SUFFIXES += (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".heic", ".avif", ".jp2", ".img")
JUNK_FOLDERS = ("__MACOSX", "lost+found", "@eaDir")  # of archives, file systems and network drives
SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
WNID = re.compile(r"n\d{8}")
FORMS = "a folder of images per class, a labels.jsonl, CIFAR's binary files, or ObjectNet"


@dataclass(frozen=True)
class BadLine:
    """A line of labels.jsonl that names no image or class. It is reported as an image that cannot be decoded is."""

    where: str
    reason: str

    def pixels(self, max_pixels: int) -> np.ndarray:
        """Raise BadSample with the reason."""
        raise BadSample(self.reason)

    def __str__(self) -> str:
        return self.where


ImageFile = Path | CifarImage | FramedImage | BadLine
LabelledImages = list[tuple[ImageFile, int]]  # (image, class number, or NO_CLASS for a `BadLine`)
NO_CLASS, NO_KEY = -1, ""


@dataclass(frozen=True)
class _Row:
    """An image with its class: ``key`` identifies it (the label's number or the folder), ``name`` is its name."""

    image: ImageFile
    key: int | str
    name: str


def read_labelled(folder: Path, split: str | None) -> tuple[LabelledImages, list[str]]:
    """Read images with their class numbers, and the names of all classes, including classes without an image.

    Args:
        folder: Folder with one folder of images per class, or with a labels.jsonl of objects with image, label and,
            optionally, name and split; or see `vlp.data.reading.benchmarks`.
        split: Rows of labels.jsonl with this split, or the folder FOLDER/SPLIT. None reads all.

    Raises:
        UserError: if the folder has neither form, its class folders are inside folders of splits and none is given, or the
            split has no image.
    """
    rows, classes = _read(local_path(folder), split)
    return _number(rows, classes), list(classes.values())


def read_train_and_test(folder: Path, train: str, test: str) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Read two splits with the same class numbers.

    Raises:
        UserError: as `read_labelled`, and if the first split has fewer than two classes with images, the second split has a
            class that the first lacks, or an image is in both.
    """
    folder = local_path(folder)
    learned, tested = _read(folder, train)[0], _read(folder, test)[0]
    classes = _classes(learned)
    if len(classes) < 2:
        raise UserError(f"split {train!r} of {folder} has one class; give at least two")
    if unknown := [row.name for row in tested if row.key not in classes and row.key != NO_KEY]:
        raise UserError(f"split {test!r} of {folder} has the class {unknown[0]!r}, which {train!r} lacks; add images")
    if both := _usable(learned) & _usable(tested):
        raise UserError(f"{min(both)} is in both {train!r} and {test!r} of {folder}; the splits must not share images")
    return _number(learned, classes), _number(tested, classes), list(classes.values())


def _usable(rows: Iterable[_Row]) -> set[ImageFile]:
    return {row.image for row in rows if not isinstance(row.image, BadLine)}


def _classes(rows: Iterable[_Row]) -> dict[int | str, str]:
    """Return the classes of rows, see `_in_order`. Raises UserError if a class has two names."""
    names: dict[int | str, str] = {}
    for row in rows:
        if isinstance(row.image, BadLine):
            continue
        if names.setdefault(row.key, row.name) != row.name:
            raise UserError(f"label {row.key} has the names {names[row.key]!r} and {row.name!r}; give it one")
    return _in_order(names)


def _in_order(names: dict[int | str, str]) -> dict[int | str, str]:
    """Sort classes by key: folders that are numbers (ImageNet-V2) by number, others by name."""
    numbered = all(str(key).isdigit() for key in names)
    return dict(sorted(names.items(), key=lambda item: int(item[0]) if numbered else item[0]))


def _number(rows: list[_Row], classes: dict[int | str, str]) -> LabelledImages:
    number = {key: n for n, key in enumerate(classes)} | {NO_KEY: NO_CLASS}
    return [(row.image, number[row.key]) for row in rows]


def _read(folder: Path, split: str | None) -> tuple[list[_Row], dict[int | str, str]]:
    """Return the rows of a split, and key to name of all classes in the order of their numbers."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}{relative_to(folder)}; give data=FOLDER with {FORMS}")
    if (folder / "labels.jsonl").exists():
        return _read_labels(folder, split)
    if cifar := find_cifar(folder):
        return [_Row(*row) for row in read_cifar(folder, cifar, split)], dict(enumerate(cifar_names(folder, cifar)))
    if names := read_objectnet(folder):
        if not (folder / "images").is_dir():
            raise UserError(f"{folder} has the mappings of ObjectNet and no folder images; unpack its images there")
        found, _ = _read_folders(folder / "images")
        rows = [_Row(FramedImage(row.image), row.key, names[row.key]) for row in found if row.key in names]
        if not rows:
            raise UserError(f"{folder}/images has no image of a class that ObjectNet shares with ImageNet")
        return rows, _in_order(names)
    if split is not None:
        if not (folder / split).is_dir():
            raise UserError(
                f"no folder {folder / split}, and no labels.jsonl next to it that could name the split {split!r}"
            )
        return _read_folders(folder / split)
    return _read_folders(folder)


def _read_folders(folder: Path) -> tuple[list[_Row], dict[int | str, str]]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_visible(path.name))
    splits = [name for name in names if name.lower() in SPLIT_FOLDERS and _has_only_folders(folder / name)]
    if splits:
        raise UserError(
            f"{folder} has the splits {', '.join(splits)}, each with a folder per class; give split={splits[-1]}"
        )
    _check_strays(folder, names)
    rows = [_Row(path, name, name) for name in names for path in _images(folder / name)]
    if len({row.key for row in rows}) < 2:
        raise UserError(f"{folder} has neither labels.jsonl nor two folders of images, one per class")
    return rows, _in_order({name: name for name in names})


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in JUNK_FOLDERS


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _images(folder: Path) -> list[Path]:
    """Return the image files of a class, at any depth."""
    return sorted(
        path for path in folder.rglob("*") if _is_image(path) and all(map(_is_visible, path.relative_to(folder).parts))
    )


def _has_only_folders(folder: Path) -> bool:
    """Return whether a folder contains folders and no image: then it is a split, and not a class called ``train``."""
    entries = [path for path in folder.iterdir() if _is_visible(path.name)]
    return any(path.is_dir() for path in entries) and not any(map(_is_image, entries))


def _check_strays(folder: Path, names: list[str]) -> None:
    """Refuse a folder among ImageNet's classes that is not one of them: all classes would lose their names or numbers."""
    for kind, found in (
        ("WordNet ids", [name for name in names if WNID.fullmatch(name)]),
        (
            "numbers of ImageNet's classes",
            [str(n) for n in range(1000)] if {str(n) for n in range(1000)} <= set(names) else [],
        ),
    ):
        if found and (strays := sorted(set(names) - set(found))):
            raise UserError(
                f"{folder} has the folder {strays[0]!r} among {len(found)} that are {kind}; move it out of the folder"
            )


def _read_labels(folder: Path, split: str | None) -> tuple[list[_Row], dict[int | str, str]]:
    """Read the rows of a split. Lines that cannot be read are in every split, as theirs is unknown."""
    lines, rows, splits = Lines(folder / "labels.jsonl"), [], []
    for index, number in enumerate(lines.numbers):
        own = split
        try:
            record = lines.record(index)
            own = record.get("split")
            row = _row_of(record, folder)
        except BadSample as e:
            bad = BadLine(f"{folder}/labels.jsonl line {number}", f"expected an object with image, label and name; {e}")
            row = _Row(bad, NO_KEY, "")
        rows.append(row)
        splits.append(own)
    if rows and not _usable(rows):
        raise UserError(f"{rows[0].image}: {rows[0].image.reason}")
    kept = [row for row, own in zip(rows, splits) if split is None or own == split]
    if not _usable(kept):
        raise UserError(f"{folder}/labels.jsonl has no image" + (f" of split {split!r}" if split else ""))
    return kept, _classes(rows)


def _row_of(record: dict, folder: Path) -> _Row:
    """Read a line of labels.jsonl. Raises BadSample for a path, label or name of another type."""
    image, label = as_text(record.get("image"), "image"), record.get("label")
    if not image or not is_possible_path(image):
        raise BadSample("'image' should be a path")
    if "://" in image:
        raise BadSample(f"{image!r} cannot be read{why_not_local(image)}")
    if isinstance(label, str) and label.isdigit() or isinstance(label, float) and label.is_integer():
        label = int(label)
    if type(label) is not int:
        raise BadSample(f"'label' should be a whole number, found {str(label)[:40]!r}")
    # one spelling of the path, so that an image in two splits is noticed
    path = Path(os.path.normpath(folder / image))
    return _Row(path, label, as_text(record.get("name"), "name") or str(label))


def read_pixels(image: ImageFile, max_pixels: int) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels. Raises BadSample or OSError if they cannot be read."""
    return decode(read_regular(image), max_pixels) if isinstance(image, Path) else image.pixels(max_pixels)


class LabelledImageDataset(Dataset):
    """Indices of images to the decodable ones with their (3, h, w) uint8 pixels, and quarantine entries of the others."""

    def __init__(self, images: LabelledImages, resize: Resize, max_pixels: int, preprocess: Preprocess):
        self.images, self.resize, self.max_pixels, self.preprocess = images, resize, max_pixels, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[list[tuple[int, Tensor]], list[dict]]:
        found, bad = [], []
        for n in indices:
            file = self.images[n][0]
            try:
                image = read_pixels(file, self.max_pixels)
                found.append((n, self.resize(image, self.preprocess.size, self.preprocess.interpolation)))
            except BadSample as e:
                bad.append({"number": n, "image": str(file), "reason": str(e)})
            except OSError as e:
                bad.append(
                    {
                        "number": n,
                        "image": str(file),
                        "reason": f"{e.strerror or e}{why_not_local(os.path.basename(str(file)))}",
                    }
                )
        return found, bad
