"""Order of the training stream: which sample is at a position.

The functions are pure in (seed, epoch, position). Neither the number of processes, nor of workers, nor a restart changes
the order, and the state of a run's data is one integer.

The global stream is endless. Positions continue across epochs, so a batch at the end of an epoch takes its last rows from
the next epoch: every batch is full, and every process has the same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

GROUP_SAMPLES = 65_536  # samples that are shuffled together


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

    Shards are permuted and divided into groups of at least ``group_samples`` samples. The samples of a group are permuted
    together. The shuffle is complete within a group, while reads stay inside the few shards of that group.

    Args:
        shard_sizes: Samples of each shard.
        group_samples: Least size of a group, in samples. A smaller source is shuffled completely.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, group_samples: int = GROUP_SAMPLES):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.group_samples = seed, group_samples
        self.size = int(self.shard_sizes.sum())
        # per instance: a process may open several orders, and a worker only moves forward, so two entries are enough
        self._epoch = lru_cache(maxsize=2)(self._epoch_layout)
        self._group = lru_cache(maxsize=2)(self._group_permutation)

    def _epoch_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Permute the shards of an epoch.

        Returns:
            (S,) permuted shards; (S + 1,) first offset of each permuted shard, and the end; first permuted shard of each
            group.
        """
        shards = keyed_rng(self.seed, epoch).permutation(len(self.shard_sizes))
        starts = np.concatenate([[0], np.cumsum(self.shard_sizes[shards])])
        # a shard begins a new group where the samples before it pass a multiple of group_samples
        group_of = starts[:-1] // self.group_samples
        first = np.flatnonzero(np.diff(group_of, prepend=-1) > 0)
        return shards, starts, first

    def _group_permutation(self, epoch: int, group: int) -> tuple[int, np.ndarray]:
        _, starts, first = self._epoch(epoch)
        begin = int(starts[first[group]])
        end = int(starts[first[group + 1]]) if group + 1 < len(first) else self.size
        return begin, keyed_rng(self.seed, epoch, 1 + group).permutation(end - begin)

    def locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """Return (shard, row) of the sample at ``offset`` of ``epoch``, 0 <= offset < size."""
        shards, starts, first = self._epoch(epoch)
        group = int(np.searchsorted(starts[first], offset, side="right")) - 1
        begin, permutation = self._group(epoch, group)
        shuffled = begin + int(permutation[offset - begin])
        slot = int(np.searchsorted(starts, shuffled, side="right")) - 1  # the last of equal starts: skips empty shards
        return int(shards[slot]), shuffled - int(starts[slot])

    def __getstate__(self):
        return (self.shard_sizes, self.seed, self.group_samples)

    def __setstate__(self, state):
        self.__init__(*state)


class MixtureOrder:
    """Interleaving of sources by weight. Each source has its own counter and runs through its own epochs.

    Over every ``BLOCK`` positions each source gets its share to within one sample, so the counters are a closed form of
    the position.

    Args:
        orders: One order per source.
        weights: Relative share of the stream of each source. None stands for the number of its samples.
    """

    BLOCK = 4096

    def __init__(self, orders: Sequence[SourceOrder], weights: Sequence[float | None], seed: int):
        self.orders, self.weights, self.seed = list(orders), list(weights), seed
        shares = np.array([order.size if w is None else w for order, w in zip(orders, weights)], dtype=np.float64)
        self.shares = shares / shares.sum()
        self.size = sum(order.size for order in orders)
        self._arranged = lru_cache(maxsize=4)(self._arrange)

    def counts(self, block: int) -> np.ndarray:
        """Return (sources,) how many samples of each source come before the first position of ``block``."""
        drawn = np.floor(block * self.BLOCK * self.shares).astype(np.int64)
        largest = int(np.argmax(self.shares))  # takes the remainder of the rounding
        drawn[largest] += block * self.BLOCK - drawn.sum()
        return drawn

    def _arrange(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each position of a block, its source and how many samples that source gave before it."""
        before, after = self.counts(block), self.counts(block + 1)
        source = np.repeat(np.arange(len(self.orders)), after - before)  # (BLOCK,)
        source = source[keyed_rng(self.seed, 1, block).permutation(self.BLOCK)]
        draw = np.empty(self.BLOCK, dtype=np.int64)
        for s in range(len(self.orders)):
            slots = np.flatnonzero(source == s)
            draw[slots] = before[s] + np.arange(len(slots))
        return source, draw

    def locate(self, position: int) -> SampleRef:
        """Return the sample at ``position`` (0 <= position) of the endless stream."""
        block, slot = divmod(position, self.BLOCK)
        source, draw = self._arranged(block)
        chosen = int(source[slot])
        order = self.orders[chosen]
        epoch, offset = divmod(int(draw[slot]), order.size)
        return SampleRef(chosen, epoch, *order.locate(epoch, offset))

    def replacement(self, position: int, attempt: int) -> SampleRef:
        """Return a random sample of the same source that replaces a bad one at ``position``, another one per attempt."""
        bad = self.locate(position)
        order = self.orders[bad.source]
        offset = int(keyed_rng(self.seed, 2, position, attempt).integers(order.size))
        return SampleRef(bad.source, bad.epoch, *order.locate(bad.epoch, offset))

    def __getstate__(self):
        return (self.orders, self.weights, self.seed)

    def __setstate__(self, state):
        self.__init__(*state)
