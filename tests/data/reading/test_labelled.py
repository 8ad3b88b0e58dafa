"""Folders of images with classes, in both forms, and every way in which they can be wrong."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import SHARED
from tests.tasks.fakes import NAMES, ColourModel
from tests.tasks.test_zero_shot import picture
from vlp.data.augment import Resize
from vlp.data.reading.labelled import NO_CLASS, LabelledImageDataset, read_labelled, read_train_and_test
from vlp.errors import UserError


def write_labels(folder: Path, rows: list[tuple[str, int, str, str]]) -> Path:
    keys = ("image", "label", "name", "split")
    (folder / "labels.jsonl").write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    return folder


def test_labels_with_gaps_are_numbered_in_their_order(tmp_path):
    folder = write_labels(tmp_path, [("b.png", 30, "b", "x"), ("a.png", 7, "a", "x"), ("c.png", 30, "b", "y")])
    assert read_labelled(folder, None) == (
        [(folder / "b.png", 1), (folder / "a.png", 0), (folder / "c.png", 1)],
        ["a", "b"],
    )
    assert read_labelled(folder, "y") == ([(folder / "c.png", 1)], ["a", "b"])  # a split lacks images, not classes


def test_folders_that_are_numbers_are_classes_in_the_order_of_the_numbers(tmp_path):
    """ImageNet-V2's: by name 10 would come before 2, and the tenth class be taken for the second."""
    for name in ("0", "1", "2", "10"):
        picture(tmp_path / name / "x.png", "red")
    pictures, classes = read_labelled(tmp_path, None)
    assert classes == ["0", "1", "2", "10"] and {p.parent.name: n for p, n in pictures}["10"] == 3


def test_class_numbers_are_the_same_in_both_splits(tmp_path):
    """Two labels of one name stay two classes (ImageNet has two cranes)."""
    rows = [("a", 1, "crane", "train"), ("b", 2, "crane", "train"), ("c", 3, "dog", "train"), ("d", 2, "crane", "val")]
    train, test, classes = read_train_and_test(write_labels(tmp_path, rows), "train", "val")
    assert [n for _, n in train] == [0, 1, 2] and [n for _, n in test] == [1]
    assert classes == ["crane", "crane", "dog"]


def test_folders_of_splits_hold_folders_of_classes(tmp_path):
    for split, names in (("train", ("red", "blue")), ("val", ("blue", "red"))):
        for n, name in enumerate(names):
            picture(tmp_path / split / name / f"{n}.png", name)
    (tmp_path / "train" / "red" / "notes.txt").write_text("not a picture")
    train, test, classes = read_train_and_test(tmp_path, "train", "val")
    assert classes == ["blue", "red"] and len(train) == len(test) == 2
    assert all(path.parent.name == classes[n] for path, n in train + test)
    assert read_labelled(tmp_path, "val") == (test, classes)


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [("a", 0, "x", "train"), ("b", 1, "y", "train"), ("c", 2, "z", "val")],
            "has the class 'z', which 'train' lacks",
        ),
        ([("a", 0, "x", "train"), ("b", 1, "y", "train"), ("a", 0, "x", "val")], "a is in both 'train' and 'val'"),
        ([("a", 0, "x", "train"), ("b", 0, "x", "val")], "has one class"),
        ([("a", 0, "x", "train"), ("b", 1, "y", "train")], "no image of split 'val'"),
    ],
)
def test_splits_that_cannot_be_compared_are_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_train_and_test(write_labels(tmp_path, rows), "train", "val")


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json", "line 1: expected an object"),
        ('{"image": "a.png"}', "line 1: expected an object"),
        ('{"image": "a.png", "label": "red"}', "line 1: expected an object"),
        ("[1]", "line 1: expected an object"),
        ("", "has no image"),
    ],
)
def test_labels_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "labels.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_labelled(tmp_path, None)


def test_lines_that_cannot_be_read_are_bad_samples_with_their_line(tmp_path):
    picture(tmp_path / "a.png", "red")
    lines = [
        '{"image": "a.png", "label": 7, "name": "red", "split": "val"}',
        "not json",
        '{"image": null, "label": 7, "split": "val"}',
        '{"image": "a.png", "label": "red", "split": "train"}',
        '{"image": "https://example.org/a.png", "label": 7, "split": "val"}',
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    images, classes = read_labelled(tmp_path, "val")
    assert classes == ["red"] and [n for _, n in images] == [0, NO_CLASS, NO_CLASS, NO_CLASS]
    found, bad = LabelledImageDataset(images, Resize(), 64_000_000, ColourModel.preprocess).__getitems__([0, 1, 2, 3])
    assert [n for n, _ in found] == [0] and [b["number"] for b in bad] == [1, 2, 3]
    assert [b["image"].rpartition("labels.jsonl ")[2] for b in bad] == ["line 2", "line 3", "line 5"]
    assert "json does not parse" in bad[0]["reason"] and "'image' should be a path" in bad[1]["reason"]
    assert "it is a URL" in bad[2]["reason"]
    with pytest.raises(UserError, match="has no image of split 'train'"):
        read_train_and_test(tmp_path, "val", "train")


def test_folder_that_is_neither_form(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_labelled(tmp_path / "nowhere", None)
    picture(tmp_path / "only" / "0.png", "red")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither labels.jsonl nor two folders"):
        read_labelled(tmp_path, None)
    with pytest.raises(UserError, match="no labels.jsonl next to it that could name the split 'val'"):
        read_labelled(tmp_path, "val")


def test_labelled_images_are_resized_and_broken_ones_named(tmp_path):
    for n, name in enumerate(NAMES[:3]):
        picture(tmp_path / f"{n}.png", name)
    (tmp_path / "1.png").write_bytes(b"no picture")
    labelled = [(tmp_path / f"{n}.png", n) for n in range(4)]  # the last is not there
    dataset = LabelledImageDataset(labelled, Resize(mode="squash"), 64_000_000, ColourModel.preprocess)
    found, bad = dataset.__getitems__([3, 2, 1, 0])
    good, pixels = zip(*found)
    assert good == (2, 0) and torch.stack(pixels).shape == (2, 3, 8, 8) and pixels[0].dtype == torch.uint8
    assert [b["number"] for b in bad] == [3, 1] and all(b["reason"] and b["image"] for b in bad)


def test_real_labels_are_read():
    if not (SHARED / "data" / "imagenette").is_dir():
        pytest.skip("the shared imagenette pictures are not here")
    train, val, classes = read_train_and_test(SHARED / "data" / "imagenette", "train", "val")
    assert len(train) == 2000 and len(val) == 1000 and len(classes) == 10 and "tench" in classes
    assert all(path.is_file() for path, _ in train + val)
