"""Folders of classes as people have them: splits, empty classes, other formats, and strays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cases.inputs import image_bytes
from tests.tasks.fakes import ColourModel, eval_model
from tests.tasks.test_zero_shot import PROMPT, picture
from vlp.data.augment import Resize
from vlp.data.reading.labelled import LabelledImageDataset, read_labelled, read_pixels, read_train_and_test
from vlp.errors import BadSample, UserError
from vlp.tasks.zero_shot import ZeroShot


def write(folder, **classes: dict[str, bytes] | int) -> None:
    """Folders of classes: so many images each, or these files."""
    for name, files in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, data in (
            {f"{n}.jpg": image_bytes(n) for n in range(files)} if isinstance(files, int) else files
        ).items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_bytes(data)


def test_zs_imagenette_readme(tmp_path):
    """train/ and val/ of classes: never the classes train and val."""
    for split in ("train", "val"):
        write(tmp_path / split, n01440764=2, n02102040=2, n02979186=2)
    with pytest.raises(UserError, match="has the splits train, val, each with a folder per class; give split=val"):
        read_labelled(tmp_path, None)
    images, classes = read_labelled(tmp_path, "val")
    assert len(images) == 6 and classes == ["n01440764", "n02102040", "n02979186"]
    assert read_labelled(tmp_path / "val", None)[1] == classes


def test_a_class_may_be_called_train(tmp_path):
    """CIFAR-100 has one: its folder has images, and not folders."""
    write(tmp_path, train=2, bus=2)
    assert read_labelled(tmp_path, None)[1] == ["bus", "train"]


@pytest.mark.parametrize("files", [{}, {"0.bmp": b"BM", "1.bmp": b"BM"}, {"0.gif": b"GIF89a"}, {"notes.txt": b""}])
def test_zs_empty_class(tmp_path, files):
    """A class of which no image can be read is one to choose from, and its images are counted."""
    write(tmp_path, bird=files, cat=3, dog=3)
    images, classes = read_labelled(tmp_path, None)
    assert classes == ["bird", "cat", "dog"] and {n for path, n in images if path.suffix == ".jpg"} == {1, 2}
    dataset = LabelledImageDataset(images, Resize(), 10_000, ColourModel.preprocess)
    good, bad = dataset.__getitems__(range(len(images)))
    assert len(good) == 6 and len(bad) == sum(not name.endswith("txt") for name in files)


def test_strays_of_archives_and_systems_are_no_classes(tmp_path):
    write(
        tmp_path,
        cat=2,
        dog=2,
        __MACOSX={"._0.jpg": b"", "cat/._0.jpg": b""},
        **{"lost+found": 1, ".git": 1, "@eaDir": 1},
    )
    write(tmp_path / "cat", **{"@eaDir": 3, ".thumbnails": 3})
    (tmp_path / "cat" / "._0.jpg").write_bytes(b"")
    images, classes = read_labelled(tmp_path, None)
    assert classes == ["cat", "dog"] and len(images) == 4


def test_a_stray_folder_among_imagenets_classes_is_named(tmp_path):
    """It would turn the names of all classes into WordNet ids."""
    write(tmp_path, n01440764=2, n02102040=2, extra=1)
    with pytest.raises(UserError, match="has the folder 'extra' among 2 that are WordNet ids; move it out"):
        read_labelled(tmp_path, None)


def test_a_split_without_images_of_a_class_keeps_the_class(tmp_path):
    rows = [("a", 0, "cat", "train"), ("b", 1, "dog", "train"), ("c", 2, "bird", "train"), ("d", 2, "bird", "val")]
    keys = ("image", "label", "name", "split")
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    assert read_labelled(tmp_path, "val") == ([(tmp_path / "d", 2)], ["cat", "dog", "bird"])


def test_labels_blank_line(tmp_path):
    rows = [{"image": f"{n}.jpg", "label": n, "name": "ab"[n]} for n in range(2)]
    (tmp_path / "labels.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, rows)) + "\n \n")
    assert read_labelled(tmp_path, None) == ([(tmp_path / "0.jpg", 0), (tmp_path / "1.jpg", 1)], ["a", "b"])


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.jpg", "label": True},
        {"image": "a.jpg", "label": 1.5},
        {"image": "a.jpg", "label": None},
        {"image": ["a.jpg"], "label": 1},
        {"image": None, "label": 1},
        {"image": "a\0.jpg", "label": 1},
        {"image": "a.jpg", "label": 1, "name": ["cat"]},
    ],
    ids=str,
)
def test_labels_of_another_type_are_named_with_their_line(tmp_path, row):
    (tmp_path / "labels.jsonl").write_text(json.dumps({"image": "b.jpg", "label": 0}) + "\n" + json.dumps(row) + "\n")
    images, classes = read_labelled(tmp_path, None)
    assert images[0] == (tmp_path / "b.jpg", 0) and classes == ["0"] and len(images) == 2
    assert str(images[1][0]) == f"{tmp_path}/labels.jsonl line 2"
    with pytest.raises(
        BadSample, match="expected an object with image, label and name; '(image|label|name)' should be"
    ):
        read_pixels(images[1][0], 64_000_000)


def test_a_label_with_two_names_is_refused_and_one_without_a_name_is_its_number(tmp_path):
    rows = [{"image": "a.jpg", "label": 3, "name": None}, {"image": "b.jpg", "label": "4"}]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_labelled(tmp_path, None)[1] == ["3", "4"]
    rows += [{"image": "c.jpg", "label": 4, "name": "cat"}]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="label 4 has the names '4' and 'cat'"):
        read_labelled(tmp_path, None)


def test_one_image_in_two_splits_is_found_in_any_spelling(tmp_path):
    rows = [("a.jpg", 0, "x", "train"), ("b.jpg", 1, "y", "train"), ("./a.jpg", 0, "x", "val")]
    keys = ("image", "label", "name", "split")
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    with pytest.raises(UserError, match="a.jpg is in both 'train' and 'val'"):
        read_train_and_test(tmp_path, "train", "val")


def test_of_two_classes_with_one_name_the_first_is_the_prediction(tmp_path):
    """ImageNet has two cranes. Their scores always tie; argmax, and so every published number, takes the first."""
    rows = []
    for n, (label, colour) in enumerate([(0, "red"), (1, "green"), (2, "red"), (3, "blue")]):
        picture(tmp_path / f"{n}.png", colour)
        rows.append({"image": f"{n}.png", "label": label, "name": colour})
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = ZeroShot(data=str(tmp_path), prompts=PROMPT, resamples=0).evaluate(eval_model(ColourModel()))
    assert result.metrics["top1"].value == 3 / 4  # all but the second red
    rows[2]["label"] = 0
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        replace(ZeroShot(data=str(tmp_path), prompts=PROMPT), resamples=0)
        .evaluate(eval_model(ColourModel()))
        .metrics["top1"]
        .value
        == 1
    )


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "imagenette", cat=1, dog=1)
    assert read_labelled(Path("~/imagenette"), None)[1] == ["cat", "dog"]
