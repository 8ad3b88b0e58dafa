"""Momentum distillation, common to all objectives that learn from the momentum encoder's predictions (ALBEF)."""

from __future__ import annotations

from dataclasses import dataclass

from vlp.config import Experiment
from vlp.forward import Forward
from vlp.objectives.base import Objective
from vlp.objectives.requirements import require_momentum
from vlp.specs.fields import setting


@dataclass(frozen=True)
class DistilledObjective(Objective):
    """Base class of objectives with soft targets: ``(1 - a) * true + a * teacher`` (ALBEF, Li et al. 2021, eq. 6 and 7).

    Args:
        distill: a, the teacher's share of the targets; ALBEF's is 0.4. Above 0 it needs ``momentum``.
        ramp_epochs: Epochs over which a grows linearly from 0; ALBEF's is 1. 0 starts at a.
    """

    distill: float = setting(0.0, least=0, most=1)
    ramp_epochs: float = setting(0.0, least=0)

    def validate(self, experiment: Experiment) -> None:
        """Raise UserError if there is a share of a teacher, and no momentum encoder."""
        if self.distill:
            require_momentum(experiment, f"distill in {type(self).__name__}")

    def teacher_share(self, f: Forward) -> float:
        """Return a, the share of the soft targets, which grows linearly from 0 to ``distill`` over ``ramp_epochs``."""
        return self.distill * f.context.ramp(self.ramp_epochs)
