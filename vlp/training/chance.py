"""Notice losses that stay at the level of a model that has learned nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vlp.forward import Forward
from vlp.objectives.base import Objective

BAND = 0.02  # share by which a loss must be below its chance level
MEMORY = 0.2  # share of ``steps`` after which a loss has 1 / e of its weight in the smoothed one


class ChanceWatch:
    """Reports each loss that has not left its chance level for many steps, once.

    The loss, relative to the level of its step, is smoothed by an exponential moving average over a fifth of these steps. It
    has left the level once it is 2 % below. Everything is computed on the host from numbers that are there, and starts again when
    a run is resumed.

    Args:
        objectives: By name. `Objective.chance` or `Objective.target_classes` gives the level.
        steps: Steps in a row after which a loss is reported. 0 reports none.
    """

    def __init__(self, objectives: Mapping[str, Objective], steps: int):
        self.objectives, self.steps = objectives, steps
        self.histories = {name: History(MEMORY * steps) for name in objectives} if steps else {}

    def update(self, losses: Mapping[str, float], f: Forward) -> list[str]:
        """Take the losses of a step, and return a line for each one that is to be reported.

        Args:
            losses: Finite losses by the name of their objective.
            f: The last micro-batch of the step.
        """
        lines = []
        for name, history in list(self.histories.items()):
            objective = self.objectives[name]
            level = history.level_of(objective.target_classes(f)) or objective.chance(f)
            if level and history.add(losses[name] / level) == self.steps:
                del self.histories[name]
                lines.append(
                    f"objectives.{name}: the loss has been at {level:.3f}, that of a model that has learned nothing, for "
                    f"{self.steps} steps; {objective.remedy}; see 'Losses that stay at chance' in docs/methods.md"
                )
        return lines


@dataclass
class History:
    """Smoothed ratio of a loss to its chance level, and the frequencies of its target classes.

    Args:
        memory: Steps after which a ratio has 1 / e of its weight.

    Attributes:
        weighted: Sum of the ratios with their weights.
        weight: Sum of the weights.
        steps: Steps in a row, up to the last one, at the chance level.
        counts: Number of targets of each class so far.
    """

    memory: float
    weighted: float = 0.0
    weight: float = 0.0
    steps: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, ratio: float) -> int:
        """Add the ratio of a step, and return ``steps``."""
        keep = math.exp(-1 / self.memory)
        self.weighted, self.weight = keep * self.weighted + ratio, keep * self.weight + 1
        self.steps = self.steps + 1 if self.weighted / self.weight > 1 - BAND else 0
        return self.steps

    def level_of(self, targets: np.ndarray | None) -> float:
        """Add (n,) targets of a step, and return the entropy of all so far in nats, 0 if there are none."""
        if targets is None:
            return 0.0
        found = np.bincount(targets, minlength=len(self.counts))
        found[: len(self.counts)] += self.counts
        self.counts = found
        return entropy(found)


def entropy(counts: np.ndarray) -> float:
    """Estimate the entropy in nats of classes that were counted, with the correction of Miller and Madow for few counts."""
    counts = counts[counts > 0]
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum()))
