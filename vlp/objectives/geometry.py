"""Alignment and uniformity on the sphere as objectives (Wang & Isola 2020), of images with texts or of two views.

B rows of a bundle, M rows of all processes and micro-batches, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlp.config import Experiment
from vlp.forward import Bundle, Forward
from vlp.losses.geometry import alignment, uniformity
from vlp.objectives.base import Objective
from vlp.objectives.requirements import require_image, require_image_views, require_text, require_text_views
from vlp.specs.fields import setting
from vlp.types import Encoded

Sides = Literal["image_text", "images", "texts"]
"""What is compared: an image with its text, or the first two views of an image or of a text."""


def sides_of(f: Bundle, sides: Sides) -> tuple[Encoded, Encoded]:
    """Return two encodings of B rows each. Row i of one is the positive of row i of the other."""
    if sides == "image_text":
        return f.image, f.text
    x, y, *_ = f.image_views if sides == "images" else f.text_views
    return x, y


def embed(encoded: Encoded) -> Tensor:
    """Return the (B, E) embeddings of unit norm."""
    return encoded.embed


def projection(encoded: Encoded) -> Tensor:
    """Return the (B, E) outputs of the projection head before normalisation."""
    return encoded.projection


def pooled(encoded: Encoded) -> Tensor:
    """Return the (B, D) pooled states of the tower."""
    return encoded.tokens[:, 0]


def all_of(f: Forward, sides: Sides, rows: Callable[[Encoded], Tensor] = embed) -> tuple[Tensor, Tensor]:
    """Gather rows of both sides, (M, E) each, from all processes and micro-batches."""
    x = f.all.gather(lambda bundle: rows(sides_of(bundle, sides)[0]))
    y = f.all.gather(lambda bundle: rows(sides_of(bundle, sides)[1]))
    return x, y


def require_sides(experiment: Experiment, who: str, sides: Sides) -> None:
    """Raise UserError if the experiment lacks one of the sides."""
    if sides == "image_text":
        require_image(experiment, who)
        require_text(experiment, who)
    elif sides == "images":
        require_image_views(experiment, who, count=None)
    else:
        require_text_views(experiment, who)


@dataclass(frozen=True)
class Alignment(Objective):
    """Mean distance of positive pairs: ``mean_i ||x_i - y_i||^alpha`` (Wang & Isola 2020, eq. 2)."""

    alpha: float = setting(2.0, above=0)
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        require_sides(experiment, "Alignment", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        x, y = sides_of(f, self.sides)
        return alignment(x.embed, y.embed, self.alpha)


@dataclass(frozen=True)
class Uniformity(Objective):
    """Spread embeddings on the sphere: ``log mean_{i<j} exp(-t ||x_i - x_j||^2)`` (Wang & Isola 2020, eq. 3).

    Over the rows of all processes. Mean over the two sides, as in the published code.
    """

    min_rows: ClassVar[int] = 2

    t: float = setting(2.0, above=0)
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        require_sides(experiment, "Uniformity", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        # The log of a mean over all rows is not a mean over processes, so every process computes the whole.
        x, y = all_of(f, self.sides)
        return (uniformity(x, self.t) + uniformity(y, self.t)) / 2
