"""State of a run besides weights and optimizer. It is outside the wrapped module and changes after the optimizer step.

K rows of a queue, n samples of the data, E embedding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlp.distributed import gather_objects
from vlp.objectives.queues import QueueLike
from vlp.optim.ema import EMA


@dataclass
class TrainState:
    """Counters, averages and queues of a run.

    Args:
        step: Optimizer steps done.
        position: Samples of the global stream consumed, which is the whole state of the data.
        skipped: Steps skipped because of a non-finite loss or gradient.
        truncated_captions: Captions truncated at ``data.max_length`` so far, over all processes.
        average: Averaged weights that are evaluated, or None if the run keeps no average.
        momentum: The momentum encoder, or None.
        queues: Name of an objective -> its queue or memory bank.
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
        """Return the tensors that a checkpoint stores, by file."""
        averages = {"average": self.average, "momentum": self.momentum}
        files = {name: average.tensors() for name, average in averages.items() if average}
        if self.queues:
            # the file keeps its earlier name, so that earlier checkpoints can be read
            files["memory"] = {f"{o}/{name}": t for o, m in self.queues.items() for name, t in m.tensors().items()}
        return files

    def check_replicas(self) -> None:
        """Check that all processes hold the same queues. The checkpoint has those of the main process.

        Raises:
            RuntimeError: If they do not, because the rows that some process pushed were not gathered from all.
        """
        for objective, queue in self.queues.items():
            digest = hashlib.sha256()
            for tensor in queue.tensors().values():
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            if len(set(gather_objects(digest.hexdigest()))) > 1:
                raise RuntimeError(f"the queue of objectives.{objective} differs between the processes")

    def load(self, counters: dict, read) -> None:
        """Restore the state from the counters of a checkpoint and ``read(FILE) -> tensors``."""
        for name, value in counters.items():
            setattr(self, name, value)
        for name, average in {"average": self.average, "momentum": self.momentum}.items():
            if average:
                average.load(read(name))
        saved = read("memory") if self.queues else {}
        for objective, queue in self.queues.items():
            queue.load({k.removeprefix(f"{objective}/"): t for k, t in saved.items() if k.startswith(f"{objective}/")})
