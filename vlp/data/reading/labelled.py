"""Pictures with a class each: a folder of pictures a class, a labels.jsonl, or a public set in its own form.

Shared by zero-shot, kNN and linear probe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vlp.data.augment import Resize
from vlp.data.image import decode
from vlp.data.preprocess import Preprocess
from vlp.data.reading.benchmarks import CifarImage, FramedImage, find_cifar, read_cifar, read_objectnet
from vlp.errors import BadSample, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMS = "a folder of pictures a class, a labels.jsonl, CIFAR's binary files, or ObjectNet"

ImageFile = Path | CifarImage | FramedImage
LabelledImages = list[tuple[ImageFile, int]]  # (picture, class number)


@dataclass(frozen=True)
class _Row:
    """A picture whose class is known by ``key`` (the label's number or the folder), and is called ``name``."""

    picture: ImageFile
    key: int | str
    name: str


def read_labelled(folder: Path, split: str | None) -> tuple[LabelledImages, list[str]]:
    """Pictures with their class numbers, and the classes' names as the folder has them.

    Args:
        folder: has one folder of pictures a class, or a labels.jsonl of objects with image, label and, optionally, name
            and split; or see `vlp.data.reading.benchmarks`.
        split: rows of labels.jsonl with this split, or the folder FOLDER/SPLIT; None = all.

    Raises:
        UserError: where there is neither form, or no picture of the split.
    """
    rows = _read(folder, split)
    return _number(rows, keys := _keys(rows)), list(keys.values())


def read_train_and_test(folder: Path, train: str, test: str) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Two splits whose classes have the same numbers.

    Raises:
        UserError: as `read_labelled`; where fewer than two classes can be learned, the second split has one that the first
            has not, or a picture is in both.
    """
    learned, tested = _read(folder, train), _read(folder, test)
    keys = _keys(learned)
    if len(keys) < 2:
        raise UserError(f"split {train!r} of {folder} has one class; there is nothing to tell apart")
    if unknown := [row.name for row in tested if row.key not in keys]:
        raise UserError(
            f"split {test!r} of {folder} has the class {unknown[0]!r}, which {train!r} has not; add pictures"
        )
    if both := {row.picture for row in learned} & {row.picture for row in tested}:
        raise UserError(
            f"{min(both)} is in both {train!r} and {test!r} of {folder}; the splits must not share pictures"
        )
    return _number(learned, keys), _number(tested, keys), list(keys.values())


def _keys(rows: list[_Row]) -> dict[int | str, str]:
    """The classes' names by key, in the order of their numbers; folders that are numbers (ImageNet-V2) in theirs."""
    names = {row.key: row.name for row in rows}
    numbered = all(str(key).isdigit() for key in names)
    return dict(sorted(names.items(), key=lambda item: int(item[0]) if numbered else item[0]))


def _number(rows: list[_Row], keys: dict[int | str, str]) -> LabelledImages:
    number = {key: n for n, key in enumerate(keys)}
    return [(row.picture, number[row.key]) for row in rows]


def _read(folder: Path, split: str | None) -> list[_Row]:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give data=FOLDER with {FORMS}")
    if (folder / "labels.jsonl").exists():
        return _read_labels(folder, split)
    if cifar := find_cifar(folder):
        return [_Row(*row) for row in read_cifar(folder, cifar, split)]
    if names := read_objectnet(folder):
        found = _read_folders(folder / "images")
        return [_Row(FramedImage(row.picture), row.key, names[row.key]) for row in found if row.key in names]
    if split is not None:
        folder = folder / split
        if not folder.is_dir():
            raise UserError(f"no folder {folder}, and no labels.jsonl beside it that could name the split {split!r}")
    return _read_folders(folder)


def _read_folders(folder: Path) -> list[_Row]:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    rows = [
        _Row(path, name, name)
        for name in classes
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if len({row.key for row in rows}) < 2:
        raise UserError(f"{folder} holds neither labels.jsonl nor two folders of pictures, one a class")
    return rows


def _read_labels(folder: Path, split: str | None) -> list[_Row]:
    rows = []
    with open(folder / "labels.jsonl", "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                label = int(row["label"])
                if split is None or row.get("split") == split:
                    rows.append(_Row(folder / row["image"], label, str(row.get("name", label))))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{folder}/labels.jsonl line {number}: expected an object with image, label and name"
                ) from None
    if not rows:
        raise UserError(f"{folder}/labels.jsonl has no picture" + (f" of split {split!r}" if split else ""))
    return rows


def read_pixels(picture: ImageFile, max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8. Raises BadSample or OSError where there are none."""
    return decode(picture.read_bytes(), max_pixels) if isinstance(picture, Path) else picture.pixels(max_pixels)


class LabelledImageDataset(Dataset):
    """Numbers -> the numbers that could be decoded, their resized (3, H, W) uint8 pixels, and complaints of the others."""

    def __init__(self, pictures: LabelledImages, resize: Resize, max_pixels: int, preprocess: Preprocess):
        self.pictures, self.resize, self.max_pixels, self.preprocess = pictures, resize, max_pixels, preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, numbers: list[int]) -> tuple[list[int], list[Tensor], list[dict]]:
        good, pixels, bad = [], [], []
        for n in numbers:
            picture = self.pictures[n][0]
            try:
                image = read_pixels(picture, self.max_pixels)
                pixels.append(self.resize(image, self.preprocess.size, self.preprocess.interpolation))
                good.append(n)
            except (BadSample, OSError) as e:
                bad.append({"number": n, "image": str(picture), "reason": str(e)})
        return good, pixels, bad
