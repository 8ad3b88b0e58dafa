"""Alignment and uniformity on the sphere as objectives (Wang & Isola 2020), of pictures with texts or of two views.

B rows of this process, M rows of all processes, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlp.config import Experiment
from vlp.distributed import gather_with_gradient
from vlp.forward import Forward
from vlp.losses.geometry import alignment, uniformity
from vlp.objectives.needs import need_image, need_image_views, need_text, need_text_views
from vlp.types import Encoded

Sides = Literal["image_text", "images", "texts"]
"""What is compared: a picture with its text, or the first two views of a picture or of a text."""


def sides_of(f: Forward, sides: Sides) -> tuple[Encoded, Encoded]:
    """Two encodings of B rows each, row i of one being the positive of row i of the other."""
    x, y, *_ = (f.image, f.text) if sides == "image_text" else getattr(f, sides)
    return x, y


def need_sides(experiment: Experiment, who: str, sides: Sides) -> None:
    """Raises UserError where the experiment has not got them."""
    if sides == "image_text":
        need_image(experiment, who)
        need_text(experiment, who)
    elif sides == "images":
        need_image_views(experiment, who, count=None)
    else:
        need_text_views(experiment, who)


@dataclass(frozen=True)
class Alignment:
    """``mean_i ||x_i - y_i||^alpha`` of positive pairs (Wang & Isola 2020, eq. 2)."""

    weight: float = 1.0
    alpha: float = 2.0
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError where the sides are missing."""
        need_sides(experiment, "Alignment", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        x, y = sides_of(f, self.sides)
        return alignment(x.embed, y.embed, self.alpha)


@dataclass(frozen=True)
class Uniformity:
    """``log mean_{i<j} exp(-t ||x_i - x_j||^2)`` over the rows of all processes (Wang & Isola 2020, eq. 3).

    Mean over the two sides, as their code has it.
    """

    weight: float = 1.0
    t: float = 2.0
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError where the sides are missing."""
        need_sides(experiment, "Uniformity", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        # the log of a mean over all rows is no mean over processes: every process computes the whole
        x, y = (gather_with_gradient(side.embed) for side in sides_of(f, self.sides))
        return (uniformity(x, self.t) + uniformity(y, self.t)) / 2
