"""Which sample stands at a position of the stream: pure functions of (seed, epoch, position), so that neither the number
of processes, nor of workers, nor a restart can change the order, and the state of a run's data is one integer.

The global stream is endless: positions run on across epochs, so that a batch at the end of an epoch takes its last rows
from the next one, every batch is full, and every process has the same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

GROUP_SAMPLES = 65_536  # that are shuffled together


def stream(*key: int) -> np.random.Generator:
    """Random numbers that depend on ``key`` (non-negative integers) and on nothing else."""
    return np.random.default_rng(key)


@dataclass(frozen=True)
class SampleRef:
    """One sample of the stream: row ``row`` of shard ``shard`` of source ``source``, in that source's epoch ``epoch``."""

    source: int
    epoch: int
    shard: int
    row: int


class SourceOrder:
    """Shuffles one source anew every epoch, each sample exactly once.

    Shards are permuted, cut into groups of at least ``group_samples`` samples, and the samples of a group are permuted
    together: the shuffle is complete within a group while reads stay inside the few shards of that group.

    Args:
        shard_sizes: samples of each shard.
        group_samples: samples; a source smaller than this is shuffled completely.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, group_samples: int = GROUP_SAMPLES):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.group_samples = seed, group_samples
        self.size = int(self.shard_sizes.sum())
        # per order, not per process: a test opens several, and a worker only ever walks forwards
        self._epoch = lru_cache(maxsize=2)(self._epoch_layout)
        self._group = lru_cache(maxsize=2)(self._group_permutation)

    def _epoch_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Permuted shards; first position of each permuted shard (and the end); first permuted shard of each group."""
        shards = stream(self.seed, epoch).permutation(len(self.shard_sizes))
        starts = np.concatenate([[0], np.cumsum(self.shard_sizes[shards])])
        # a shard opens a new group where the samples before it pass a multiple of group_samples
        group_of = starts[:-1] // self.group_samples
        first = np.flatnonzero(np.diff(group_of, prepend=-1) > 0)
        return shards, starts, first

    def _group_permutation(self, epoch: int, group: int) -> tuple[int, np.ndarray]:
        _, starts, first = self._epoch(epoch)
        begin = int(starts[first[group]])
        end = int(starts[first[group + 1]]) if group + 1 < len(first) else self.size
        return begin, stream(self.seed, epoch, 1 + group).permutation(end - begin)

    def locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """(shard, row) of the sample at ``offset`` (0 <= offset < size) of ``epoch``."""
        shards, starts, first = self._epoch(epoch)
        group = int(np.searchsorted(starts[first], offset, side="right")) - 1
        begin, permutation = self._group(epoch, group)
        position = begin + int(permutation[offset - begin])
        slot = int(np.searchsorted(starts, position, side="right")) - 1  # empty shards are passed over
        return int(shards[slot]), position - int(starts[slot])

    def __getstate__(self):
        return (self.shard_sizes, self.seed, self.group_samples)

    def __setstate__(self, state):
        self.__init__(*state)


class MixtureOrder:
    """Interleaves sources by weight; each source keeps a counter of its own and runs through its own epochs.

    Over any stretch of ``BLOCK`` positions every source gets its share to within one sample, so the counters are a closed
    form of the position.

    Args:
        orders: one a source.
        weights: relative share of the stream of each source; None = its number of samples.
    """

    BLOCK = 4096

    def __init__(self, orders: Sequence[SourceOrder], weights: Sequence[float | None], seed: int):
        self.orders, self.weights, self.seed = list(orders), list(weights), seed
        shares = np.array([order.size if w is None else w for order, w in zip(orders, weights)], dtype=np.float64)
        self.shares = shares / shares.sum()
        self.size = sum(order.size for order in orders)
        self._arranged = lru_cache(maxsize=4)(self._arrange)

    def counts(self, block: int) -> np.ndarray:
        """Samples drawn from each source before the first position of ``block``."""
        drawn = np.floor(block * self.BLOCK * self.shares).astype(np.int64)
        largest = int(np.argmax(self.shares))  # takes what rounding leaves, and has room for it
        drawn[largest] += block * self.BLOCK - drawn.sum()
        return drawn

    def _arrange(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a block: its source, and how many draws that source had before it since step 0."""
        before, after = self.counts(block), self.counts(block + 1)
        source = np.repeat(np.arange(len(self.orders)), after - before)
        source = source[stream(self.seed, 1, block).permutation(self.BLOCK)]
        draw = np.empty(self.BLOCK, dtype=np.int64)
        for s in range(len(self.orders)):
            rows = np.flatnonzero(source == s)
            draw[rows] = before[s] + np.arange(len(rows))
        return source, draw

    def locate(self, position: int) -> SampleRef:
        """The sample at ``position`` (0 <= position) of the endless stream."""
        block, slot = divmod(position, self.BLOCK)
        source, draw = self._arranged(block)
        chosen = int(source[slot])
        order = self.orders[chosen]
        epoch, offset = divmod(int(draw[slot]), order.size)
        return SampleRef(chosen, epoch, *order.locate(epoch, offset))

    def another(self, position: int, attempt: int) -> SampleRef:
        """What stands in for the sample at ``position`` if that is bad: any sample of the same source, drawn anew a try."""
        draw = self.locate(position)
        order = self.orders[draw.source]
        offset = int(stream(self.seed, 2, position, attempt).integers(order.size))
        return SampleRef(draw.source, draw.epoch, *order.locate(draw.epoch, offset))

    def __getstate__(self):
        return (self.orders, self.weights, self.seed)

    def __setstate__(self, state):
        self.__init__(*state)
