"""Accuracy of an image classifier, and fine-tuning it on labels of shards with mixup."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import COLOURS
from tests.tasks.fakes import NAMES, ColourModel, eval_model
from vlp.cli import main
from vlp.config import Data, Experiment, Training
from vlp.data.augment import Resize
from vlp.data.mixup import Mixup
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.errors import BadSample, UserError
from vlp.models.single import Single
from vlp.objectives.classification import Classification
from vlp.specs.json import dump
from vlp.tasks.image_accuracy import ImageAccuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Plain images of five colours with a labels.jsonl: 20 for training, also packed into ``shards``, and 10 for evaluation."""
    folder, rng, rows = tmp_path_factory.mktemp("classes"), np.random.default_rng(0), []
    for n in range(30):
        pixels = np.clip(np.array(COLOURS[NAMES[n % 5]]) + rng.integers(-9, 9, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        split = "train" if n < 20 else "val"
        rows.append({"image": f"{n}.png", "label": n % 5, "name": NAMES[n % 5], "split": split})
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", "pack", str(folder / "labels.jsonl"), str(folder / "shards"), "--split", "train"]) == 0
    return folder


class ColourClassifier(ColourModel):
    """Classifies colours correctly, except that red (0) is taken for green (1)."""

    num_classes = 5

    def classify(self, f):
        scores = f.image.embed[:, :5].clone()
        scores[:, 1] += 2 * scores[:, 0]
        return scores


def test_accuracy_is_the_share_of_correct_classes(folder):
    result = ImageAccuracy(data=str(folder), batch_size=7)(eval_model(ColourClassifier()))
    assert result.n == {"images": 10, "classes": 5} and result.metrics["top1"].value == 0.8
    assert result.details["confused"] == [{"true": "red", "guessed": "green", "count": 2, "of": 2}]
    with pytest.raises(UserError, match="needs an image tower with a classifier"):
        ImageAccuracy(data=str(folder))(eval_model(ColourModel()))


def test_labels_of_shards_are_those_of_the_named_field(folder):
    reader = Source(str(folder / "shards"), label="label").open()
    assert [reader.read(*reader.locate(n)).label for n in range(20)] == [n % 5 for n in range(20)]
    assert Source(str(folder / "shards")).open().read(0, 0).label is None
    with pytest.raises(BadSample, match="source is 'labels.jsonl:1', which is not a class number"):
        Source(str(folder / "shards"), label="source").open().read(0, 0)


def test_fine_tuning_with_mixup_learns_the_classes(folder, tmp_path):
    experiment = Experiment(
        name="classes",
        model=Single(image=TimmImage("test_vit", image_size=32), classes=5),
        objectives={"class": Classification(label_smoothing=0.1)},
        data=Data(
            train=(Source(str(folder / "shards"), label="label"),),
            batch_size=10,
            augment=Resize("squash"),
            resize=Resize("squash"),
            workers=0,
        ),
        train=Training(steps=40, mixup=Mixup(mixup=0.2, cutmix=0.0), ema_decay=0.8, layer_decay=0.9),
        evaluate={"image-accuracy": ImageAccuracy(data=str(folder), resamples=5)},
        output=str(tmp_path),
    )
    experiment = replace(experiment, optim=replace(experiment.optim, lr=2e-3))
    (tmp_path / "config.json").write_text(dump(experiment))
    assert main(["train", str(tmp_path / "config.json")]) == 0
    result = json.loads((tmp_path / "classes" / "eval" / "image-accuracy.json").read_text())
    assert result["metrics"]["top1"]["value"] > 0.6  # chance is 0.2
