"""Learning-rate schedules as a function of the step.

A schedule has no state. A scheduler object that Accelerate prepares would advance once for each process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlp.errors import UserError
from vlp.specs.fields import setting


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor by optimizer step: linear warm-up, then a decay to ``final_fraction``.

    Step 0 is the first optimizer step. The warm-up factor is ``(step + 1) / warmup_steps``, so that no step has a rate of 0
    and the last warm-up step has the full rate. The decay starts at 1 at ``step = warmup_steps`` and would reach
    ``final_fraction`` at ``step = total_steps``, one past the last. A run that is not longer than its warm-up never decays.

    Args:
        warmup_steps: Optimizer steps of the warm-up.
        kind: ``cosine`` or ``linear`` decay, or ``constant``, which ignores ``final_fraction``.
        final_fraction: Fraction of the base learning rate at the end.
        drops: Fractions of the total steps after which a ``constant`` rate falls to a tenth (0.6 and 0.8 in MoCo v1).
    """

    warmup_steps: int = setting(0, least=0)
    kind: str = "cosine"
    final_fraction: float = setting(0.0, least=0)
    drops: tuple[float, ...] = setting((), least=0)

    def __post_init__(self):
        if self.kind not in ("cosine", "linear", "constant"):
            raise UserError(f"schedule kind {self.kind!r} is unknown; use cosine, linear or constant")
        if self.drops and self.kind != "constant":
            raise UserError(f"schedule drops={self.drops} are of kind='constant', not of {self.kind!r}")

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor on the base learning rate at a step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 0.1 ** sum(step >= fraction * total_steps for fraction in self.drops)
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        remaining = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.final_fraction + (1 - self.final_fraction) * remaining


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, base_lr: float, step: int, total_steps: int) -> float:
    """Write ``base_lr * factor * lr_scale`` into every group; return the rate of an ``lr_scale`` of 1."""
    lr = base_lr * schedule.factor(step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr
