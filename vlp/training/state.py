"""What a run carries from step to step besides weights and optimizer: outside the wrapped module, changed after the step.

K rows of a queue, n samples of the data, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vlp.objectives.queues import QueueLike
from vlp.optim.ema import EMA


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
        queues: objective's name -> its queue or bank.
    """

    step: int = 0
    position: int = 0
    skipped: int = 0
    truncated_captions: int = 0
    average: EMA | None = None
    momentum: EMA | None = None
    queues: dict[str, QueueLike] = field(default_factory=dict)

    def counters(self) -> dict:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of it, by file."""
        averages = {"average": self.average, "momentum": self.momentum}
        files = {name: average.tensors() for name, average in averages.items() if average}
        if self.queues:
            files["memory"] = {f"{o}/{name}": t for o, m in self.queues.items() for name, t in m.tensors().items()}
        return files

    def load(self, counters: dict, read) -> None:
        """From a checkpoint's counters and ``read(FILE) -> tensors``."""
        for name, value in counters.items():
            setattr(self, name, value)
        for name, average in {"average": self.average, "momentum": self.momentum}.items():
            if average:
                average.load(read(name))
        saved = read("memory") if self.queues else {}
        for objective, queue in self.queues.items():
            queue.load({k.removeprefix(f"{objective}/"): t for k, t in saved.items() if k.startswith(f"{objective}/")})
