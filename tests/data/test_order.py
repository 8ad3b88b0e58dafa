"""The order of samples is a pure function of (seed, epoch, position)."""

import pickle

import numpy as np
import pytest

from vlp.data.order import MixtureOrder, SourceOrder, keyed_rng
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


READERS = (1, 2, 3, 8, 64)
TOGETHER = (1, 2, 3)


def units_of(sizes: list[int], together: int) -> dict[int, list[list[tuple[int, int]]]]:
    """Shard -> the units that begin in it, each of which is ``together`` consecutive samples of the source."""
    samples = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    units = {shard: [] for shard in range(len(sizes))}
    for n in range(0, len(samples), together):
        units[samples[n][0]].append(samples[n : n + together])
    return units


def reference_epoch(
    sizes: list[int], seed: int, readers: int, group_samples: int, epoch: int, together: int = 1
) -> list[tuple[int, int]]:
    """The samples of an epoch in the order in which they are drawn, by dealing one unit after the other."""
    units = units_of(sizes, together)
    line = [(int(s), unit) for s in keyed_rng(seed, epoch).permutation(len(sizes)) for unit in units[int(s)]]
    turns = [(epoch * len(line) + offset) % readers for offset in range(len(line))]  # reader of each draw
    parts, begin = [], 0
    for reader in range(readers):
        part = line[begin : begin + turns.count(reader)]
        begin += len(part)
        shuffled, groups, last = [], [], -1
        for n, sample in enumerate(part):
            begins_shard = n == 0 or part[n - 1][0] != sample[0]
            group = n // max(1, group_samples // (readers * together))
            if begins_shard and group > last:
                groups.append([])
                last = group
            groups[-1].append(sample)
        for number, group in enumerate(groups):
            order = keyed_rng(seed, epoch, 1 + number * readers + reader).permutation(len(group))
            shuffled += [group[n] for n in order]
        parts.append(iter(shuffled))
    return [sample for reader in turns for sample in next(parts[reader])[1]]


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("group_samples", [1, 30, 10_000])
def test_order_equals_dealing_one_unit_after_the_other(readers, group_samples, together):
    sizes = [5, 0, 13, 1, 8, 0, 20, 3, 4]
    order = SourceOrder(sizes, 3, readers, group_samples, together)
    for number in range(4):
        assert epoch(order, number) == reference_epoch(sizes, 3, readers, group_samples, number, together)


def test_first_positions_of_earlier_runs_are_unchanged():
    order = MixtureOrder([SourceOrder([40, 60], 0, readers=2), SourceOrder([30], 0, readers=2)], [3.0, 1.0], seed=5)
    found = [(d.source, d.epoch, d.shard, d.row) for d in map(order.locate, (0, 1, 2, 3, 500, 8191, 100_000))]
    assert found == [
        (0, 0, 0, 26),
        (0, 0, 1, 35),
        (0, 0, 0, 4),
        (0, 0, 1, 20),
        (0, 3, 1, 0),
        (1, 68, 0, 16),
        (1, 832, 0, 14),
    ]


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("readers", READERS)
def test_every_sample_exactly_once_an_epoch_for_any_number_of_readers(readers, together):
    sizes = [40, 0, 37, 1, 9, 3]
    order = SourceOrder(sizes, 0, readers, together=together)
    everything = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    for number in range(3):
        assert sorted(epoch(order, number)) == everything


