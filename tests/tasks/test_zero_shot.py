"""Zero-shot classification with models of known answers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from timm.data import ImageNetInfo

from tests.conftest import COLOURS
from tests.tasks.fakes import NAMES, BlindModel, ColourModel, eval_model
from vlp.config import Data
from vlp.errors import UserError
from vlp.tasks.zero_shot import ZeroShot, class_names, templates_of

PROMPT = "a {} thing"


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 10, 3), COLOURS[colour], dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    for n in range(20):
        picture(tmp_path / NAMES[n % 5] / f"{n}.png", NAMES[n % 5])
    return tmp_path


@pytest.fixture
def labelled(tmp_path) -> Path:
    rows = []
    for n in range(20):
        picture(tmp_path / "images" / f"{n}.png", NAMES[n % 5])
        # numbers with gaps, and one wrong name of the last
        rows.append(
            {
                "image": f"images/{n}.png",
                "label": 10 * (n % 5),
                "name": NAMES[n % 5],
                "split": "val" if n < 15 else "train",
            }
        )
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_perfect_model_has_accuracy_one(folder, batch_size):
    result = ZeroShot(data=str(folder), prompts=PROMPT, batch_size=batch_size)(eval_model(ColourModel()))
    assert result.metrics["top1"].value == result.metrics["top1"].low == 1.0
    assert result.n == {"images": 20, "classes": 5, "prompts": 1}
    assert result.details["confusion"] == (4 * torch.eye(5, dtype=torch.int64)).tolist()
    assert result.details["classes"] == sorted(NAMES)
    assert "top5" not in result.metrics  # there are five classes


def test_blind_model_has_accuracy_zero(folder):
    """All classes tie, and ties count against, instead of the 20 % that the order of the classes would give."""
    assert ZeroShot(data=str(folder), prompts=PROMPT)(eval_model(BlindModel())).metrics["top1"].value == 0


def test_accuracy_is_the_share_of_correct_classes(labelled):
    """Three of the images have the label of another class."""
    lines = (labelled / "labels.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for n, wrong in ((0, 1), (6, 2), (12, 3)):
        rows[n] |= {"label": 10 * wrong, "name": NAMES[wrong]}
    (labelled / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = ZeroShot(data=str(labelled), prompts=PROMPT)(eval_model(ColourModel()))
    assert result.metrics["top1"].value == pytest.approx(17 / 20)
    assert result.metrics["top1"].low < 17 / 20 < result.metrics["top1"].high


def test_labels_file_with_a_split(labelled):
    assert ZeroShot(data=str(labelled), prompts=PROMPT)(eval_model(ColourModel())).n["images"] == 20
    result = ZeroShot(data=str(labelled), split="val", prompts=PROMPT)(eval_model(ColourModel()))
    assert result.n == {"images": 15, "classes": 5, "prompts": 1} and result.metrics["top1"].value == 1.0
    with pytest.raises(UserError, match="no image of split 'test'"):
        ZeroShot(data=str(labelled), split="test")(eval_model(ColourModel()))


def test_several_prompts_are_averaged_after_normalising(folder):
    """One of three prompts does not name a colour, and shifts all classes equally."""
    result = ZeroShot(data=str(folder), prompts="a {} thing|{}|the {}")(eval_model(ColourModel()))
    assert result.metrics["top1"].value == 1.0 and result.n["prompts"] == 3


def test_image_that_cannot_be_decoded_is_skipped_and_recorded(folder):
    (folder / "red" / "broken.png").write_bytes(b"no picture")
    result = ZeroShot(data=str(folder), prompts=PROMPT)(eval_model(ColourModel()))
    assert result.n["images"] == 20 and result.metrics["top1"].value == 1.0
    (bad,) = result.bad
    assert bad["image"].endswith("broken.png") and bad["reason"]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 21 images"):
        ZeroShot(data=str(folder), prompts=PROMPT)(eval_model(ColourModel()))


def test_imagenet_folders_have_the_names_of_open_clip():
    wnids = ImageNetInfo().label_names()
    assert class_names([wnids[0], wnids[1], wnids[999]], None) == [IMAGENET_CLASSNAMES[n] for n in (0, 1, 999)]
    assert class_names(["n01440764", "n03888257"], None) == ["tench", "parachute"]
    with pytest.raises(UserError, match="n99999999 are not among ImageNet's"):
        class_names(["n01440764", "n99999999"], None)


def test_other_folders_have_their_own_names_or_those_of_a_file(tmp_path):
    assert class_names(["golden_retriever", "cat"], None) == ["golden retriever", "cat"]
    (tmp_path / "names.json").write_text('{"a": "apple", "b": "banana"}')
    assert class_names(["b", "a"], str(tmp_path / "names.json")) == ["banana", "apple"]
    with pytest.raises(UserError, match="names no class for c"):
        class_names(["a", "c"], str(tmp_path / "names.json"))
    with pytest.raises(UserError, match="no such file"):
        class_names(["a"], str(tmp_path / "nowhere.json"))
    (tmp_path / "list.json").write_text('["a"]')
    with pytest.raises(UserError, match="is not an object"):
        class_names(["a"], str(tmp_path / "list.json"))


def test_named_templates_are_those_of_open_clip():
    assert len(templates_of("openai")) == 80
    assert [t.replace("{}", "dog") for t in templates_of("openai")] == [t("dog") for t in OPENAI_IMAGENET_TEMPLATES]
    assert len(templates_of("simple")) == 7 and set(templates_of("simple")) <= set(templates_of("openai"))
    cifar = templates_of("cifar")
    assert len(set(cifar)) == 18 and cifar[:2] == ["a photo of a {}.", "a blurry photo of a {}."]
    assert cifar[8:11] == ["a photo of a big {}.", "a photo of the {}.", "a blurry photo of the {}."]
    with pytest.raises(UserError, match="the named sets are openai, simple, cifar, photo"):
        templates_of("clip")


def test_numbered_folders_of_imagenet_v2():
    names = class_names(sorted(map(str, range(1000))), None)
    assert (
        names[0] == IMAGENET_CLASSNAMES[0]
        and names[1] == IMAGENET_CLASSNAMES[1]
        and names[2] == IMAGENET_CLASSNAMES[10]
    )
    assert class_names(["0", "1"], None) == ["0", "1"]  # e.g. digits, which are not ImageNet classes


def test_run_with_one_tower_is_refused(folder):
    task = ZeroShot(data=str(folder), prompts=PROMPT)
    with pytest.raises(UserError, match="needs a text tower"):
        task(replace(eval_model(ColourModel()), tokenizer=None))
    with pytest.raises(UserError, match="needs a text tower"):
        task.validate(Data(train=()))
    task.validate(Data(train=(), tokenizer="anything"))

    class TextModel(ColourModel):
        preprocess = None

    with pytest.raises(UserError, match="needs an image tower"):
        task(eval_model(TextModel()))
