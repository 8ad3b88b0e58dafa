"""The synthetic world: what is said can be read off the pixels, and no cheap trick tells minimal pairs apart."""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlp.commands.world import add_parsers
from vlp.data.image import decode
from vlp.data.reading.labelled import read_labelled
from vlp.data.reading.shards import ShardReader
from vlp.data.world import Scene, World, make, make_single
from vlp.data.world.scenes import COLOURS, SIDES
from vlp.data.world.shapes import CONVEX, OUTLINES, sprite
from vlp.errors import UserError

WORLDS = {
    "default": World(),
    "100 pixels": World(size=100),
    "three things": World(size=128, objects=(3,)),
    "six things": World(size=96, objects=(5, 6), relations=("left of", "above")),
    "seen": World(combinations="seen"),
    "novel": World(combinations="novel"),
    "stars and crosses": World(objects=(2,), shapes=("star", "cross"), relations=("left of",)),
}

# drawn by another hand: corners in a square of side 1
STAR = [(0.5 + r * np.sin(a), 0.5 - r * np.cos(a)) for r, a in zip([0.5, 0.225] * 5, np.arange(10) * np.pi / 5)]
CROSS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
REFERENCE = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": CROSS,
    "star": STAR,
}


def reference(shape: str) -> np.ndarray:
    """(96, 96) bool, the shape filling it."""
    image = Image.new("1", (400, 400))
    if shape == "circle":
        ImageDraw.Draw(image).ellipse((0, 0, 399, 399), fill=1)
    else:
        corners = np.array(REFERENCE[shape], float)
        corners = (corners - corners.min(0)) / (corners.max(0) - corners.min(0)) * 399
        ImageDraw.Draw(image).polygon([tuple(c) for c in corners], fill=1)
    return np.array(image.resize((96, 96)))


