"""The stream is the same for any number of processes and workers and after any restart; bad samples have stand-ins."""

import io
import json
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import draw_pairs
from vlp.data.augment import GaussianBlur, RandAugment, RandomResizedCrop, Resize, mentions_side
from vlp.data.image import decode
from vlp.data.preparing.pack import Packing, pack
from vlp.data.preprocess import Preprocess
from vlp.data.reading.shards import ShardReader, Source
from vlp.data.stream import EvalDataset, TrainDataset, evaluation_batches, training_loader
from vlp.data.text import load_tokenizer
from vlp.errors import UserError

AUGMENT = RandomResizedCrop(then=(RandAugment(), GaussianBlur()))
PREPROCESS = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker; of tiny images the threads would cost more than they do
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def open_stream(world):
    """A function of shards (default: the world's 50 samples in 5) that opens them for training."""
    tokenizer = load_tokenizer(str(world / "tokenizer"))

    def opened(*sources: Source, transform=AUGMENT, seed=0, max_pixels=10_000, readers=1, together=1) -> TrainDataset:
        sources = sources or (Source(str(world / "shards"), together=together),)
        return TrainDataset(sources, (transform,), PREPROCESS, tokenizer, 16, max_pixels, seed, readers=readers)

    return opened


def load(dataset, start, stop, size, processes=1, workers=0) -> list:
    """Global micro-batches, put together from those of every process: [(keys, image, input_ids as rows, index), ...]"""
    loaders = [training_loader(dataset, start, stop, size, rank, processes, workers) for rank in range(processes)]
    batches = []
    for parts in zip(*loaders, strict=True):
        assert {len(p.batch) for p in parts} == {size // processes}
        batches.append(
            (
                sum((list(p.batch.keys) for p in parts), []),
                torch.cat([p.batch.image for p in parts]),
                [ids[mask].tolist() for p in parts for ids, mask in zip(p.batch.input_ids, p.batch.attention_mask)],
                torch.cat([p.batch.image_id for p in parts]).tolist(),
                [bad for p in parts for bad in p.bad],
            )
        )
    return batches


def assert_same(a: list, b: list) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x[0] == y[0]
        assert torch.equal(x[1], y[1])
        assert x[2:] == y[2:]


def keys(batches: list) -> list[str]:
    return [key for batch in batches for key in batch[0]]


@pytest.mark.parametrize("readers, together", [(1, 1), (4, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("processes, workers", [(1, 1), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_batches_do_not_depend_on_processes_and_workers(open_stream, processes, workers, readers, together):
    """5 shards for up to 8 workers; two epochs."""
    dataset = open_stream(readers=readers, together=together)
    assert_same(load(dataset, 0, 96, 8), load(dataset, 0, 96, 8, processes, workers))


@pytest.mark.parametrize("readers, together", [(1, 1), (5, 1), (1, 5), (5, 2)])
def test_every_sample_exactly_once_an_epoch(open_stream, readers, together):
    found = keys(load(open_stream(readers=readers, together=together), 0, 150, 10, 2, 1))
    everything = {f"0/{n}/{n:04d}" for n in range(50)}
    epochs = [found[i : i + 50] for i in (0, 50, 100)]
    assert all(len(set(epoch)) == 50 and set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("readers, together", [(1, 1), (8, 1), (4, 2)])
@pytest.mark.parametrize("position", [8, 48, 56, 88])
def test_start_in_the_middle_continues_the_same_stream(open_stream, position, readers, together):
    whole = load(open_stream(readers=readers, together=together), 0, 96, 8)
    again = open_stream(readers=readers, together=together)
    assert_same(whole[position // 8 :], load(again, position, 96, 8, 2, 1))


@pytest.mark.parametrize("readers, together", [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_number_of_processes_may_change_during_a_run(open_stream, readers, together):
    dataset = open_stream(readers=readers, together=together)
    parts = [(0, 24, 2), (24, 40, 1), (40, 64, 2), (64, 96, 4)]
    joined = sum((load(dataset, start, stop, 8, n) for start, stop, n in parts), [])
    assert_same(load(dataset, 0, 96, 8), joined)


def test_pickled_dataset_continues_identically(open_stream):
    dataset = open_stream()
    assert_same(load(dataset, 40, 64, 8), load(pickle.loads(pickle.dumps(dataset)), 40, 64, 8))


@pytest.mark.parametrize("readers, processes", [(1, 1), (1, 2), (2, 4)])
def test_related_samples_reach_the_same_process_in_the_same_batch(open_stream, readers, processes):
    """Samples 2n and 2n + 1 of the source follow each other in every part of every batch, in each of two epochs."""
    dataset = open_stream(readers=readers, together=2)
    for rank in range(processes):
        for loaded in training_loader(dataset, 0, 96, 8, rank, processes, 0):
            rows = [int(key.split("/")[1]) for key in loaded.batch.keys]
            assert [row % 2 for row in rows] == [0, 1] * (len(rows) // 2)
            assert [row + 1 for row in rows[::2]] == rows[1::2]


def test_related_samples_that_do_not_divide_the_source_are_one_line(open_stream):
    with pytest.raises(UserError, match=r"^together=4 of \S+ does not divide its 50 samples; .* set together=1$"):
        open_stream(together=4)


def test_seed_changes_order_pixels_and_captions(open_stream):
    a, b = (load(open_stream(seed=seed), 0, 50, 50)[0] for seed in (0, 1))
    assert a[0] != b[0]
    order = [b[0].index(key) for key in a[0]]
    assert not torch.equal(a[1], b[1][order])
    assert a[2] != [b[2][i] for i in order]


def test_caption_and_pixels_are_drawn_again_every_epoch(open_stream, world):
    batches = load(open_stream(transform=RandomResizedCrop()), 0, 400, 50)  # 8 epochs of 50 samples
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    reader = ShardReader(str(world / "shards"))
    for n in range(50):
        rows = [batch[0].index(f"0/{n}/{n:04d}") for batch in batches]
        drawn = {tuple(batch[2][row]) for batch, row in zip(batches, rows)}
        captions = {tuple(r) for r in tokenizer.rows(reader.read(*reader.locate(n)).captions)}
        assert drawn <= captions
        assert len({batch[1][row].numpy().tobytes() for batch, row in zip(batches, rows)}) == 8
    first = [batch[2][batch[0].index(f"0/{n}/{n:04d}")] for batch in batches for n in range(50)]
    short = sum(len(ids) < 7 for ids in first)  # the second captions have three words
    assert 120 < short < 280


def test_no_mirror_where_the_caption_says_a_side(tmp_path, open_stream):
    """Each image has a caption with a side and one without; only with the second drawn may it be mirrored."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # bright on the left
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(40):
            add(tar, f"{n}.png", (tmp_path / "a.png").read_bytes())
            add(tar, f"{n}.json", json.dumps({"captions": ["red square at the left", "red square"]}).encode())
    whole = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.5)
    dataset = open_stream(Source(str(tmp_path)), transform=whole)
    side = Counter()
    for _, image, ids, _, _ in load(dataset, 0, 400, 40):
        for picture, row in zip(image, ids):
            mirrored = bool(picture[0, 0, 0] == 0)
            side[len(row) > 5, mirrored] += 1  # [CLS] red square [SEP], or with three words more
    assert mentions_side("red square at the left")
    assert side[True, True] == 0
    assert side[True, False] > 120
    assert min(side[False, True], side[False, False]) > 60


# -- mixtures


def test_sources_are_mixed_by_weight_and_run_through_their_own_epochs(tmp_path, open_stream):
    for name, count in (("a", 30), ("b", 10)):
        pack(draw_pairs(tmp_path / f"pictures-{name}", count), tmp_path / name, Packing(shard_samples=8))
    sources = (Source(str(tmp_path / "a"), 1.0), Source(str(tmp_path / "b"), 3.0))
    batches = load(open_stream(*sources, transform=Resize()), 0, 4096, 512, 2)
    found = keys(batches)
    second = [key for key in found if key.startswith("1/")]
    assert len(second) == 3072
    everything = {f"1/{n}/{n:04d}" for n in range(10)}
    assert all(set(second[i : i + 10]) == everything for i in range(0, 3070, 10))
    first = [key for key in found if key.startswith("0/")]
    assert all(len(set(first[i : i + 30])) == 30 for i in range(0, 1020, 30))
    pictures = {(key, index) for batch in batches for key, index in zip(batch[0], batch[3])}
    # the 10 images of b are the first 10 of a, with the same image_id, and no other two images share one
    assert len(pictures) == 40 and len({index for _, index in pictures}) == 30
    assert_same(load(open_stream(*sources, transform=Resize()), 512, 1024, 512, 1, 2), batches[1:2])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weight_is_one_line(world, open_stream, weight):
    with pytest.raises(UserError, match="the weight of .* give a positive number"):
        open_stream(Source(str(world / "shards")), Source(str(world / "shards"), weight))


# -- bad samples


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png(size: tuple[int, int] = (40, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


BAD = {  # key -> (image, json, part of the reason)
    "undecodable": (b"GIF89a", {"captions": ["a"]}, "not a JPEG, PNG, WEBP, PPM or TIFF"),
    "truncated": (png()[:900], {"captions": ["a"]}, "undecodable image"),
    "large": (png((200, 100)), {"captions": ["a"]}, "over the limit of 10000"),
    "blank": (png(), {"captions": ["", "  "]}, "no caption"),
    "wordless": (png(), {}, "no caption"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Path:
    """30 good samples and 5 bad ones, in 2 shards."""
    folder = tmp_path_factory.mktemp("spoilt")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n in range(15):
                add(tar, f"good-{shard}-{n}.png", png())
                add(tar, f"good-{shard}-{n}.txt", b"a caption")
            for key in list(BAD)[shard * 2 : 2 if shard == 0 else None]:
                add(tar, f"{key}.png", BAD[key][0])
                add(tar, f"{key}.json", json.dumps(BAD[key][1]).encode())
    return folder


@pytest.mark.parametrize("processes, workers, together", [(1, 0, 1), (2, 1, 1), (1, 2, 1), (1, 1, 7)])
def test_bad_samples_are_replaced_and_quarantined_with_a_reason(spoilt, open_stream, processes, workers, together):
    dataset = open_stream(Source(str(spoilt), together=together))
    assert len(dataset) == 35
    batches = load(dataset, 0, 70, 14, processes, workers)
    assert_same(load(dataset, 0, 70, 14), batches)
    assert all(len(batch[0]) == 14 for batch in batches)
    found = keys(batches)
    assert all("/good-" in key for key in found)
    # in each of the two epochs every good sample comes, and 5 of them once more or oftener
    assert all(len(set(found[i : i + 35])) == 30 for i in (0, 35))
    complaints = {bad["key"]: bad for batch in batches for bad in batch[4]}
    assert complaints.keys() == BAD.keys()
    for n, (key, bad) in enumerate((key, complaints[key]) for key in BAD):
        assert bad.keys() == {"source", "shard", "key", "reason"}
        assert (bad["source"], bad["shard"]) == (str(spoilt), "0.tar" if n < 2 else "1.tar")
        assert BAD[key][2] in bad["reason"]


def test_replacement_after_a_restart_is_the_same(spoilt, open_stream):
    whole = load(open_stream(Source(str(spoilt))), 0, 70, 7)
    for start in range(7, 70, 7):
        assert_same(whole[start // 7 :][:1], load(open_stream(Source(str(spoilt))), start, start + 7, 7))


@pytest.mark.parametrize("workers", [0, 1])
def test_source_with_nothing_good_stops_in_one_line(tmp_path, open_stream, workers):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            add(tar, f"{n}.png", b"no picture")
            add(tar, f"{n}.txt", b"a caption")
    with pytest.raises(UserError, match=r"^100 samples in a row .*a\.tar/\d: not a JPEG.* `vlp data check` on it$"):
        load(open_stream(Source(str(tmp_path))), 0, 2, 2, workers=workers)


def test_source_without_images_is_refused(tmp_path, open_stream):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.json", b"{}")
    with pytest.raises(UserError, match="no usable sample"):
        open_stream(Source(str(tmp_path)))


@pytest.mark.parametrize("workers", [0, 1])
def test_shard_that_changes_during_the_run_is_named_in_one_line(tmp_path, open_stream, workers):
    pack(draw_pairs(tmp_path / "pictures", 4), tmp_path / "s", Packing(shard_samples=2))
    training, evaluation = (
        open_stream(Source(str(tmp_path / "s"))),
        EvalDataset(str(tmp_path / "s"), Resize(), PREPROCESS, 10_000),
    )
    shard = tmp_path / "s" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    for batches in (training_loader(training, 0, 8, 4, 0, 1, workers), evaluation_batches(evaluation, 2, workers)):
        with pytest.raises(UserError, match=r"^\S*shard-000001.tar has 1,000 bytes"):
            list(batches)


# -- evaluation


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 1), (4, 0)])
def test_evaluation_sees_every_good_sample_once_in_order(spoilt, processes, workers):
    dataset = EvalDataset(str(spoilt), Resize(), PREPROCESS, 10_000)
    parts = [list(evaluation_batches(dataset, 4, workers, rank, processes)) for rank in range(processes)]
    batches = [parts[n % processes][n // processes] for n in range(-(-35 // 4))]
    samples = [sample for batch, _ in batches for sample in batch]
    reader = ShardReader(str(spoilt))
    everything = [reader.read(*reader.locate(n)) for n in range(35)]
    undecodable = ("undecodable", "truncated", "large")  # those without a caption still have a image to classify
    expected = [s for s in everything if s.key not in undecodable]
    assert [raw for _, raw in samples] == [replace(s, image=None) for s in expected]  # which would stay in memory
    assert sorted(bad["key"] for _, unusable in batches for bad in unusable) == sorted(undecodable)
    for (image, _), raw in zip(samples[:3], expected):
        assert torch.equal(image, Resize()(decode(raw.image), (16, 16), "bicubic"))
