"""The order of samples is a pure function of (seed, epoch, position)."""

import pickle

import numpy as np
import pytest

from vlp.data.order import MixtureOrder, SourceOrder
from vlp.data.stream import Positions


def epoch(order: SourceOrder, number: int) -> list[tuple[int, int]]:
    return [order.locate(number, offset) for offset in range(order.size)]


@pytest.mark.parametrize("group_samples", [1, 7, 40, 10_000])
def test_every_sample_exactly_once_an_epoch(group_samples):
    sizes = [5, 0, 13, 1, 8, 0, 20]
    order = SourceOrder(sizes, seed=3, group_samples=group_samples)
    everything = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    for number in range(3):
        assert sorted(epoch(order, number)) == everything


def test_epochs_and_seeds_differ_and_repeat():
    a, b = SourceOrder([50, 50], seed=0), SourceOrder([50, 50], seed=1)
    assert epoch(a, 0) != epoch(a, 1)
    assert epoch(a, 0) != epoch(b, 0)
    assert epoch(a, 1) == epoch(SourceOrder([50, 50], seed=0), 1)


def test_group_reads_only_neighbouring_shards():
    order = SourceOrder([10] * 20, seed=0, group_samples=50)
    shards = [shard for shard, _ in epoch(order, 0)]
    assert all(len(set(shards[i : i + 50])) == 5 for i in range(0, 200, 50))


def test_any_position_is_located_directly():
    order = MixtureOrder([SourceOrder([1000] * 3, 0), SourceOrder([500], 0)], [None, None], 0)
    forwards = [order.locate(p) for p in range(9000)]
    fresh = MixtureOrder([SourceOrder([1000] * 3, 0), SourceOrder([500], 0)], [None, None], 0)
    assert [fresh.locate(p) for p in (8999, 17, 4096, 4095)] == [forwards[p] for p in (8999, 17, 4096, 4095)]
    assert pickle.loads(pickle.dumps(order)).locate(8000) == forwards[8000]


def test_mixture_keeps_its_weights_and_each_source_its_epochs():
    a, b = SourceOrder([300], 0), SourceOrder([40, 60], 0)
    order = MixtureOrder([a, b], [3.0, 1.0], seed=5)
    draws = [order.locate(p) for p in range(8192)]
    counts = np.bincount([d.source for d in draws], minlength=2)
    assert counts.tolist() == [6144, 2048]
    second = [(d.shard, d.row) for d in draws if d.source == 1]
    everything = [(shard, row) for shard, size in enumerate([40, 60]) for row in range(size)]
    for start in range(0, 2000, 100):  # 20 whole epochs of the second source, each complete
        assert sorted(second[start : start + 100]) == everything
    assert [d.epoch for d in draws if d.source == 1] == [n // 100 for n in range(2048)]


def test_mixture_counters_never_run_backwards():
    order = MixtureOrder([SourceOrder([n], 0) for n in (5, 1000, 70)], [0.001, 0.9, 0.099], 0)
    counts = np.array([order.counts(block) for block in range(200)])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts.sum(1) == np.arange(200) * order.BLOCK).all()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_split_the_same_global_batches(world):
    batches = [list(Positions(16, 80, 8, rank, world)) for rank in range(world)]
    assert [sum((part[n] for part in batches), []) for n in range(8)] == [
        list(range(16 + 8 * n, 24 + 8 * n)) for n in range(8)
    ]


def test_replacement_is_from_the_same_source_and_depends_on_the_attempt():
    order = MixtureOrder([SourceOrder([50], 0), SourceOrder([60], 0)], [None, None], 0)
    for position in range(20):
        stand_ins = [order.replacement(position, attempt) for attempt in range(8)]
        assert {d.source for d in stand_ins} == {order.locate(position).source}
        assert len({d.row for d in stand_ins}) > 1
        assert stand_ins == [order.replacement(position, attempt) for attempt in range(8)]