REFERENCES = {shape: reference(shape) for shape in OUTLINES}


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), inclusive"""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return columns[0], rows[0], columns[-1], rows[-1]


def within(a: np.ndarray, b: np.ndarray) -> bool:
    (left_a, top_a, right_a, bottom_a), (left_b, top_b, right_b, bottom_b) = box(a), box(b)
    return left_b <= left_a and top_b <= top_a and right_a <= right_b and bottom_a <= bottom_b


def name_of(mask: np.ndarray) -> str:
    left, top, right, bottom = box(mask)
    cut = Image.fromarray(mask[top : bottom + 1, left : right + 1]).resize((96, 96))
    return max(REFERENCES, key=lambda s: (REFERENCES[s] & cut).sum() / (REFERENCES[s] | cut).sum())


Seen = list[tuple[str, np.ndarray]]


def see(image: np.ndarray) -> Seen:
    """("small red circle", its pixels) of everything in the image, what is covered too."""
    shades, which = np.unique(image @ np.array([65536, 256, 1]), return_inverse=True)
    which = which.reshape(image.shape[:2])
    background = np.bincount(which.ravel()).argmax()
    masks = [which == n for n in range(len(shades)) if n != background]
    seen = []
    for mask in masks:
        whole = mask.copy()
        for other in masks:
            if other is not mask and within(other, mask):
                whole |= other
        size = "small" if whole.sum() < (0.2 * len(image)) ** 2 else "large"
        rgb = image[mask][0].astype(int)
        colour = min(COLOURS, key=lambda c: np.abs(np.array(COLOURS[c]) - rgb).sum())
        seen.append((f"{size} {colour} {name_of(whole)}", whole))
    return seen


def related(a: np.ndarray, b: np.ndarray) -> str | None:
    """How a is to b, from their pixels; None = neither clearly."""
    if within(a, b) or within(b, a):
        return "inside" if within(a, b) else "around"
    (left_a, top_a, right_a, bottom_a), (left_b, top_b, right_b, bottom_b) = box(a), box(b)
    dy, dx = np.argwhere(b).mean(0) - np.argwhere(a).mean(0)
    if abs(dx) > 1.5 * abs(dy):
        return "left of" if right_a < left_b else "right of" if right_b < left_a else None
    if abs(dy) > 1.5 * abs(dx):
        return "above" if bottom_a < top_b else "below" if bottom_b < top_a else None
    return None


RELATIONS = "left of|right of|above|below|inside|around"


def is_true(text: str, seen: Seen) -> bool:
    """Whether "a ... RELATION a ... (that is RELATION a ...)" is there to be seen."""
    parts = re.split(f" (?:that is )?({RELATIONS}) ", text)
    chains = [[mask] for name, mask in seen if fits(parts[0], name)]
    for relation, thing in zip(parts[1::2], parts[2::2]):
        chains = [
            [*chain, mask]
            for chain in chains
            for name, mask in seen
            if fits(thing, name) and mask is not chain[-1] and related(chain[-1], mask) == relation
        ]
    return bool(chains)


def fits(text: str, name: str) -> bool:
    article, *words = text.split()
    assert article == ("an" if words[0][0] in "aeiou" else "a")
    return set(words) <= set(name.split())


@pytest.fixture(scope="module", params=WORLDS)
def world(request) -> World:
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def pairs(world) -> list[tuple[Scene, Scene]]:
    return [(world.scene(7, 2 * n), world.scene(7, 2 * n + 1)) for n in range(60)]


def test_captions_and_statements_are_true_of_the_pixels_and_those_of_the_minimal_pair_false(pairs):
    for pair in pairs:
        for own, other in (pair, pair[::-1]):
            seen = see(own.image)
            assert [is_true(c, seen) for c in own.captions] == [True, True], own.captions
            assert [is_true(c, seen) for c in other.captions] == [False, False], (own.captions, other.captions)
            for statement, answer in own.statements:
                assert is_true(statement.removeprefix("there is "), seen) is answer, (statement, own.captions)
            for question, answer in own.questions[:2]:
                text = question.removeprefix("is there ").removesuffix("?")
                assert is_true(text, seen) is (answer == "yes"), (question, own.captions)


def test_answers_are_true_of_the_pixels(pairs):
    for scene in (s for pair in pairs for s in pair):
        seen = {word: (name.split(), mask) for name, mask in see(scene.image) for word in name.split()[1:]}
        for question, answer in scene.questions[2:]:
            if match := re.fullmatch(r"what (colour|size) is the (\w+)\?", question):
                size, colour, _ = seen[match[2]][0]
                assert answer == {"colour": colour, "size": size}[match[1]]
            elif match := re.fullmatch(r"what shape is the (\w+) thing\?", question):
                assert answer == seen[match[1]][0][2]
            else:
                match = re.fullmatch(r"where is the (\w+), seen from the (\w+)\?", question)
                assert answer == related(seen[match[1]][1], seen[match[2]][1])


def test_a_bag_of_words_and_a_histogram_are_the_same_for_both_of_a_minimal_pair(pairs):
    for own, other in pairs:
        assert own.captions != other.captions
        for a, b in zip(own.captions, other.captions):
            assert a != b and Counter(a.split()) == Counter(b.split())
        assert (own.minimal_pair, other.minimal_pair) == (other.captions[0], own.captions[0])
        colours = [np.unique(s.image @ np.array([65536, 256, 1]), return_counts=True) for s in (own, other)]
        assert all((a == b).all() for a, b in zip(*colours))
        assert (own.image != other.image).any()


def test_text_only_accuracy_is_one_half(pairs):
    """Whatever is said or asked with yes or no of the one is said or asked of the other, with the opposite answer."""
    opposite = {True: False, False: True, "yes": "no", "no": "yes"}
    for own, other in pairs:
        assert {s: opposite[a] for s, a in own.statements} == dict(other.statements)
        assert sum(a for _, a in own.statements) * 2 == len(own.statements) == len(dict(own.statements))
        assert {q: opposite[a] for q, a in own.questions[:2]} == dict(other.questions[:2])
        assert {q for q, _ in own.questions} == {q for q, _ in other.questions}
        assert dict(own.questions) != dict(other.questions)


def test_all_shapes_colours_and_relations_are_drawn(world, pairs):
    scenes = [s for pair in pairs for s in pair]
    answers = {a for s in scenes for _, a in s.questions}
    assert answers == set(world.answers) and len(set(world.answers)) == len(world.answers)
    assert {s.contrast for s in scenes} == {"order", "shape", "colour"}


def test_no_thing_has_another_ones_colour_or_shape(pairs):
    for scene in (s for pair in pairs for s in pair):
        assert len({t.shape for t in scene.things}) == len({t.colour for t in scene.things}) == len(scene.things)
        names = Counter(f"{t.size} {t.colour} {t.shape}" for t in scene.things)
        assert names == Counter(name for name, _ in see(scene.image))


def test_a_scene_is_a_function_of_seed_and_number():
    world, again = World(), World()
    scenes = [world.scene(3, n) for n in range(20)]
    for n in reversed(range(20)):
        scene = again.scene(3, n)
        assert (scene.image == scenes[n].image).all() and scene.image.dtype == np.uint8
        assert scene.captions == scenes[n].captions and scene.questions == scenes[n].questions
    assert len({s.image.tobytes() for s in scenes}) == 20
    assert not {s.image.tobytes() for s in scenes} & {world.scene(4, n).image.tobytes() for n in range(20)}


@pytest.mark.parametrize("side", [*range(8, 20), 35, 69])
def test_all_shapes_of_a_side_have_as_many_pixels(side):
    for shape in OUTLINES:
        assert sprite(shape, side).mask.sum() == side * side
        assert name_of(sprite(shape, side).mask) == shape
        left, top, right, bottom = sprite(shape, side).box
        assert -side < left < 0 < right <= side and -side < top < 0 < bottom <= side


@pytest.mark.parametrize("size", [*range(64, 130), 256])
def test_small_shape_fits_into_every_large_one(size):
    def drawn(shape, side):
        cut, canvas = sprite(shape, side), np.zeros((2 * size, 2 * size), bool)
        left, top, right, bottom = cut.box
        canvas[size + top : size + bottom, size + left : size + right] = cut.mask
        return canvas

    for outer in CONVEX:
        hole = drawn(outer, round(SIDES["large"] * size))
        for inner in set(CONVEX) - {outer}:
            assert not (drawn(inner, round(SIDES["small"] * size)) & ~hole).any()


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"size": 32}, "size from 64"),
        ({"objects": (7,)}, "objects=.7,. of the world"),
        ({"objects": (5,)}, "5 things of different shape and colour"),
        ({"objects": ()}, "objects"),
        ({"shapes": ("circle", "heptagon", "star")}, "shapes=.* give some of circle"),
        ({"colours": ("red", "red", "blue")}, "each once"),
        ({"relations": ("below",)}, "relations"),
        ({"colours": ("red", "blue")}, "3 things of different shape and colour"),
        ({"shapes": ("star", "cross", "circle")}, "with the relation inside, only circle, square"),
        ({"relations": ("inside",)}, "inside each other"),
    ],
)
def test_impossible_world_is_refused(fields, complaint):
    with pytest.raises(UserError, match=complaint):
        World(**fields)


SIZES = {"train": 40, "val": 12, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "world", noise=0.3, **SIZES)


def samples(folder: Path, split: str) -> dict:
    reader = ShardReader(str(folder / split))
    return {s.key: s for s in (reader.read(0, n) for n in range(SIZES[split]))}


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_shards_hold_the_scenes(folder):
    for split in ("train", "val"):
        for sample in samples(folder, split).values():
            scene = World().scene(5, sample.meta["number"])
            assert (decode(sample.image) == scene.image).all()
            assert sample.meta["minimal_pair"] == scene.minimal_pair and sample.meta["contrast"] == scene.contrast
            assert [t["shape"] for t in sample.meta["things"]] == [t.shape for t in scene.things]
            if sample.meta["captions_of"] == sample.key:
                assert sample.captions == scene.captions


def test_noise_swaps_captions_only_in_train_and_records_it(folder):
    train = samples(folder, "train")
    swapped = {key: s.meta["captions_of"] for key, s in train.items() if s.meta["captions_of"] != key}
    assert len(swapped) == 12 and set(swapped) == set(swapped.values())
    for key, of in swapped.items():
        assert train[key].captions == World().scene(5, train[of].meta["number"]).captions
    assert all(s.meta["captions_of"] == key for key, s in samples(folder, "val").items())


def test_less_noise_is_a_subset_and_fewer_scenes_are_a_prefix(folder, tmp_path):
    clean = make(tmp_path / "clean", train=20, val=12, seed=5, workers=2)
    some = make(tmp_path / "some", noise=0.1, **SIZES)

    def swapped(f):
        return {key for key, s in samples(f, "train").items() if s.meta["captions_of"] != key}

    assert len(swapped(some)) == 4 and swapped(some) < swapped(folder)
    for name in (f"{split}-{n:06d}.png" for split, count in (("train", 20), ("val", 12)) for n in range(count)):
        split = name.partition("-")[0]
        assert (clean / "pictures" / split / name).read_bytes() == (folder / "pictures" / split / name).read_bytes()
    assert not (clean / "pictures" / "train" / "train-000020.png").exists()
    # what is asked does not depend on noise
    assert lines(some, "questions") == lines(folder, "questions")
    assert lines(some, "statements") == lines(folder, "statements")


@pytest.mark.parametrize("name", ["questions", "statements"])
def test_questions_and_statements_belong_to_the_samples(folder, name):
    found = {"train": {}, "val": {}}
    for line in lines(folder, name):
        assert set(line) == {"key", "text", "answer", "split"}
        found[line["split"]].setdefault(line["key"], []).append((line["text"], line["answer"]))
    for split, asked in found.items():
        made = samples(folder, split)
        assert asked.keys() == made.keys()
        for key, texts in asked.items():
            assert tuple(texts) == getattr(World().scene(5, made[key].meta["number"]), name)


def test_train_and_val_share_no_image_and_val_captions_are_unique(tmp_path):
    # so few different scenes that most are drawn again
    world = World(objects=(2,), colours=("red", "blue", "green"), shapes=("circle", "star"), relations=("above",))
    folder = make(tmp_path / "few", world, train=40, val=12, seed=5)
    captions = [c for s in samples(folder, "val").values() for c in s.captions]
    assert len(captions) == len(set(captions)) == 24
    train, val = ({s.image for s in samples(folder, split).values()} for split in ("train", "val"))
    assert not train & val and len(val) == 12
    with pytest.raises(UserError, match="too few different scenes"):
        make(tmp_path / "many", world, train=40, val=1000, seed=5)
    assert not (tmp_path / "many").exists()


def contents(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_interrupted_folder_is_completed_and_complete_one_unchanged(tmp_path, monkeypatch):
    def make_it(**more):
        return make(tmp_path / "world", **{"train": 20, "val": 4, "noise": 0.5, **more})

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vlp.data.world.folder.pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_it()
    whole = contents(make(tmp_path / "world", train=20, val=4, noise=0.5))
    assert {"train/manifest.json", "val/manifest.json", "world.json", "questions.jsonl"} <= whole.keys()
    (tmp_path / "world" / "pairs.jsonl").unlink()  # as a world of before there were pairs
    assert contents(make(tmp_path / "world", train=20, val=4, noise=0.5)) == whole
    monkeypatch.setattr(World, "scene", interrupt)
    assert contents(make_it()) == whole
    with pytest.raises(UserError, match="contains another world"):
        make_it(noise=0.25)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not a world"):
        make(tmp_path / "mine", train=2, val=2)


@pytest.mark.parametrize("numbers", [{"train": 3}, {"val": 0}, {"noise": 1.5}, {"noise": -0.1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path, numbers):
    with pytest.raises(UserError, match="not possible; give"):
        make(tmp_path / "world", **{"train": 4, "val": 2, **numbers})
    assert not (tmp_path / "world").exists()


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    make(tmp_path / "world", train=6, val=2, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {16} and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1] == (16, 16)


def test_the_command_makes_the_same_world(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    options = ["--train", "20", "--val", "4", "--noise", "0.2", "--size", "96", "--seed", "9"]
    parsed = parser.parse_args(["world", str(tmp_path / "a"), *options])
    assert parsed.run(parsed) == 0
    assert capsys.readouterr().out.startswith(
        f"20 samples in {tmp_path / 'a' / 'train'}, 4 in {tmp_path / 'a' / 'val'}"
    )
    make(tmp_path / "b", World(96), train=20, val=4, noise=0.2, seed=9)
    same = [{k: v for k, v in contents(tmp_path / f).items() if "pictures" in k or k[-5:] == "jsonl"} for f in "ab"]
    assert same[0] == same[1] and len(same[0]) == 30


def test_boxes_are_those_of_the_pixels(pairs):
    for scene in (s for pair in pairs for s in pair):
        seen = dict(see(scene.image))
        for thing, (left, top, width, height) in zip(scene.things, scene.boxes):
            mask = seen[f"{thing.size} {thing.colour} {thing.shape}"]
            assert box(mask) == (left, top, left + width - 1, top + height - 1)


def test_grounding_names_each_thing_of_each_sample_once(folder):
    found = {}
    for line in lines(folder, "grounding"):
        assert set(line) == {"key", "text", "box", "proposals", "split"} and line["box"] in line["proposals"]
        found.setdefault((line["split"], line["key"]), []).append((line["text"], tuple(line["box"])))
    for split in ("train", "val"):
        for key, sample in samples(folder, split).items():
            scene = World().scene(5, sample.meta["number"])
            named = [(f"the {t.colour} {t.shape}", b) for t, b in zip(scene.things, scene.boxes)]
            assert found.pop((split, key)) == named
    assert not found


SHAPES, ALL_COLOURS = "|".join(OUTLINES), "|".join(COLOURS)


def same_in_both(text: str, left: Seen, right: Seen) -> bool:
    """Whether what the text compares is the same in two images, from their pixels."""
    if "number of things" in text or "more things" in text:
        return len(left) == len(right)
    values = []
    for seen in (left, right):
        words = [(name.split(), mask) for name, mask in seen]
        if match := re.search(f"the ({SHAPES}) has", text):
            values.append(next(w[1] for w, _ in words if w[2] == match[1]))
        elif match := re.search(f"the ({ALL_COLOURS}) thing has", text):
            values.append(next(w[2] for w, _ in words if w[1] == match[1]))
        else:
            match = re.search(f"the ({SHAPES}) and the ({SHAPES})", text)
            one, other = (next(mask for w, mask in words if w[2] == shape) for shape in match.groups())
            values.append(related(one, other))
    return values[0] == values[1]


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "larger", train=400, val=100, seed=5)


def test_statements_about_two_images_are_true_of_the_pixels(larger):
    pictures, found = larger / "pictures", lines(larger, "pairs")
    assert {line["kind"] for line in found} == {"colour", "shape", "place", "number"}
    seen = {}
    for line in found:
        for key in (line["image0"], line["image1"]):
            if key not in seen:
                seen[key] = see(np.array(Image.open(pictures / line["split"] / f"{key}.png")))
        same = same_in_both(line["text"], seen[line["image0"]], seen[line["image1"]])
        assert line["answer"] is (same == ("same" in line["text"] or "alike" in line["text"])), line


def test_text_with_one_image_does_not_decide_about_two(larger):
    found = lines(larger, "pairs")
    assert len({line["answer"] for line in found}) == 2 and all(line["image0"] != line["image1"] for line in found)
    for split in ("train", "val"):
        for kind in ("colour", "shape", "place", "number"):
            some = [line for line in found if line["split"] == split and line["kind"] == kind]
            assert some and len(some) % 4 == 0
            for known in (("text",), ("text", "image0"), ("text", "image1")):
                answers = {}
                for line in some:
                    answers.setdefault(tuple(line[name] for name in known), []).append(line["answer"])
                assert all(sum(a) * 2 == len(a) for a in answers.values())
    same = sum("same" in line["text"] or "alike" in line["text"] for line in found) / len(found)
    assert 0.4 < same < 0.6  # and images without their text do not either


def test_histograms_do_not_decide_about_two_images(larger):
    """All four of a group: both of two minimal pairs."""
    numbers = {s.key: s.meta["number"] for split in ("train", "val") for s in read_all(larger, split)}
    found = [line for line in lines(larger, "pairs") if line["kind"] != "number"]
    for four in zip(*[iter(found)] * 4):
        sides = [{numbers[line[side]] // 2 for line in four} for side in ("image0", "image1")]
        assert [len(side) for side in sides] == [1, 1] and sides[0] != sides[1]


def read_all(folder: Path, split: str) -> list:
    reader = ShardReader(str(folder / split))
    return [reader.read(*reader.locate(n)) for n in range(len(reader))]


def test_pairs_of_fewer_scenes_are_the_first_of_more(larger, tmp_path):
    fewer = make(tmp_path / "fewer", train=200, val=100, seed=5)
    some = [[line for line in lines(f, "pairs") if line["split"] == "train"] for f in (fewer, larger)]
    assert 0 < len(some[0]) < len(some[1]) and some[1][: len(some[0])] == some[0]
    val = [[line for line in lines(f, "pairs") if line["split"] == "val"] for f in (fewer, larger)]
    assert val[0] == val[1]


def test_a_single_thing_is_what_its_class_says():
    world = World()
    for number in range(200):
        image, label = world.single(0, number)
        ((name, _),) = see(image)
        assert name == world.classes[label]


def test_single_things_have_all_classes_equally_often():
    labels = Counter(World().single(0, number)[1] for number in range(2000))
    assert len(labels) == len(World().classes) == 96
    assert max(labels.values()) < 3 * 2000 / 96


def test_single_things_are_shards_with_labels_and_a_labelled_folder(tmp_path):
    folder = make_single(tmp_path / "single", train=40, val=12)
    reader = ShardReader(str(folder / "train"), label="label")
    images, names = read_labelled(folder, "val")
    assert len(reader) == 40 and len(images) == 12
    for row in range(40):
        raw = reader.read(*reader.locate(row))
        expected, label = World().single(0, row)
        assert raw.label == label and raw.captions == (f"a {World().classes[label]}",)
        assert np.array_equal(decode(raw.image, 10_000), expected)
    listed = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    assert [line["name"] for line in listed] == [World().classes[line["label"]] for line in listed]
    assert len({line["image"] for line in listed}) == 52


def test_single_things_are_completed_and_never_mixed(tmp_path):
    folder = make_single(tmp_path / "single", train=8, val=2)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / "labels.jsonl").unlink()
    make_single(folder, train=8, val=2)
    assert before == {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match="contains another world"):
        make_single(folder, train=10, val=2)
    with pytest.raises(UserError, match="give positive numbers"):
        make_single(tmp_path / "other", train=0, val=2)


def test_seen_scenes_lack_a_quarter_of_the_combinations_and_novel_pairs_have_one_each():
    seen, novel = World(combinations="seen"), World(combinations="novel")
    found = {(t.colour, t.shape) for n in range(600) for t in seen.scene(0, n).things}
    assert len(found) == 36
    assert {colour for colour, _ in found} == set(seen.colours) and {shape for _, shape in found} == set(seen.shapes)
    for number in range(200):
        assert any((t.colour, t.shape) not in found for t in novel.scene(0, number).things)
    names = {World().classes[seen.single(0, n)[1]] for n in range(1500)}
    assert {tuple(name.split()[1:]) for name in names} == found


def test_val_may_have_another_world(tmp_path):
    seen, novel = World(combinations="seen"), World(combinations="novel")
    folder = make(tmp_path / "world", seen, train=10, val=6, val_world=novel)
    reader = ShardReader(str(folder / "val"))
    assert [reader.read(*reader.locate(row)).captions[0] for row in range(2)] == [
        novel.scene(0, reader.read(*reader.locate(row)).meta["number"]).captions[0] for row in range(2)
    ]
    make(folder, seen, train=10, val=6, val_world=novel)
    with pytest.raises(UserError, match="contains another world"):
        make(folder, seen, train=10, val=6)


def test_folder_of_before_a_field_of_the_world_is_still_complete(tmp_path):
    folder = make(tmp_path / "world", train=4, val=2)
    mark = json.loads((folder / "world.json").read_text())
    del mark["world"]["combinations"]
    (folder / "world.json").write_text(json.dumps(mark))
    before = (folder / "train" / "manifest.json").stat().st_mtime_ns
    make(folder, train=4, val=2)
    assert (folder / "train" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="contains another world"):
        make(folder, World(combinations="seen"), train=4, val=2)
