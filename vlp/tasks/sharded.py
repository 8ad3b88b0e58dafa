"""Divide an evaluation among the processes. The result does not depend on how many there are, to the bit.

The batches are fixed by the data set and the batch size. Process r of W computes batches r, r + W, r + 2 W, ..., and the
rows of all processes are then put back in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from vlp.data.other_images import OtherImages
from vlp.data.stream import evaluation_batches
from vlp.distributed import gather_objects, rank, world_size
from vlp.tasks.base import EvalModel
from vlp.tasks.progress import tracked


class ShardedBatches:
    """This process's share of the batches of a data set, and the samples that were skipped in them.

    ```
    batches = ShardedBatches(model, dataset, batch_size)
    rows = []
    for samples in batches:
        rows += [(raw.source_row, score) for raw, score in ...]
    rows, skipped = batches.gather(rows)
    ```

    Args:
        model: Gives the data workers. If it is blind, each sample has the image of another one.
        dataset: Returns, for a list of positions, the usable samples and a record of each skipped one.
        batch_size: Samples of a batch. Batches without a usable sample are not yielded.
    """

    def __init__(self, model: EvalModel, dataset: Dataset, batch_size: int):
        self.dataset = OtherImages(dataset, model.seed) if model.is_blind else dataset
        self.batch_size, self.workers = batch_size, model.data.workers
        self._skipped: list[list[dict]] = []  # of each batch

    def __iter__(self) -> Iterator[list]:
        count = len(range(rank(), -(-len(self.dataset) // self.batch_size), world_size()))
        batches = evaluation_batches(self.dataset, self.batch_size, self.workers, rank(), world_size())
        for samples, skipped in tracked(batches, count):
            self._skipped.append(list(skipped))
            if samples:
                yield samples

    def skip(self, record: dict) -> None:
        """Record a sample of the current batch that the task itself rejects."""
        self._skipped[-1].append(record)

    def gather(self, rows: list[tuple]) -> tuple[list[Any], list[dict]]:
        """Return the rows of all processes, sorted by their first element, and the records of all skipped samples."""
        every = [row for part in gather_objects(rows) for row in part]
        return sorted(every, key=lambda row: row[0]), self.gather_skipped()

    def gather_skipped(self) -> list[dict]:
        """Return the records of all skipped samples, in the order of the batches."""
        rounds = zip_longest(*gather_objects(self._skipped), fillvalue=[])
        return [record for batches in rounds for batch in batches for record in batch]


def length_batches(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield this process's share of batches of texts of similar length, which need little padding.

    Args:
        lengths: (n,) length of each text.

    Yields:
        (B,) positions of the texts.
    """
    batches = lengths.argsort(stable=True).split(batch_size)[rank() :: world_size()]
    yield from tracked(batches, len(batches))


def sum_disjoint(rows: Tensor) -> Tensor:
    """All-reduce a tensor of which each row is nonzero in one process only. The sum is exact. Works in place."""
    if world_size() > 1:
        dist.all_reduce(rows)
    return rows


def gather_rows(count: int, own: list[tuple[Any, Tensor]]) -> Tensor:
    """Return the rows of all processes in one tensor.

    Args:
        count: n, rows of all processes.
        own: Positions of rows that this process computed, and the (B, D) rows.

    Returns:
        (n, D) float32, zero in rows that no process computed.
    """
    width = max(gather_objects(max((rows.shape[1] for _, rows in own), default=0)))  # a process may have no batch
    gathered = torch.zeros(count, width)
    for positions, rows in own:
        gathered[positions] = rows
    return sum_disjoint(gathered)
