"""Momentum distillation, common to all objectives that learn from the momentum encoder's predictions (ALBEF)."""

from __future__ import annotations

from dataclasses import dataclass

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.objectives.base import Objective
from vlp.objectives.requirements import require_momentum


@dataclass(frozen=True)
class DistilledObjective(Objective):
    """Base class of objectives with soft targets: ``(1 - a) * true + a * teacher`` (ALBEF, Li et al. 2021, eq. 6 and 7).

    Args:
        distill: a, the teacher's share of the targets; ALBEF's is 0.4. Above 0 it needs ``momentum``.
        ramp_epochs: Epochs over which a grows linearly from 0; ALBEF's is 1. 0 starts at a.
    """

    distill: float = 0.0
    ramp_epochs: float = 0.0

    def validate(self, experiment: Experiment) -> None:
        """Raise UserError if the share is out of range, or without a momentum encoder to give it."""
        who = type(self).__name__
        if not 0 <= self.distill <= 1:
            raise UserError(
                f"distill of {who} is {self.distill:g}; it is the teacher's share of the targets, from 0 to 1"
            )
        if self.distill:
            require_momentum(experiment, f"distill in {who}")

    def teacher_share(self, f: Forward) -> float:
        """Return a at the present progress of the run."""
        return self.distill * f.context.ramp(self.ramp_epochs)
