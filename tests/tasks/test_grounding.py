"""Grounding: closed forms of the scores, and known heat maps on a synthetic world."""

import json

import numpy as np
import pytest
import torch

from tests.objectives.fusing import tiny
from vlp.config import Data
from vlp.data.reading.shards import RawSample
from vlp.data.text import train_tokenizer
from vlp.data.world import World, make
from vlp.errors import BadSample, UserError
from vlp.tasks import grounding
from vlp.tasks.base import EvalModel
from vlp.tasks.grounding import Grounding, choose_box, contains, intersection_over_union, points_into, read_box


def heat_at(x, y, height=10, width=12):
    heat = torch.zeros(height, width)
    heat[y, x] = 1.0
    return heat


@pytest.mark.parametrize(
    ("x", "y", "hit"), [(3, 2, True), (2, 2, False), (5, 2, True), (6, 2, False), (3, 6, False), (5, 5, True)]
)
def test_pointing_hits_if_the_maximum_is_in_the_box(x, y, hit):
    assert points_into(heat_at(x, y), (3, 2, 3, 4)) is hit


def test_flat_map_misses():
    assert not points_into(torch.zeros(10, 12), (0, 0, 12, 10)) and not points_into(torch.ones(10, 12), (0, 0, 12, 10))


def test_random_maps_hit_in_proportion_to_the_area_of_the_box():
    generator = torch.Generator().manual_seed(0)
    box = (2, 3, 5, 4)
    hits = [points_into(torch.rand(10, 12, generator=generator), box) for _ in range(4000)]
    assert abs(np.mean(hits) - 20 / 120) < 0.02


def test_chosen_box_has_the_most_heat_per_root_of_its_area():
    heat = torch.rand(20, 30, generator=torch.Generator().manual_seed(1))
    boxes = [(0, 0, 30, 20), (3, 4, 6, 5), (10.5, 2.5, 8.2, 9.9), (25, 15, 40, 40), (-3, -2, 9, 7)]
    scores = []
    for left, top, width, height in boxes:
        total = 0.0
        for y in range(20):
            for x in range(30):
                if max(int(left), 0) <= x < int(left + width) and max(int(top), 0) <= y < int(top + height):
                    total += float(heat[y, x])
        scores.append(total / (width * height) ** 0.5)
    assert choose_box(heat, boxes, 0.5) == int(np.argmax(scores))
    assert choose_box(heat, boxes, 0.0) == 0 and choose_box(heat_at(4, 5), [(0, 0, 12, 10), (4, 5, 1, 1)], 1.0) == 1
    assert choose_box(-torch.ones(10, 12), [(0, 0, 9, 9), (0, 0, 2, 2)], 0.5) == 1  # below the published start at 0


def test_intersection_over_union_equals_that_of_pixel_masks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = ([int(v) for v in (*rng.integers(0, 8, 2), *rng.integers(1, 8, 2))] for _ in range(2))
        masks = np.zeros((2, 20, 20), bool)
        for mask, (left, top, width, height) in zip(masks, (a, b)):
            mask[top : top + height, left : left + width] = True
        assert intersection_over_union(a, b) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())


@pytest.mark.parametrize("box", [None, "1,2,3,4", [1, 2, 3], [1, 2, 0, 4], [1, 2, 3, float("nan")], [1, 2, 3, "4"]])
def test_invalid_box_is_a_bad_sample(box):
    with pytest.raises(BadSample, match="left, top, width, height"):
        read_box(box)


def test_proposals_must_be_a_list():
    line = RawSample("1", 0, 0, 0, None, ("x",), 0, {"box": [1, 2, 3, 4], "proposals": 5})
    with pytest.raises(BadSample, match="proposals are 5, not a list of boxes"):
        Grounding()._score(line, (8, 8), torch.ones(2, 2))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "world", World(), train=2, val=20)


def lines(world, split="val"):
    read = map(json.loads, (world / "grounding.jsonl").read_text().splitlines())
    return [line for line in read if line["split"] == split]


