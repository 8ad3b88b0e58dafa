"""State of an objective across steps: a first-in first-out queue, or a memory bank with a row per sample.

K rows of a queue, n samples of the data, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class QueueLike(Protocol):
    """State that `Objective.init_queue` returns: a `Queue`, a `MemoryBank`, or one of your own."""

    @property
    def push(self) -> Callable[..., None]:
        """Called after the step, without gradients, with what `Objective.enqueue` returned as keyword arguments."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint must keep."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        ...


class Queue:
    """The newest K rows, first in, first out (He et al. 2020, sec. 3.2), with the image id of each row.

    Any length, and any number of rows at a time. It starts empty and grows: rows that were never pushed are not negatives.

    Args:
        size: K.
        columns: Name -> width E of the vectors that each row has, e.g. {"image": 256, "text": 256}.
        generator: Fills the queue with random unit vectors (image id -1) at the start, as the published MoCo and ALBEF do.
            None leaves it empty.
    """

    def __init__(
        self, size: int, columns: dict[str, int], device: torch.device, generator: torch.Generator | None = None
    ):
        self._image_id = torch.full((size,), -1, dtype=torch.int64, device=device)
        self._columns = {name: torch.zeros(size, width, device=device) for name, width in columns.items()}
        self._pointer = self._filled = 0
        if generator is not None:
            self._filled = size
            for rows in self._columns.values():
                rows.copy_(F.normalize(torch.randn(rows.shape, generator=generator), dim=1))

    def __len__(self) -> int:
        """Return the number of rows that have been filled."""
        return self._filled

    def __getitem__(self, name: str) -> Tensor:
        """Return the (len, E) rows of a column. It is a view, which changes with the next push."""
        return self._columns[name][: self._filled]

    @property
    def image_id(self) -> Tensor:
        """(len,) int64."""
        return self._image_id[: self._filled]

    def push(self, image_id: Tensor, **columns: Tensor) -> None:
        """Replace the oldest rows by (B,) ids and (B, E) rows. Of more than K rows, the last K stay."""
        size = len(self._image_id)
        slots = (self._pointer + torch.arange(len(image_id), device=image_id.device)) % size
        self._image_id[slots[-size:]] = image_id[-size:]
        for name, rows in columns.items():
            column = self._columns[name]
            column[slots[-size:]] = rows[-size:].detach().to(column.dtype)
        self._pointer = (self._pointer + len(image_id)) % size
        self._filled = min(size, self._filled + len(image_id))

    def tensors(self) -> dict[str, Tensor]:
        counters = torch.tensor([self._pointer, self._filled])
        return {"index": self._image_id, "counters": counters, **{f"column.{n}": c for n, c in self._columns.items()}}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._pointer, self._filled = tensors["counters"].tolist()
        self._image_id.copy_(tensors["index"])
        for name, rows in self._columns.items():
            rows.copy_(tensors[f"column.{name}"])


class MemoryBank:
    """One vector for every sample of the data (Wu et al. 2018, sec. 3.2), updated by v <- normalise(m v + (1 - m) f).

    Args:
        size: n.
        width: E.
        momentum: m; the paper's is 0, that of its published code 0.5.
        generator: Draws the first vectors, uniform in +-sqrt(3 / E) as published, so that their norms are about 1.
    """

    def __init__(self, size: int, width: int, momentum: float, device: torch.device, generator: torch.Generator):
        bound = (3 / width) ** 0.5
        self.rows = ((2 * torch.rand(size, width, generator=generator) - 1) * bound).to(device)
        self.partition = torch.zeros(1, device=device)  # Z of the NCE loss; 0 until it is estimated
        self.has_partition = False
        self.momentum = momentum

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, dataset_row: Tensor, embed: Tensor, partition: Tensor | None = None) -> None:
        """Update (B,) rows with their (B, E) new vectors, and set the (1,) estimate of Z if there is one.

        Of a row that occurs twice, the last vector counts.
        """
        order = torch.arange(len(dataset_row), device=dataset_row.device)
        last = torch.full((len(self),), -1, device=order.device).scatter_reduce(0, dataset_row, order, "amax")  # (n,)
        embed = embed[last[dataset_row]].detach().to(self.rows.dtype)  # equal for equal rows
        updated = self.momentum * self.rows[dataset_row] + (1 - self.momentum) * embed
        self.rows[dataset_row] = F.normalize(updated, dim=1)
        if partition is not None:
            self.partition.copy_(partition)
            self.has_partition = True

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "partition": self.partition}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.rows.copy_(tensors["rows"])
        self.partition.copy_(tensors["partition"])
        self.has_partition = bool(self.partition != 0)