@pytest.mark.parametrize("readers", READERS)
def test_mixture_of_readers_equals_one_mixture_a_reader(readers):
    """Reader r draws at positions r, r + R, ... as a stream of its own; the sources' shares are kept by every reader."""
    sources = [SourceOrder([300, 41], 0, readers), SourceOrder([40, 60], 0, readers)]
    order = MixtureOrder(sources, [3.0, 1.0], seed=5)
    turns = 2 * order.BLOCK
    found = [order.locate(p) for p in range(turns * readers)] if readers < 8 else None
    for reader in (0, readers // 2, readers - 1):
        drawn = [0, 0]
        draws = found[reader::readers] if found else [order.locate(t * readers + reader) for t in range(turns)]
        for draw in draws:
            number, offset = divmod(drawn[draw.source] * readers + reader, sources[draw.source].size)
            assert (draw.epoch, draw.shard, draw.row) == (number, *sources[draw.source].locate(number, offset))
            drawn[draw.source] += 1
        assert drawn == [6144, 2048]
    if found:  # each epoch of each source that is complete has every sample once
        for source, sizes in enumerate(([300, 41], [40, 60])):
            everything = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
            epochs = {}
            for draw in found:
                if draw.source == source:
                    epochs.setdefault(draw.epoch, []).append((draw.shard, draw.row))
            complete = drawn[source] * readers // len(everything)
            assert complete > 2 and all(sorted(epochs[number]) == everything for number in range(complete))


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_global_batch_has_the_same_rows_in_the_same_order_on_any_number_of_processes(world, together):
    whole = list(Positions(32, 96, 16, 0, 1, 8, together))
    parts = [list(Positions(32, 96, 16, rank, world, 8, together)) for rank in range(world)]
    assert [sum((part[n] for part in parts), []) for n in range(4)] == whole
    assert [sorted(batch) for batch in whole] == [list(range(32 + 16 * n, 48 + 16 * n)) for n in range(4)]
    for rank, part in enumerate(parts):  # the same readers in every batch
        readers = {p // together % 8 for batch in part for p in batch}
        assert readers == set(range(rank * 8 // world, (rank + 1) * 8 // world))


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_units_are_never_divided_between_batches_and_processes(world, readers):
    """A mixture of sources whose units have 1, 2 and 3 samples, in micro-batches of 24 on each number of processes."""
    sizes, sources = ([70, 31], [40, 8], [9, 30]), (1, 2, 3)
    orders = [SourceOrder(size, 0, readers, together=t) for size, t in zip(sizes, sources)]
    order = MixtureOrder(orders, [None, 4.0, 100.0], seed=1)
    assert order.together == 6
    units = [[unit for part in units_of(size, t).values() for unit in part] for size, t in zip(sizes, sources)]
    for rank in range(world):
        for positions in Positions(48, 480, 24, rank, world, readers, order.together):
            for n in range(0, len(positions), 6):  # a turn, of one source
                draws = [order.locate(p) for p in positions[n : n + 6]]
                source = draws[0].source
                assert {d.source for d in draws} == {source}
                for m in range(0, 6, sources[source]):
                    assert [(d.shard, d.row) for d in draws[m : m + sources[source]]] in units[source]


@pytest.mark.parametrize("readers", [1, 3])
def test_sources_with_units_keep_their_weights_and_epochs(readers):
    a, b = SourceOrder([300], 0, readers), SourceOrder([40, 61, 1], 0, readers, together=2)
    order = MixtureOrder([a, b], [3.0, 1.0], seed=5)
    draws = [order.locate(p) for p in range(order.BLOCK * order.together * readers)]
    assert np.bincount([d.source for d in draws], minlength=2).tolist() == [6144 * readers, 2048 * readers]
    for source, sizes in enumerate(([300], [40, 61, 1])):
        everything = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
        epochs = {}
        for d in draws:
            if d.source == source:
                epochs.setdefault(d.epoch, []).append((d.shard, d.row))
        assert sum(sorted(found) == everything for found in epochs.values()) >= len(epochs) - 2


def test_replacement_takes_the_place_of_the_bad_sample_in_its_unit():
    order = MixtureOrder([SourceOrder([50] * 4, 0, readers=2, together=2)], [None], 0)
    assert pickle.loads(pickle.dumps(order)).locate(61) == order.locate(61)
    for p in range(0, 200, 7):
        stand_ins = [order.replacement(p, attempt) for attempt in range(8)]
        assert {d.row % 2 for d in stand_ins} == {p % 2} and len({(d.shard, d.row) for d in stand_ins}) > 1


def test_units_must_divide_the_source():
    with pytest.raises(ValueError, match="101 samples cannot be divided into units of 2"):
        SourceOrder([50, 51], 0, together=2)


def test_batches_that_no_process_can_fill_are_left_out():
    assert list(Positions(0, 19, 8, 1, 2)) == [[4, 5, 6, 7], [12, 13, 14, 15]]


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_a_node_touches_its_share_of_the_shards(nodes):
    """In each epoch 1/N of the samples of each source, in whole shards apart from those at the two ends."""
    sizes = [[100] * 96, [7, 30, 20] * 32]
    orders = [SourceOrder(s, 0, readers=16, group_samples=800) for s in sizes]
    order = MixtureOrder(orders, [None, None], seed=0)
    touched = {}
    for node in range(nodes):
        for batch in Positions(0, 2 * order.size // 320 * 320, 320, node, nodes, readers=16):
            for draw in map(order.locate, batch):
                touched.setdefault((draw.source, draw.epoch, node), set()).add(draw.shard)
    for (source, _, _), shards in touched.items():
        share = sum(sizes[source]) / nodes
        assert sum(sizes[source][shard] for shard in shards) < share + 2 * max(sizes[source])
    assert all(len(shards) <= 96 / nodes + 1 for (source, _, _), shards in touched.items() if source == 0)
    for source in (0, 1):  # and together all of them
        assert set().union(*(touched[source, 0, node] for node in range(nodes))) == set(range(96))


def test_replacement_is_of_the_same_readers_part():
    order = MixtureOrder([SourceOrder([50] * 16, 0, readers=8)], [None], 0)
    own = {}
    for p in range(800):
        own.setdefault(p % 8, set()).add(order.locate(p).shard)
    for p in range(0, 800, 7):
        assert {order.replacement(p, attempt).shard for attempt in range(5)} <= own[p % 8]