@pytest.fixture
def subject(world):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([line["text"] for line in lines(world)], 60, min_frequency=1)
    return EvalModel(tiny().build(), tokenizer, Data(train=(), max_length=24, workers=0), torch.device("cpu"))


def task(world, **fields):
    where = {"data": str(world / "grounding.jsonl"), "images": str(world / "val"), "image": "key"}
    return Grounding(**(where | {"batch_size": 3, "resamples": 10} | fields))


def known_maps(world, subject, wrong=False):
    """Return a stand-in for Grad-CAM with heat at the centre of the named object, or, if ``wrong``, of another object."""
    places = {}
    for line in lines(world):
        box = next(p for p in line["proposals"] if (p == line["box"]) != wrong)
        ids = tuple(subject.tokenizer.rows([line["text"]])[0])
        places.setdefault(ids, []).append(box)

    def grad_cam(model, image, text, layer, images):
        cam = torch.zeros(*text.mask.shape, 64, 64)
        for row, ids in enumerate(model.read):
            left, top, width, height = places[ids].pop(0)
            cam[row, :, top + height // 2, left + width // 2] = 1.0
        return cam

    return grad_cam


@pytest.mark.parametrize("wrong", [False, True])
def test_maps_at_the_object_score_one_and_maps_at_another_object_below_a_half(world, subject, monkeypatch, wrong):
    encode = subject.model.encode_text

    def reading(ids, mask):
        subject.model.read = [tuple(row[m].tolist()) for row, m in zip(ids, mask)]
        return encode(ids, mask)

    monkeypatch.setattr(subject.model, "encode_text", reading)
    monkeypatch.setattr(grounding, "grad_cam", known_maps(world, subject, wrong))
    result = task(world, blind=False)(subject)
    given = lines(world)
    assert result.n == {"phrases": len(given), "images": 20, "with proposals": len(given)} and not result.bad
    found = {name: metric.value for name, metric in result.metrics.items()}
    chance = [line["box"][2] * line["box"][3] / 64**2 for line in given]
    assert found["pointing_chance"] == pytest.approx(np.mean(chance))
    assert found["pointing_centre"] == pytest.approx(np.mean([contains(line["box"], 32, 32) for line in given]))
    assert found["accuracy_best"] == 1.0
    assert found["accuracy_chance"] == pytest.approx(np.mean([1 / len(line["proposals"]) for line in given]))
    if wrong:
        inside = [
            contains(line["box"], *_centre(next(p for p in line["proposals"] if p != line["box"]))) for line in given
        ]
        assert found["pointing"] == pytest.approx(np.mean(inside)) and found["pointing"] < 0.5
        assert found["accuracy"] < 0.5
    else:
        assert found["pointing"] == 1.0 and found["accuracy"] > 0.9  # a small object may lie inside a large one


def _centre(box):
    return box[0] + box[2] // 2 + 0.5, box[1] + box[3] // 2 + 0.5


@pytest.mark.parametrize("layer", [None, 0])
def test_scores_of_a_model_do_not_depend_on_the_batch_size(world, subject, layer):
    one, other = (task(world, batch_size=size, layer=layer)(subject) for size in (3, 20))
    assert one.metrics == other.metrics and one.blind == other.blind != {} and 0 < one.metrics["pointing"].value < 1
    assert f"layer {1 if layer is None else 0}" in one.protocol or layer is None
    assert subject.model.training


def test_lines_without_a_box_or_an_image_are_skipped_and_recorded(world, subject, tmp_path):
    given = lines(world)[:4]
    given[0]["box"] = [1, 2, 3]
    given[1]["key"] = "nowhere"
    del given[2]["proposals"]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, given)))
    result = task(world, data=str(path))(subject)
    images = {line["key"] for line in given[2:]}
    assert result.n == {"phrases": 2, "images": len(images), "with proposals": 1}
    assert sorted(bad["key"] for bad in result.bad) == ["1", "2"]
    path.write_text(json.dumps(given[0]))
    with pytest.raises(UserError, match="1 were skipped"):
        task(world, data=str(path))(subject)
    with pytest.raises(UserError, match="give data=BOXES.jsonl"):
        Grounding().validate(Data(train=()))
