"""Order of the training stream: which sample is at a position.

The functions are pure in (seed, epoch, position). Neither the number of processes, nor of workers, nor a restart changes
the order, and the state of a run's data is one integer.

The global stream is endless. Positions continue across epochs, so a batch at the end of an epoch takes its last rows from
the next epoch: every batch is full, and every process has the same number of steps.

The stream is dealt to R *canonical readers*: position p belongs to reader p mod R. In each epoch of a source, every reader
has a part of its own of the permuted shards. A process reads the positions of R / processes readers, and therefore opens
only the shards of these. The order depends on R and not on the number of processes. With R = 1 every process reads every
shard.

A source may name related samples, such as the two images of a minimal pair, that losses must see in the same batch: every
``together`` consecutive samples are a *unit*, which is shuffled, dealt to a reader and drawn as a whole. Units of different
sizes are mixed in turns of ``MixtureOrder.together`` positions, the least common multiple of the sizes. Turn t belongs to
reader t mod R. If every unit is one sample, turns are positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

GROUP_SAMPLES = 65_536  # samples that are shuffled together, over all readers


def keyed_rng(*key: int) -> np.random.Generator:
    """Return a random generator that depends only on ``key`` (non-negative integers)."""
    return np.random.default_rng(key)


@dataclass(frozen=True)
class SampleRef:
    """Reference to one sample of the stream: row ``row`` of shard ``shard`` of source ``source``, in ``epoch`` of that source."""

    source: int
    epoch: int
    shard: int
    row: int


class SourceOrder:
    """Shuffle of one source, a new one each epoch, in which every sample occurs exactly once.

    The samples of the permuted shards form one line, of which each reader gets a contiguous part. The parts differ by one
    sample at most, so two readers may share a shard at the border of their parts. The m-th draw of a source, m = 0, 1, ...,
    belongs to reader m mod R.

    The shards of a part are divided into groups of at least ``group_samples`` / R samples. The samples of a group are
    permuted together. The shuffle is complete within a group, while reads stay inside the few shards of that group.

    With ``together`` > 1, all this holds for units of consecutive samples instead of samples. A unit belongs to the shard of
    its first sample, and may end in the next one. Its samples follow each other in their order in the source.

    Args:
        shard_sizes: Samples of each shard.
        readers: Number R of canonical readers.
        group_samples: Least size of the groups of all readers together, in samples. A smaller part is shuffled completely.
        together: Samples of a unit. It divides the number of samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        readers: int = 1,
        group_samples: int = GROUP_SAMPLES,
        together: int = 1,
    ):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.readers, self.group_samples, self.together = seed, readers, group_samples, together
        self.size = int(self.shard_sizes.sum())
        if self.size % together:
            raise ValueError(f"{self.size} samples cannot be divided into units of {together}")
        self.units = self.size // together
        self._shard_starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])  # (S + 1,) in samples
        self._first_units = -(-self._shard_starts // together)  # (S + 1,) first unit that begins in each shard
        # per instance: a process may open several orders. A worker only moves forward, so two entries per reader are enough.
        self._line = lru_cache(maxsize=2)(self._permuted_shards)
        self._part = lru_cache(maxsize=2 * readers)(self._part_of)
        self._group = lru_cache(maxsize=2 * readers)(self._group_permutation)

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (S,) the permuted shards of an epoch, and (S + 1,) the first unit of each in the line, and the end."""
        shards = keyed_rng(self.seed, epoch).permutation(len(self.shard_sizes))
        return shards, np.concatenate([[0], np.cumsum(np.diff(self._first_units)[shards])])

    def _part_of(self, epoch: int, reader: int) -> tuple[int, int, np.ndarray]:
        """Return begin and end of a reader's part of the line, and the offset in it at which each of its groups begins."""
        least, more = divmod(self.units, self.readers)
        # the first draws of an epoch give one unit more to ``more`` readers, counted from the one with the first draw
        first = epoch * self.units % self.readers
        begin, end = (n * least + _overlap(n, first, first + more, self.readers) for n in (reader, reader + 1))
        _, starts = self._line(epoch)
        low, high = np.searchsorted(starts, begin, side="right") - 1, np.searchsorted(starts, end, side="left")
        offsets = np.maximum(starts[low:high] - begin, 0)  # of the shards in the part
        # a shard begins a new group where the units before it pass a multiple of the size of a group
        group_of = offsets // max(1, self.group_samples // (self.readers * self.together))
        return begin, end, offsets[np.diff(group_of, prepend=-1) > 0]

    def _group_permutation(self, epoch: int, reader: int, group: int) -> np.ndarray:
        begin, end, groups = self._part(epoch, reader)
        size = (groups[group + 1] if group + 1 < len(groups) else end - begin) - groups[group]
        return keyed_rng(self.seed, epoch, 1 + group * self.readers + reader).permutation(size)

    def reader(self, epoch: int, offset: int) -> int:
        """Return the reader that the sample at ``offset`` of ``epoch`` belongs to."""
        return (epoch * self.units + offset // self.together) % self.readers

    def locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """Return (shard, row) of the sample at ``offset`` of ``epoch``, 0 <= offset < size."""
        reader, (unit, member) = self.reader(epoch, offset), divmod(offset, self.together)
        begin, _, groups = self._part(epoch, reader)
        draw = unit // self.readers
        group = int(np.searchsorted(groups, draw, side="right")) - 1
        first = int(groups[group])
        place = begin + first + int(self._group(epoch, reader, group)[draw - first])  # of the unit in the line
        shards, starts = self._line(epoch)
        slot = int(np.searchsorted(starts, place, side="right")) - 1  # the last of equal starts: skips empty shards
        chosen = self._first_units[shards[slot]] + place - starts[slot]  # unit of the source
        sample = int(chosen) * self.together + member
        shard = int(np.searchsorted(self._shard_starts, sample, side="right")) - 1
        return shard, sample - int(self._shard_starts[shard])

    def random_offset(self, epoch: int, offset: int, rng: np.random.Generator) -> int:
        """Draw another offset of ``epoch`` that belongs to the same reader, and has the same place in its unit."""
        unit, member = divmod(offset, self.together)
        first = unit % self.readers
        drawn = first + self.readers * int(rng.integers(-(-(self.units - first) // self.readers)))
        return drawn * self.together + member

    def __getstate__(self):
        return (self.shard_sizes, self.seed, self.readers, self.group_samples, self.together)

    def __setstate__(self, state):
        self.__init__(*state)


def _overlap(n: int, begin: int, end: int, period: int) -> int:
    """Count the integers below ``n`` that are in [begin, end) modulo ``period``, for 0 <= n, begin < end <= 2 period."""
    return max(0, min(n, end) - begin) + max(0, min(n, end - period))


class MixtureOrder:
    """Interleaving of sources by weight. Each source has its own counter and runs through its own epochs.

    The stream consists of turns of ``together`` consecutive positions, each of which is one or several units of one source.
    Every reader draws from all sources. Over every ``BLOCK`` turns of a reader each source gets its share to within one
    turn, the same number for all readers, so the counters are a closed form of the position. A batch that begins and ends
    with a turn has only whole units.

    Args:
        orders: One order per source, all with the same number of readers.
        weights: Relative share of the stream of each source. None stands for the number of its samples.
    """

    BLOCK = 4096

    def __init__(self, orders: Sequence[SourceOrder], weights: Sequence[float | None], seed: int):
        self.orders, self.weights, self.seed = list(orders), list(weights), seed
        self.readers = self.orders[0].readers
        self.together = math.lcm(*(order.together for order in orders))
        shares = np.array([order.size if w is None else w for order, w in zip(orders, weights)], dtype=np.float64)
        self.shares = shares / shares.sum()
        self.size = sum(order.size for order in orders)
        self._arranged = lru_cache(maxsize=2 + 2 * self.readers)(self._arrange)

    def counts(self, block: int) -> np.ndarray:
        """Return (sources,) how many turns of each source a reader draws before the first turn of its ``block``."""
        drawn = np.floor(block * self.BLOCK * self.shares).astype(np.int64)
        largest = int(np.argmax(self.shares))  # takes the remainder of the rounding
        drawn[largest] += block * self.BLOCK - drawn.sum()
        return drawn

    def _arrange(self, block: int, reader: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each turn of a reader's block, its source and how many turns the reader drew from it before."""
        before, after = self.counts(block), self.counts(block + 1)
        source = np.repeat(np.arange(len(self.orders)), after - before)  # (BLOCK,)
        source = source[keyed_rng(self.seed, 1, block * self.readers + reader).permutation(self.BLOCK)]
        draw = np.empty(self.BLOCK, dtype=np.int64)
        for s in range(len(self.orders)):
            slots = np.flatnonzero(source == s)
            draw[slots] = before[s] + np.arange(len(slots))
        return source, draw

    def _offset(self, position: int) -> tuple[int, int, int]:
        """Return (source, epoch of the source, offset in the epoch) at ``position``."""
        turn, within = divmod(position, self.together)
        turn, reader = divmod(turn, self.readers)
        block, slot = divmod(turn, self.BLOCK)
        source, draw = self._arranged(block, reader)
        order = self.orders[chosen := int(source[slot])]
        unit, member = divmod(int(draw[slot]) * self.together + within, order.together)  # of those the reader draws
        epoch, unit = divmod(unit * self.readers + reader, order.units)
        return chosen, epoch, unit * order.together + member

    def locate(self, position: int) -> SampleRef:
        """Return the sample at ``position`` (0 <= position) of the endless stream."""
        source, epoch, offset = self._offset(position)
        return SampleRef(source, epoch, *self.orders[source].locate(epoch, offset))

    def replacement(self, position: int, attempt: int) -> SampleRef:
        """Return a random sample that replaces a bad one at ``position``, another one per attempt.

        It is of the same source and the same reader's part. In a unit of several samples, it takes the place of the bad
        one, and the other samples of the unit stay.
        """
        source, epoch, offset = self._offset(position)
        order = self.orders[source]
        offset = order.random_offset(epoch, offset, keyed_rng(self.seed, 2, position, attempt))
        return SampleRef(source, epoch, *order.locate(epoch, offset))

    def __getstate__(self):
        return (self.orders, self.weights, self.seed)

    def __setstate__(self, state):
        self.__init__(*state)
