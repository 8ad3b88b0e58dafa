"""Classification of lines about one or two images, against a reference that scores one line at a time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.objectives.fusing import tiny
from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.image import decode
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.shards import ShardReader
from vlp.data.text import train_tokenizer
from vlp.data.world import World, make
from vlp.encoders.fusion import AlternatingImages, Fusion
from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.tasks.base import EvalModel
from vlp.tasks.pair_classification import PairClassification

FALSE_TRUE = ("false", "true")
ONE = tiny(itc=False, itm=False, mlm=False, classes=2)
TWO = replace(ONE, fusion=Fusion(layers=2, images=2))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "world", World(), train=80, val=60)


def lines(world, name, split="val"):
    read = map(json.loads, (world / f"{name}.jsonl").read_text().splitlines())
    return [line for line in read if line["split"] == split]


def source(world, name, split="train"):
    image = ("image0", "image1") if name == "pairs" else ("key",)
    path, images = str(world / f"{name}.jsonl"), str(world / split)
    return Annotated(path, images, image, label="answer", classes=FALSE_TRUE, split=split)


def eval_model(world, name, spec):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([line["text"] for line in lines(world, name)], 99, min_frequency=1)
    model = spec.build()
    for parameter in (*model.fusion.parameters(), *model.classifier.parameters()):
        torch.nn.init.normal_(parameter, std=0.6)  # the initial weights give nearly equal logits
    data = Data(train=(source(world, name),), max_length=32, workers=0, resize=Resize(mode="squash"))
    return EvalModel(model, tokenizer, data, torch.device("cpu"))


def task(world, **fields):
    return PairClassification(
        **({"split": "val", "images": str(world / "val"), "batch_size": 7, "resamples": 20} | fields)
    )


def one_by_one(model, world, given, fields):
    """Compute the (n,) difference of the two logits, one line at a time."""
    reader = ShardReader(str(world / "val"))
    images = {s.key: s.image for s in (reader.read(*reader.locate(n)) for n in range(len(reader)))}
    network, differences = model.model.eval(), []
    with torch.no_grad():
        for line in given:
            seen = []
            for field in fields:
                pixels = Resize(mode="squash")(decode(images[line[field]]), (32, 32), "bicubic")
                seen.append(network.project(network.encode_image(model.preprocess.normalise(pixels[None]))))
            ids, mask, _ = model.tokenizer([line["text"]], 32)
            image = AlternatingImages(tuple(seen)) if len(seen) > 1 else seen[0]
            no, yes = network.classifier(network.fuse(image, network.encode_text(ids, mask))[0, 0]).tolist()
            differences.append(yes - no)
    network.train()
    return np.array(differences)


@pytest.mark.parametrize(
    ("name", "spec", "fields"), [("statements", ONE, ("key",)), ("pairs", TWO, ("image0", "image1"))]
)
def test_every_line_is_scored_once_independently_of_its_batch(world, name, spec, fields):
    model, given = eval_model(world, name, spec), lines(world, name)
    difference = one_by_one(model, world, given, fields)
    middle = np.sort(difference)[len(difference) // 2 - 1 :][:2].mean()
    model.model.classifier[2].bias.data[0] += middle  # without it a random model predicts one class nearly everywhere
    predicted, labels = (difference > middle).astype(int), np.array([line["answer"] for line in given]).astype(int)
    assert 0.3 < predicted.mean() < 0.7
    one, other = (task(world, batch_size=size)(model) for size in (7, 1000))
    assert one.metrics == other.metrics and one.details == other.details and not one.bad
    assert one.metrics["accuracy"].value == pytest.approx((predicted == labels).mean())
    for label, class_name in enumerate(FALSE_TRUE):
        assert one.metrics[f"accuracy_{class_name}"].value == pytest.approx(
            (predicted == labels)[labels == label].mean()
        )
    confusion = [[int(((labels == a) & (predicted == b)).sum()) for b in (0, 1)] for a in (0, 1)]
    assert one.details["confusion"] == confusion
    first_wrong = int((predicted != labels).nonzero()[0][0])
    assert one.details["wrong"][0]["text"] == given[first_wrong]["text"]
    assert one.n == {"lines": len(given), "images": len({line[fields[0]] for line in given}), "classes": 2}


@pytest.mark.parametrize(("name", "spec"), [("statements", ONE), ("pairs", TWO)])
def test_text_only_baseline_of_a_balanced_world_is_exactly_one_half(world, name, spec):
    metrics = task(world)(eval_model(world, name, spec)).metrics
    assert metrics["text_only"].value == 0.5 and metrics["majority"].value == 0.5
    assert metrics["gain"].value == pytest.approx(metrics["accuracy"].value - 0.5)


def test_accuracy_by_a_field_of_the_lines(world):
    model, given = eval_model(world, "pairs", TWO), lines(world, "pairs")
    metrics = task(world, by="kind", baseline=False)(model).metrics
    assert "text_only" not in metrics
    kinds = [line["kind"] for line in given]
    parts = [metrics[f"kind_{kind}"].value * kinds.count(kind) for kind in sorted(set(kinds))]
    assert sum(parts) / len(given) == pytest.approx(metrics["accuracy"].value)


def test_submission_has_the_format_of_nlvr2(world, tmp_path):
    model, given = eval_model(world, "pairs", TWO), lines(world, "pairs")
    named = [line | {"identifier": f"dev-{n}"} for n, line in enumerate(given)]
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out" / "predictions.csv"

    def asked() -> PairClassification:
        path.write_text("".join(json.dumps(line) + "\n" for line in named))
        return task(world, data=str(path), submission=str(out), baseline=False)

    result = asked()(model)
    rows = [row.split(",") for row in out.read_text().splitlines()]
    assert [name for name, _ in rows] == [line["identifier"] for line in named]
    correct = [predicted == str(line["answer"]).lower() for (_, predicted), line in zip(rows, named)]
    assert sum(correct) / len(correct) == pytest.approx(result.metrics["accuracy"].value)
    named[3] = {key: value for key, value in named[3].items() if key != "identifier"}
    with pytest.raises(UserError, match="needs identifier in every line, each once"):
        asked().validate(model.data)


def test_fields_can_be_given_for_weights_without_a_run(world):
    model = eval_model(world, "pairs", TWO)
    expected = task(world, baseline=False)(model)
    fields = {
        "image": ("image0", "image1"),
        "label": "answer",
        "classes": FALSE_TRUE,
        "data": str(world / "pairs.jsonl"),
    }
    without_run = replace(model, data=replace(model.data, train=()))
    found = task(world, **fields)(without_run)
    assert found.metrics == expected.metrics and found.n == expected.n
    with pytest.raises(UserError, match="give label=FIELD classes=A,B"):
        task(world, data=fields["data"]).validate(without_run.data)


def test_images_without_a_text_can_be_classified(world, tmp_path):
    path = tmp_path / "colours.jsonl"
    path.write_text(
        "\n".join(json.dumps({"key": line["key"], "answer": n % 3}) for n, line in enumerate(lines(world, "grounding")))
    )
    given = Annotated(str(path), str(world / "val"), ("key",), text=None, label="answer", classes=("0", "1", "2"))
    torch.manual_seed(0)
    model = Single(image=TimmImage("test_vit", image_size=32), classes=3).build()
    model = EvalModel(model, None, Data(train=(given,), workers=0), torch.device("cpu"))
    result = PairClassification(data=str(path), images=str(world / "val"), resamples=10)(model)
    assert "text_only" not in result.metrics and 0 < result.metrics["accuracy"].value < 1


def test_mistakes_are_user_errors(world, tmp_path):
    model = eval_model(world, "statements", ONE)
    with pytest.raises(UserError, match="give data=ANNOTATIONS"):
        PairClassification().validate(Data(train=()))
    unlabelled = replace(model.data, train=(replace(model.data.train[0], label=None, classes=()),))
    with pytest.raises(UserError, match="have no classes"):
        task(world).validate(unlabelled)
    with pytest.raises(UserError, match="train one with model.classes=C"):
        task(world)(replace(model, model=tiny().build()))
    three = (replace(model.data.train[0], classes=("false", "true", "maybe")),)
    with pytest.raises(UserError, match="the model has 2 classes and the data 3"):
        task(world)(replace(model, data=replace(model.data, train=three)))
    path = tmp_path / "wrong.jsonl"
    given = lines(world, "statements")[:3]
    path.write_text("\n".join(json.dumps(line | {"answer": "perhaps"}) for line in given))
    with pytest.raises(UserError, match="3 were skipped"):
        task(world, data=str(path), split=None)(model)
    path.write_text("\n".join([json.dumps(given[0] | {"answer": "perhaps"}), json.dumps(given[1])]))
    result = task(world, data=str(path), split=None)(model)
    assert result.n["lines"] == 1 and [bad["key"] for bad in result.bad] == ["1"]
