"""Batches of a stream: the same for the same seed and worker, different samples for each worker, bad samples counted."""

import multiprocessing
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.data.reading.test_shards import picture, small_shard, write_tar
from tests.data.test_stream import AUGMENT, PREPROCESS
from vlp.data.reading.tar_streams import WebDatasetStream
from vlp.data.text import load_tokenizer
from vlp.data.unindexed import StreamDataset
from vlp.errors import UserError

SHARDS, SAMPLES = 8, 5  # samples of each shard


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """8 shards of 5 samples, whose keys are 0 to 39."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        members = [
            m for n in numbers for m in ((f"{n}.png", picture(n)), (f"{n}.txt", b"red"), (f"{n}.cls", b"%d" % n))
        ]
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def open_stream(world):
    tokenizer = load_tokenizer(str(world / "tokenizer"))

    def opened(urls: object, seed: int = 0, **fields) -> StreamDataset:
        source = WebDatasetStream(str(urls), **{"shuffle": 4} | fields)
        return StreamDataset(source, 1000, (AUGMENT,), PREPROCESS, tokenizer, 16, 10_000, seed)

    return opened


def batches(data: StreamDataset, steps: int, rank=0, world=1, workers=0, start=0, size=4) -> list:
    return list(data.loader(start, start + steps * size * world, size * world, rank, world, workers))


def keys(loaded: list) -> list[str]:
    return [key.rpartition("/")[2] for each in loaded for key in each.batch.keys]


def draws(data: StreamDataset, number: int, consumer=0, consumers=1, start=0) -> list[str]:
    return [sample.key for sample in islice(data.samples(start, consumer, consumers), number)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True])
def test_same_seed_and_worker_give_the_same_batches(open_stream, shards, workers, resampled):
    first, second = (batches(open_stream(shards, resampled=resampled), 6, workers=workers) for _ in range(2))
    assert [x.batch.keys for x in first] == [x.batch.keys for x in second]
    for x, y in zip(first, second):
        assert torch.equal(x.batch.image, y.batch.image) and torch.equal(x.batch.input_ids, y.batch.input_ids)
    assert [len(x.batch) for x in first] == [4] * 6
    rows = [row for x in first for row in x.batch.dataset_row.tolist()]
    assert len(set(rows)) == 24


def test_order_depends_on_the_seed_and_on_the_start(open_stream, shards):
    orders = [
        draws(open_stream(shards, seed=0), 40),
        draws(open_stream(shards, seed=1), 40),
        draws(open_stream(shards, seed=0), 40, start=8),
        draws(open_stream(shards, seed=0, resampled=True), 40),
        draws(open_stream(shards, seed=0, resampled=True), 40, start=8),
    ]
    assert len(set(map(tuple, orders))) == 5
    assert draws(open_stream(shards, seed=1, shuffle_seed=0), 40) == orders[0]


def test_pass_contains_every_sample_once(open_stream, shards):
    found = draws(open_stream(shards, shuffle=0), 2 * SHARDS * SAMPLES)
    first, second = found[: SHARDS * SAMPLES], found[SHARDS * SAMPLES :]
    assert sorted(map(int, first)) == sorted(map(int, second)) == list(range(SHARDS * SAMPLES))
    assert first != second  # each pass permutes the shards


def test_shuffle_buffer_mixes_shards_and_keeps_every_sample(open_stream, shards):
    plain, mixed = (draws(open_stream(shards, shuffle=n), 80) for n in (0, 16))
    assert plain != mixed
    of_shard = lambda order: [int(key) // SAMPLES for key in order]  # noqa: E731
    changes = lambda order: sum(a != b for a, b in zip(order, order[1:]))  # noqa: E731
    assert changes(of_shard(plain)) < 20 < changes(of_shard(mixed))
    assert max(Counter(mixed).values()) <= 3  # 2 passes, and up to 16 samples of the third


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_of_a_pass_see_disjoint_samples_that_are_all(open_stream, shards, workers):
    # batches of a shard, so that all workers end the pass together
    parts = [
        keys(batches(open_stream(shards, shuffle=0), SHARDS // 2, rank, 2, workers, size=SAMPLES)) for rank in range(2)
    ]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(map(int, parts[0] + parts[1])) == list(range(SHARDS * SAMPLES))
    rows = [
        row
        for rank in range(2)
        for x in batches(open_stream(shards), 5, rank, 2, workers)
        for row in x.batch.dataset_row.tolist()
    ]
    assert len(set(rows)) == SHARDS * SAMPLES


def test_resampled_workers_draw_independently_and_with_replacement(open_stream, shards):
    data = open_stream(shards, resampled=True, shuffle=0)
    orders = [draws(data, 60, consumer, 4) for consumer in range(4)]
    assert len(set(map(tuple, orders))) == 4
    assert any(len(set(order)) < 40 for order in orders)


def test_label_of_the_class_member_arrives(open_stream, shards):
    for loaded in batches(open_stream(shards, label="cls"), 4):
        assert loaded.batch.labels.tolist() == [int(key.rpartition("/")[2]) for key in loaded.batch.keys]
    assert batches(open_stream(shards), 1)[0].batch.labels is None


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_and_named(open_stream, tmp_path, workers):
    for shard in range(2):
        members = [m for n in range(4) for m in ((f"{n}.png", picture(n)), (f"{n}.txt", b"red"))]
        members += [("bad.png", picture(0)[:60]), ("bad.txt", b"red"), ("mute.png", picture(0)), ("x.bmp", b"BM")]
        write_tar(tmp_path / f"{shard}.tar", members)
    loaded = batches(open_stream(tmp_path), 8, workers=workers)
    assert set(keys(loaded)) == {"0", "1", "2", "3"}
    bad = {(entry["key"], entry["reason"].partition(":")[0]) for each in loaded for entry in each.bad}
    assert bad == {
        ("bad", "undecodable image"),
        ("mute", "no caption"),
        ("x", "no image that can be read (bmp)"),
    }
    assert {entry["source"] for each in loaded for entry in each.bad} == {str(tmp_path)}
    assert {entry["shard"] for each in loaded for entry in each.bad} == {str(tmp_path / f"{n}.tar") for n in range(2)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "urls, reason",
    [
        ("pipe:exit {3..6}", "pipe:exit .: the command ended with exit code ."),
        ("pipe:head -c 1500 SHARD; : {0..3}", "it is truncated"),
        ("EMPTY/{0..3}.tar", "no shard of .* has an image that can be read"),
        ("BAD/{0..3}.tar", "100 samples in a row of .* are bad, the last: .*0: no caption"),
    ],
)
def test_error_of_a_worker_is_one_line(open_stream, shards, tmp_path, workers, urls, reason):
    for n in range(4):
        for name in ("empty", "bad"):
            (tmp_path / name).mkdir(exist_ok=True)
        write_tar(tmp_path / "empty" / f"{n}.tar", [("0.json", b"{}")])
        write_tar(tmp_path / "bad" / f"{n}.tar", [("0.png", picture(0))])
    urls = urls.replace("SHARD", str(shards / "0.tar")).replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=reason) as error:
        batches(open_stream(urls.replace("BAD", str(tmp_path / "bad"))), 4, workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batches_read", [1, 2])
def test_worker_that_waits_for_a_silent_command_ends_with_the_loader(open_stream, tmp_path, batches_read):
    shard = small_shard(tmp_path / "a.tar", 200)
    loader = open_stream(f"pipe:head -c 30720 {shard}; exec sleep 100", shuffle=0).loader(0, 8, 4, 0, 1, workers=1)
    for _ in range(batches_read):
        next(loader)
    (worker,) = multiprocessing.active_children()
    started = time.monotonic()
    loader.close()
    worker.join(60)
    assert not worker.is_alive() and time.monotonic() - started < 60


def test_loader_of_endless_commands_ends_after_its_batches(open_stream, tmp_path):
    shard = small_shard(tmp_path / "a.tar", 10)
    command = f"pipe:while cat {shard} | head -c 10240; do :; done; : {{a,b}}"
    assert len(batches(open_stream(command), 5, workers=2)) == 5
