"""The contract of an objective: a loss on a `vlp.forward.Forward`, with its hyper-parameters as fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.forward import Forward, Scope
from vlp.models.base import HeadSpec, Model
from vlp.objectives.queues import QueueLike


@dataclass(frozen=True)
class Objective:
    """Base class of objectives. A subclass is a frozen dataclass whose fields are its hyper-parameters.

    | member | default | meaning |
    |---|---|---|
    | ``weight`` | 1.0 | factor of the loss in the total, given by keyword |
    | ``__call__(f)`` | required | compute the loss of a bundle, a scalar |
    | ``validate(experiment)`` | accepts all | raise UserError, before anything is built, for what the objective lacks |
    | ``heads()`` | none | heads that the model gets for this objective, read as ``f.model.heads[name]`` |
    | ``init_queue(...)`` | None | queue or memory bank of the objective, read as ``f.context.queues[self]`` |
    | ``enqueue(f)`` | required with a queue | what the queue gets after the step |
    | ``measures`` | none | names of what the log shows besides the loss, such as an accuracy, given to ``f.measure`` |
    | ``min_rows`` | 1 | fewest rows that the loss must see at once: 2 if it compares rows, and is constant for a single one |
    | ``chance(f)`` | None | loss of a model that has learned nothing, in nats; `vlp.training.chance` compares it with the loss |
    | ``target_classes(f)`` | None | classes that the loss predicts, whose frequencies give that level |
    | ``remedy`` | the learning rate | what to try if the loss stays there |
    | ``row_scope`` | "global" | whose rows it sees at once: those of all processes, or of each process ("local") |
    | ``supports_grad_cache`` | True | False if the loss is wrong when micro-batches are contrasted with each other |
    | ``supports_split_backward`` | False | True if the loss fuses, reading towers only as ``f.image`` and ``f.text`` |

    The mean of the loss over processes and micro-batches must be the loss of one process with the whole batch, and so must
    its gradient. Two rules achieve it: average over the own rows, and compare them with ``f.all``. A loss that is no mean
    over rows is computed from ``f.all`` only, on every process. `vlp.testing.assert_process_invariant` checks it.

    Gather before computing the loss: a loss that is not finite raises `NonFiniteLoss`, and a process that has left a
    collective makes the others wait.

    An objective has no parameters and no state: parameters belong to the model, state to the queue.
    """

    min_rows: ClassVar[int] = 1
    supports_grad_cache: ClassVar[bool] = True
    supports_split_backward: ClassVar[bool] = False
    remedy: ClassVar[str] = "try another optim.lr"

    weight: float = field(default=1.0, kw_only=True)

    def __call__(self, f: Forward) -> Tensor:
        """Compute the loss of the bundle ``f``."""
        raise NotImplementedError

    @property
    def row_scope(self) -> Scope:
        return "global"

    @property
    def measures(self) -> tuple[str, ...]:
        """Return the names of the measures that ``__call__`` gives to `vlp.forward.Forward.measure`.

        The log has their means over all processes and micro-batches as ``OBJECTIVE/MEASURE``.
        """
        return ()

    def chance(self, f: Forward) -> float | None:
        """Return the loss of a model that has learned nothing, in nats, or None if it is not known. The device is not read."""
        return None

    def target_classes(self, f: Forward) -> np.ndarray | None:
        """Return the (n,) int64 classes that the loss of ``f`` predicted, on the host, or None if it predicts none.

        The entropy of their frequencies over the run is the loss of a model that has learned nothing else.
        """
        return None

    def validate(self, experiment: Experiment) -> None:
        """Raise UserError for what the experiment lacks, or for fields out of range."""

    def heads(self) -> Mapping[str, HeadSpec]:
        """Return specs of the heads that the model builds for this objective, by name.

        They are trained and stored with the model. The momentum encoder has an average of each.
        """
        return {}

    def init_queue(
        self, model: Model, num_samples: int, device: torch.device, generator: torch.Generator
    ) -> QueueLike | None:
        """Return the state of the objective at the start of a run, or None if it keeps no state.

        Args:
            model: The model, for widths.
            num_samples: Samples in the training data.
            device: Device of the state.
            generator: Random numbers that are equal in all processes.
        """
        return None

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        """Return what the queue gets after the step, as arguments of its ``push``: the rows of ``f.all``."""
        raise NotImplementedError(f"{type(self).__name__}.init_queue returns a queue, and enqueue is not defined")
