"""Copies of remote shards: verified, tried again, shared by processes, and kept within a limit."""

import multiprocessing
import os
import pickle
import random
import threading
from pathlib import Path

import fsspec
import pytest

import vlp.data.reading.cache as reading_cache
import vlp.data.reading.locations as locations
from benchmarks.remote_shards import cached_bytes, make_shards, serve
from vlp.data.augment import Resize
from vlp.data.preprocess import Preprocess
from vlp.data.reading.cache import cache_bytes, evict, fetch, open_copy
from vlp.data.reading.shards import ShardReader, Source
from vlp.data.stream import TrainDataset, training_loader
from vlp.errors import UserError

SHARDS, SAMPLES = 12, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of 12 shards, and the bytes of one."""
    folder = tmp_path_factory.mktemp("remote")
    total = make_shards(folder, SHARDS, SAMPLES)
    return folder / "shards", total // SHARDS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLP_CACHE_BYTES", raising=False)
    monkeypatch.setattr(locations, "FIRST_WAIT", 0.001)
    return tmp_path / "cache"


def read_all(location: str) -> list[bytes]:
    reader = ShardReader(location)
    return [reader.read(*reader.locate(n)).image for n in range(len(reader))]


def test_answers_that_fail_or_end_early_are_tried_again(made, cache):
    random.seed(0)
    folder, _ = made
    with serve(folder, failures=0.4) as (url, _):
        assert read_all(url) == read_all(str(folder))
    assert not list(cache.rglob("*.tmp"))


def test_shard_that_stays_damaged_is_named(made, tmp_path):
    folder, _ = made
    (tmp_path / "shards").mkdir()
    for file in folder.iterdir():
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "shards" / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with serve(tmp_path / "shards") as (url, sent):
        reader = ShardReader(url)
        assert reader.read(0, 0).image
        with pytest.raises(UserError, match="shard-000001.tar is not the shard that manifest.json says"):
            reader.read(1, 0)
        assert sent["shard-000001.tar"] == locations.TRIES_OF_CONTENT * len(data)
        for name in ("manifest.json", "shard-000001.tar.index.json"):  # then the index decides, then nothing does
            (tmp_path / "shards" / name).unlink()
            if name == "manifest.json":
                with pytest.raises(UserError, match="is not the shard that its index says"):
                    fetch(f"{url}/shard-000001.tar")
        assert fetch(f"{url}/shard-000001.tar").read_bytes() == data


def test_a_missing_shard_is_not_asked_for_again(made, monkeypatch):
    monkeypatch.setattr(locations, "FIRST_WAIT", 100)
    with serve(made[0]) as (url, _), pytest.raises(UserError, match="cannot fetch .*/none.tar"):
        fetch(f"{url}/none.tar")


def test_start_needs_no_shard_without_a_manifest_either(made, tmp_path, cache):
    folder, _ = made
    (tmp_path / "web").mkdir()
    for file in folder.iterdir():
        if file.name != "manifest.json":
            (tmp_path / "web" / file.name).symlink_to(file)
    with serve(tmp_path / "web") as (url, sent):
        reader = ShardReader(f"{url}/shard-{{000000..000011}}.tar")
        assert reader.sizes == [SAMPLES] * SHARDS and not cache.exists()
        assert not any(name.endswith(".tar") for name in sent)
        assert reader.read(3, 1).image == ShardReader(str(folder)).read(3, 1).image
        assert {name for name in sent if name.endswith(".tar")} == {"shard-000003.tar"}


def test_copies_stay_within_the_limit(made, cache, monkeypatch):
    folder, size = made
    limit = 4 * size
    monkeypatch.setenv("VLP_CACHE_BYTES", str(limit))
    expected = read_all(str(folder))
    with serve(folder) as (url, sent):
        for _ in range(2):
            reader = ShardReader(url)
            for n, image in enumerate(expected):
                assert reader.read(*reader.locate(n)).image == image
                reader._handle.cache_clear()  # a process that goes on to the next shard
                assert cached_bytes(cache) <= limit
    # the shards of the first round were removed before the second
    assert sum(count for name, count in sent.items() if name.endswith(".tar")) == 2 * SHARDS * size


def test_a_download_counts_as_a_whole_while_it_runs(made, cache, monkeypatch):
    folder, size = made
    seen = []
    monkeypatch.setattr(reading_cache, "evict", lambda limit: seen.append(limit))
    monkeypatch.setenv("VLP_CACHE_BYTES", str(10 * size))
    with serve(folder) as (url, _):
        shard = ShardReader(url).shards[0]
        whole = (folder / "shard-000000.tar").stat().st_size
        copy = type(fsspec.filesystem("http")).get_file

        def get_file(fs, path, local, **more):
            evict(0)  # of another process: it must not take the running download for an empty one
            held = sum(file.stat().st_size for file in Path(local).parent.iterdir() if file.suffix != ".tmp")
            assert held >= whole
            copy(fs, path, local, **more)
            assert Path(local).stat().st_size == whole

        monkeypatch.setattr(type(fsspec.filesystem("http")), "get_file", get_file)
        fetch(shard)
    assert seen == [10 * size - whole]
    assert not list(cache.rglob("*.room")) and not list(cache.rglob("*.tmp"))


def test_the_least_recently_opened_copies_are_removed_and_those_in_use_are_not(made, cache):
    with serve(made[0]) as (url, _):
        names = [f"{url}/shard-{n:06d}.tar" for n in range(4)]
        copies = [fetch(name) for name in names]
        for n, copy in enumerate(copies):
            os.utime(copy.parent, (n, n))
        in_use = open_copy(names[0])  # now the most recently opened
        evict(cached_bytes(cache) - 1)
        assert [copy.exists() for copy in copies] == [True, False, True, True]
        evict(0)
        assert [copy.exists() for copy in copies] == [True, False, False, False] and in_use.read(1)
        in_use.close()
        evict(0)
        assert not copies[0].exists() and cached_bytes(cache) == 0


def _read_some(url: str, seed: int) -> None:
    reader = ShardReader(url)
    for n in random.Random(seed).sample(range(SHARDS * SAMPLES), SHARDS * SAMPLES):
        assert reader.read(*reader.locate(n)).image


@pytest.mark.parametrize("limit", [None, 3])
def test_processes_share_the_copies(made, cache, monkeypatch, limit):
    folder, size = made
    if limit:
        monkeypatch.setenv("VLP_CACHE_BYTES", str(limit * size))
    with serve(folder) as (url, sent):
        processes = [multiprocessing.Process(target=_read_some, args=(url, seed)) for seed in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    if limit is None:  # each shard was sent once
        assert {count for name, count in sent.items() if name.endswith(".tar")} == {size}


@pytest.mark.parametrize("value, expected", [("", None), ("1000", 1000), ("1.5 GB", 1_500_000_000), ("2t", 2 * 10**12)])
def test_limit_is_a_number_of_bytes(monkeypatch, value, expected):
    monkeypatch.setenv("VLP_CACHE_BYTES", value)
    assert cache_bytes() == expected


def test_limits_that_are_wrong_or_too_small_are_named(made, monkeypatch):
    monkeypatch.setenv("VLP_CACHE_BYTES", "much")
    with pytest.raises(UserError, match="VLP_CACHE_BYTES='much' is not a number of bytes"):
        cache_bytes()
    monkeypatch.setenv("VLP_CACHE_BYTES", "100")
    with serve(made[0]) as (url, _), pytest.raises(UserError, match="more than VLP_CACHE_BYTES=100"):
        read_all(url)


def open_stream(location: str, readers: int = 1) -> TrainDataset:
    preprocess = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")
    return TrainDataset([Source(location)], (Resize(mode="squash"),), preprocess, None, 1, 10_000, 0, readers=readers)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("readers", [1, 2])
def test_stream_of_remote_shards_is_that_of_local_ones(made, ahead, readers):
    def batches(location: str, prefetch: int) -> list[list[str]]:
        dataset = open_stream(location, readers)
        loader = training_loader(dataset, 0, 2 * len(dataset), 8, 0, 1, workers=1, prefetch_shards=prefetch)
        return [loaded.batch.keys for loaded in loader]

    random.seed(1)
    with serve(made[0], failures=0.2) as (url, _):
        assert batches(url, ahead) == batches(str(made[0]), 0)


def test_shards_are_downloaded_ahead_but_not_further(made, cache):
    with serve(made[0]) as (url, _):
        dataset = open_stream(url)
        dataset.order.orders[0].group_samples = SAMPLES  # a shard after the other
        dataset = pickle.loads(pickle.dumps(dataset))
        loader = training_loader(dataset, 0, SHARDS * SAMPLES, SAMPLES, 0, 1, workers=0, prefetch_shards=3)
        seen = []
        for _ in range(4):
            next(loader)
            wanted, waited = len(seen) + 4, threading.Event()
            for _ in range(200):
                done = len(list(cache.rglob("*.tar")))
                if done >= wanted:
                    break
                waited.wait(0.05)
            waited.wait(0.2)  # time in which a download too many would be seen
            seen.append(len(list(cache.rglob("*.tar"))))
        loader.close()
    assert all(number + 3 <= count <= number + 5 for number, count in enumerate(seen)), seen
