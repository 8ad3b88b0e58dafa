"""State of an objective across steps: a first-in first-out queue, or a memory bank with a row per sample.

K rows of a queue, n samples of the data, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Queue:
    """The newest K rows, first in, first out (He et al. 2020, sec. 3.2), with the picture's index beside each.

    Any length, any number of rows at a time. It starts empty and grows: what has not been pushed is never a negative.

    Args:
        size: K.
        columns: name -> width E of the vectors kept side by side, e.g. {"image": 256, "text": 256}.
        generator: fills it with random unit vectors (image_id -1) at the start, as the published MoCo and ALBEF do; None =
            it starts empty.
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
        """Rows that it holds by now."""
        return self._filled

    def __getitem__(self, name: str) -> Tensor:
        """(len, E) rows of a column; a view: it changes with the next push."""
        return self._columns[name][: self._filled]

    @property
    def image_id(self) -> Tensor:
        """(len,) int64."""
        return self._image_id[: self._filled]

    def push(self, image_id: Tensor, **columns: Tensor) -> None:
        """Puts (B,) ``image_id`` and (B, E) rows in the place of the oldest; of more than K rows the last K stay."""
        size = len(self._image_id)
        slots = (self._pointer + torch.arange(len(image_id), device=image_id.device)) % size
        self._image_id[slots[-size:]] = image_id[-size:]
        for name, rows in columns.items():
            self._columns[name][slots[-size:]] = rows[-size:].detach().float()
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
    """One vector for every sample of the data (Wu et al. 2018, sec. 3.2), replaced by v <- normalise(m v + (1 - m) f).

    Args:
        size: n.
        width: E.
        momentum: m; the paper's is 0, its published code's 0.5.
        generator: draws the first vectors, uniform in +-sqrt(3 / E) as published: their norms are about 1.
    """

    def __init__(self, size: int, width: int, momentum: float, device: torch.device, generator: torch.Generator):
        bound = (3 / width) ** 0.5
        self.rows = ((2 * torch.rand(size, width, generator=generator) - 1) * bound).to(device)
        self.partition = torch.zeros(1, device=device)  # Z of the NCE loss, 0 = not estimated yet
        self.momentum = momentum

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, dataset_row: Tensor, embed: Tensor, partition: Tensor | None = None) -> None:
        """(B,) slots and their (B, E) new vectors, and (1,) the estimate of Z where there is one. Of a slot that comes
        twice the last one counts."""
        order = torch.arange(len(dataset_row), device=dataset_row.device)
        last = torch.full((len(self),), -1, device=order.device).scatter_reduce(0, dataset_row, order, "amax")
        kept = last[dataset_row] == order
        row, embed = dataset_row[kept], embed[kept].detach().float()
        self.rows[row] = F.normalize(self.momentum * self.rows[row] + (1 - self.momentum) * embed, dim=1)
        if partition is not None:
            self.partition.copy_(partition)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "partition": self.partition}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.rows.copy_(tensors["rows"])
        self.partition.copy_(tensors["partition"])


Memory = Queue | MemoryBank
