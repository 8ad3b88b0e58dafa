"""Annotations: what a line says is what a batch holds, whatever names the fields have and wherever the images are."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import SHARED
from vlp.config import Data, Experiment
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.by_image import AnnotatedImageDataset
from vlp.data.image import decode
from vlp.data.preparing.formats import read_pairs
from vlp.data.preparing.pack import Packing, pack
from vlp.data.preprocess import Preprocess
from vlp.data.reading.annotated import Annotated, read_answers, to_evaluate
from vlp.data.reading.shards import Source
from vlp.data.stream import TrainDataset, evaluation_batches
from vlp.data.text import load_tokenizer
from vlp.errors import BadSample, UserError
from vlp.specs.overrides import override

PREPROCESS = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic")
LINES = [
    {"img": "a/1.png", "q": "what colour is it?", "a": "red", "split": "train"},
    {"img": "a/1.png", "q": "is it round?", "a": ["yes", "no", "yes", "yes", "maybe"], "split": "train"},
    {"img": "a/2.png", "q": "how many?", "a": {"2": 0.75, "two": 0.5}, "split": "train"},
    {"img": "a/2.png", "q": "where?", "a": 3, "split": "val"},
    {"img": "b.png", "q": "really?", "a": True, "split": "val"},
]


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    (folder / "a").mkdir()
    for n, name in enumerate(("a/1.png", "a/2.png", "b.png", "b.webp")):
        Image.fromarray(np.full((10, 12, 3), 40 * n, np.uint8)).save(folder / name)
    write(folder / "asked.jsonl", LINES)
    return folder


@pytest.fixture
def asked(folder) -> Annotated:
    return Annotated(str(folder / "asked.jsonl"), image=("img",), text="q", answers="a")


def read(source: Annotated) -> list:
    reader = source.open()
    return [reader.read(0, row) for row in range(len(reader))]


def test_line_is_a_sample_with_image_text_and_answers(asked, folder):
    samples = read(asked)
    assert [s.captions for s in samples] == [(line["q"],) for line in LINES]
    assert [s.image for s in samples] == [(folder / line["img"]).read_bytes() for line in LINES]
    assert [s.answers for s in samples] == [
        (("red", 1.0),),
        (("yes", 3 / 5), ("no", 1 / 5), ("maybe", 1 / 5)),
        (("2", 0.75), ("two", 0.5)),
        (("3", 1.0),),
        (("true", 1.0),),
    ]
    assert [s.image_id == t.image_id for s, t in zip(samples, samples[1:])] == [True, False, True, False]
    assert [s.source_row for s in samples] == list(range(5)) and samples[1].meta == LINES[1]


def test_split_keeps_its_lines_and_their_numbers_in_the_file(asked):
    val = replace(asked, split="val").open()
    assert val.sizes == [2] == [len(val)]
    assert [(val.read(0, row).captions, val.quarantine_entry(0, row, "why")["key"]) for row in range(2)] == [
        (("where?",), "4"),
        (("really?",), "5"),
    ]
    assert len(replace(asked, split="train+val").open()) == 5
    with pytest.raises(UserError, match="no line of split 'test'; its splits: train, val"):
        replace(asked, split="test").open()


def test_soft_targets_are_vqas_scores_of_the_number_of_annotators(asked):
    samples = read(replace(asked, classes=("yes", "no", "red", "two", "2", "3", "true")))
    assert torch.equal(samples[1].targets, torch.tensor([0.9, 0.3, 0, 0, 0, 0, 0]))
    assert torch.equal(samples[0].targets, torch.tensor([0, 0, 1.0, 0, 0, 0, 0]))
    assert torch.equal(samples[2].targets, torch.tensor([0, 0, 0, 0.5, 0.75, 0, 0]))
    answers, counts = read_answers(["a"] * 7 + ["b"] * 2 + ["c"])
    assert answers == (("a", 0.7), ("b", 0.2), ("c", 0.1)) and counts == (7, 2, 1)


@pytest.mark.parametrize("form", ["tuple", "txt", "json"])
def test_label_is_the_index_of_its_class(folder, tmp_path, form):
    classes = ("contradiction", "neutral", "entailment")
    lines = [{"image": "b.png", "hypothesis": f"h{n}", "label": classes[n % 3]} for n in range(4)]
    file = tmp_path / f"classes.{form}"
    file.write_text(json.dumps(classes) if form == "json" else "\n".join(classes) + "\n")
    source = Annotated(
        write(tmp_path / "x.jsonl", lines),
        images=str(folder),
        text="hypothesis",
        label="label",
        classes=classes if form == "tuple" else str(file),
    )
    assert [s.label for s in read(source)] == [0, 1, 2, 0]
    assert source.resolved().classes == classes
    experiment = Experiment("x", model=Model(), objectives={}, data=Data(train=(source,))).resolved()
    assert experiment.data.train[0].classes == classes  # a run knows them when their file is gone


class Model:
    def resolved(self):
        return self


def test_images_are_read_from_shards_by_key_or_packed_path(asked, folder, tmp_path):
    names = ["a/1.png", "a/2.png", "b.png", "b.webp"]
    captions = write(tmp_path / "captions.jsonl", [{"image": n, "caption": n} for n in names])
    pairs = list(read_pairs(captions, folder))
    pack(pairs, tmp_path / "shards", Packing(shard_samples=2), workers=1)
    by_path = [{"img": name, "q": "?", "a": "x"} for name in names]
    by_key = [{"img": pair.key, "q": "?", "a": "x"} for pair in pairs]
    for lines in (by_path, by_key):
        source = replace(asked, path=write(tmp_path / "x.jsonl", lines), images=str(tmp_path / "shards"))
        reader = pickle.loads(pickle.dumps(source.open()))
        found = [decode(reader.read(0, row).image)[0, 0, 0] for row in range(4)]
        assert np.abs(np.array(found, int) - [0, 40, 80, 120]).max() < 4  # the last one is lossy


BAD = {
    "no image 'a/9.png'": {"img": "a/9.png", "q": "?", "a": "x"},
    "no 'img' that names an image": {"q": "?", "a": "x"},
    "no text in 'q'": {"img": "b.png", "q": " ", "a": "x"},
    "no answer in 'a'": {"img": "b.png", "q": "?", "a": []},
    "none of the answers is a class: green": {"img": "b.png", "q": "?", "a": "green"},
    "should be a number of 0 or more": {"img": "b.png", "q": "?", "a": {"red": "much"}},
    "json is not an object": [1],
}


def test_bad_line_is_quarantined_and_replaced(asked, folder, world, tmp_path):
    good = {"img": "b.png", "q": "?", "a": "red"}
    lines = [good, *BAD.values(), good, good]
    source = replace(asked, path=write(tmp_path / "x.jsonl", lines), images=str(folder), classes=("red", "x"))
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    dataset = TrainDataset((source,), (Resize(),), PREPROCESS, tokenizer, 16, 10_000, 0)
    loaded = dataset.__getitems__(range(10))
    assert len(loaded.batch) == 10 and set(loaded.batch.labels or [0]) == {0}
    found = {int(bad["key"]): bad["reason"] for bad in loaded.bad}
    assert sorted(found) == list(range(2, 2 + len(BAD)))
    for number, reason in enumerate(BAD, 2):
        assert reason in found[number]
    again = TrainDataset((source,), (Resize(),), PREPROCESS, tokenizer, 16, 10_000, 0).__getitems__(range(5, 10))
    assert again.batch.keys == loaded.batch.keys[5:]


def test_unknown_label_is_a_bad_sample(folder, tmp_path):
    path = write(tmp_path / "x.jsonl", [{"image": "b.png", "text": "?", "label": "-"}])
    source = Annotated(path, str(folder), label="label", classes=("yes", "no"))
    with pytest.raises(BadSample, match="label '-' is not among yes, no"):
        source.open().read(0, 0)
    with pytest.raises(UserError, match="set classes"):
        replace(source, classes=()).open()


@pytest.mark.parametrize("sep", [True, False])
def test_answers_of_a_batch_end_with_sep_and_know_their_question(asked, world, sep):
    tokenizer = load_tokenizer(str(world / "tokenizer"), sep)
    source = replace(asked, classes=("yes", "no", "red", "2", "3", "true"))
    batch = TrainDataset((source,), (Resize(),), PREPROCESS, tokenizer, 16, 10_000, 0).__getitems__(range(5)).batch
    order = [int(key.split("/")[1]) for key in batch.keys]
    expected = [(n, *answer) for n, row in enumerate(order) for answer in source.open().read(0, row).answers]
    ids = [
        [tokenizer.cls_id, *row[1 : -1 if sep else None], tokenizer.sep_id]
        for row in tokenizer.rows(a for _, a, _ in expected)
    ]
    assert batch.answers.row.tolist() == [n for n, _, _ in expected]
    assert batch.answers.weight.tolist() == pytest.approx([w for _, _, w in expected])
    assert [row[mask].tolist() for row, mask in zip(batch.answers.input_ids, batch.answers.attention_mask)] == ids
    assert torch.equal(batch.targets, torch.stack([source.open().read(0, row).targets for row in order]))
    moved = batch.to(torch.device("meta"))
    assert moved.answers.input_ids.is_meta and moved.targets.is_meta


def test_second_image_is_the_next_view(folder, world, tmp_path):
    lines = [
        {"one": "a/1.png", "two": "a/2.png", "text": "t", "label": "yes"},
        {"one": "b.png", "two": "a/1.png", "text": "t", "label": "no"},
    ]
    source = Annotated(
        write(tmp_path / "x.jsonl", lines), str(folder), image=("one", "two"), label="label", classes=("no", "yes")
    )
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    batch = TrainDataset((source,), (Resize(),), PREPROCESS, tokenizer, 16, 10_000, 0).__getitems__(range(2)).batch
    order = [int(key.split("/")[1]) for key in batch.keys]
    assert batch.image[:, 0, 0, 0].tolist() == [(0, 80)[row] for row in order]
    assert batch.views[0].image[:, 0, 0, 0].tolist() == [(40, 0)[row] for row in order]
    assert batch.labels.tolist() == [(1, 0)[row] for row in order]


def test_image_is_not_mirrored_if_the_answer_names_a_side(folder, world, tmp_path):
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:, :5] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    lines = [{"image": "half.png", "text": "where?", "answers": a} for a in ["left", "top"]]
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    flip = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0)
    source = Annotated(write(tmp_path / "x.jsonl", lines), answers="answers")
    batch = TrainDataset((source,), (flip,), PREPROCESS, tokenizer, 16, 10_000, 0).__getitems__(range(2)).batch
    bright_left = {int(key.split("/")[1]): bool(image[0, 0, 0] > 128) for key, image in zip(batch.keys, batch.image)}
    assert bright_left == {0: True, 1: False}


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (3, 2)])
def test_evaluation_has_every_line_and_every_image_once(asked, processes, workers):
    dataset = AnnotatedImageDataset(asked.open(), Resize(), PREPROCESS, 10_000)
    found = [
        pictured
        for rank in range(processes)
        for batch, bad in evaluation_batches(dataset, 2, workers, rank, processes)
        for pictured in batch
        if not bad
    ]
    assert sorted(line.source_row for p in found for line in p.lines) == list(range(5))
    assert sorted(len(p.lines) for p in found) == [1, 2, 2] and all(len(p.images) == 1 for p in found)


def test_evaluation_keeps_unknown_answers_and_names_bad_lines(asked, folder, tmp_path):
    source = replace(asked, path=write(tmp_path / "x.jsonl", BAD.values()), images=str(folder), classes=("red",))
    batches = list(evaluation_batches(AnnotatedImageDataset(source.open(), Resize(), PREPROCESS, 10_000), 2, 0))
    kept = [line.source_row for batch, _ in batches for p in batch for line in p.lines]
    assert sorted(kept) == [3, 4] and sorted(int(b["key"]) for _, bad in batches for b in bad) == [1, 2, 3, 6, 7]


def test_annotations_to_evaluate_take_the_fields_of_training(asked, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        to_evaluate((Source("x"), asked), None, None, None)
    assert to_evaluate((Source("x"), asked), None, None, "val") == replace(asked, split="val")
    other = to_evaluate((asked,), "other.jsonl", "pictures", None)
    assert other == replace(asked, path="other.jsonl", images="pictures")
    assert to_evaluate((), "other.jsonl", None, "val") == Annotated("other.jsonl", split="val")


def test_override_keeps_the_fields(asked):
    experiment = override(Experiment("x", None, {}, Data(train=(asked,))), ["data.train=other.jsonl"])
    assert experiment.data.train == (replace(asked, path="other.jsonl"),)
    assert override(experiment, ["data.train.0.classes=list.txt"]).data.train[0].classes == "list.txt"


def test_different_kinds_of_sources_in_a_batch_are_refused(asked, world):
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    sources = (asked, replace(asked, answers=None))
    found = TrainDataset(sources, (Resize(),), PREPROCESS, tokenizer, 16, 10_000, 0).__getitems__(range(10))
    assert isinstance(found, UserError) and "only some have classes or answers" in str(found)


@pytest.mark.skipif(not SHARED.exists(), reason="the real data are not here")
def test_real_files_are_read_as_they_are():
    daquar = Annotated(str(SHARED / "data/daquar/questions.jsonl"), text="question", answers="answer", split="train")
    assert len(daquar.open()) == 6795 and daquar.open().read(0, 0).image
    entailment = Annotated(
        str(SHARED / "data/entailment_flickr8k/entailment.jsonl"),
        text="hypothesis",
        label="label",
        classes=("contradiction", "neutral", "entailment"),
    )
    sample = entailment.open().read(0, 0)
    assert sample.label == 0 and sample.image and sample.captions[0].startswith("A white dog")
