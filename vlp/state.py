"""What a run carries from step to step besides weights and optimizer: outside the wrapped module, changed after the step.

K rows of a queue, n samples of the data, E embedding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Momentum:
    """The momentum encoder: a moving average of the whole model that encodes keys or gives targets, without gradient.

    Args:
        decay: share of the old weights that stays at each step (MoCo 0.999, ALBEF and ESimCSE 0.995).
        mode: "train" = with dropout and batch statistics, as MoCo and ALBEF run theirs, but where the model is frozen;
            "eval" = without (ESimCSE).
    """

    decay: float = 0.999
    mode: Literal["train", "eval"] = "train"


class Average:
    """Exponential moving average of a model's weights: a <- decay * a + (1 - decay) * w, in float32 after every step.

    Buffers (running means) are copied, not averaged. ``network`` is the model with the averaged weights; it takes no
    gradient.
    """

    def __init__(self, model: nn.Module, decay: float, mode: Literal["train", "eval"] = "eval"):
        self.decay = decay
        self.network = copy.deepcopy(model).float().requires_grad_(False)
        if mode == "eval":  # else as the model: what is frozen there stays in evaluation mode here too
            self.network.eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        current = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self.network.parameters()), current, 1 - self.decay)
        for own, buffer in zip(self.network.buffers(), model.buffers()):
            own.copy_(buffer)

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)


class Queue:
    """The newest K rows, first in, first out (He et al. 2020, sec. 3.2), with the picture's index beside each.

    Any length, any number of rows at a time. It starts empty and grows: what has not been pushed is never a negative.

    Args:
        size: K.
        columns: name -> width E of the vectors kept side by side, e.g. {"image": 256, "text": 256}.
        generator: fills it with random unit vectors (index -1) at the start, as the published MoCo and ALBEF do; None =
            it starts empty.
    """

    def __init__(
        self, size: int, columns: dict[str, int], device: torch.device, generator: torch.Generator | None = None
    ):
        self._index = torch.full((size,), -1, dtype=torch.int64, device=device)
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
    def index(self) -> Tensor:
        """(len,) int64."""
        return self._index[: self._filled]

    def push(self, index: Tensor, **columns: Tensor) -> None:
        """Puts (B,) ``index`` and (B, E) rows in the place of the oldest; of more than K rows the last K stay."""
        size = len(self._index)
        slots = (self._pointer + torch.arange(len(index), device=index.device)) % size
        self._index[slots[-size:]] = index[-size:]
        for name, rows in columns.items():
            self._columns[name][slots[-size:]] = rows[-size:].detach().float()
        self._pointer = (self._pointer + len(index)) % size
        self._filled = min(size, self._filled + len(index))

    def tensors(self) -> dict[str, Tensor]:
        counters = torch.tensor([self._pointer, self._filled])
        return {"index": self._index, "counters": counters, **{f"column.{n}": c for n, c in self._columns.items()}}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._pointer, self._filled = tensors["counters"].tolist()
        self._index.copy_(tensors["index"])
        for name, rows in self._columns.items():
            rows.copy_(tensors[f"column.{name}"])


class Bank:
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

    def push(self, row: Tensor, embed: Tensor, partition: Tensor | None = None) -> None:
        """(B,) slots and their (B, E) new vectors, and (1,) the estimate of Z where there is one. Of a slot that comes
        twice the last one counts."""
        place = torch.arange(len(row), device=row.device)
        last = torch.full((len(self),), -1, device=row.device).scatter_reduce(0, row, place, "amax")
        kept = last[row] == place
        row, embed = row[kept], embed[kept].detach().float()
        self.rows[row] = F.normalize(self.momentum * self.rows[row] + (1 - self.momentum) * embed, dim=1)
        if partition is not None:
            self.partition.copy_(partition)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "partition": self.partition}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.rows.copy_(tensors["rows"])
        self.partition.copy_(tensors["partition"])


Memory = Queue | Bank


@dataclass
class TrainState:
    """Counters, averages and memories of a run.

    Args:
        step: optimizer steps done.
        position: samples of the global stream consumed; the whole state of the data.
        skipped: steps left out because of a non-finite loss.
        truncated_captions: captions cut at ``data.max_length`` so far, all processes.
        average: the weights that are evaluated; None where no average is kept.
        momentum: the momentum encoder; None where no objective has use for one.
        memory: objective's name -> its queue or bank.
    """

    step: int = 0
    position: int = 0
    skipped: int = 0
    truncated_captions: int = 0
    average: Average | None = None
    momentum: Average | None = None
    memory: dict[str, Memory] = field(default_factory=dict)

    def counters(self) -> dict:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of it, by file."""
        averages = {"average": self.average, "momentum": self.momentum}
        files = {name: average.tensors() for name, average in averages.items() if average}
        if self.memory:
            files["memory"] = {f"{o}/{name}": t for o, m in self.memory.items() for name, t in m.tensors().items()}
        return files

    def load(self, counters: dict, read) -> None:
        """From a checkpoint's counters and ``read(FILE) -> tensors``."""
        for name, value in counters.items():
            setattr(self, name, value)
        for name, average in {"average": self.average, "momentum": self.momentum}.items():
            if average:
                average.load(read(name))
        saved = read("memory") if self.memory else {}
        for objective, memory in self.memory.items():
            memory.load({k.removeprefix(f"{objective}/"): t for k, t in saved.items() if k.startswith(f"{objective}/")})
