"""Flat shapes as sets of pixels, and places for them. x to the right, y down.

Shapes of the same side have exactly the same number of pixels, so that nobody can tell them apart by counting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np


def _around(radii: list[float], turn: float = 0.0) -> np.ndarray:
    """(V, 2) corners at these distances from the origin, at equal angles, ``turn`` circles after the top."""
    angles = 2 * np.pi * (np.arange(len(radii)) / len(radii) + turn)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.array(radii)[:, None]


# corners around the centroid, in order; every point is to be seen from there
OUTLINES = {
    "circle": _around([1.0] * 64),
    "square": _around([1.0] * 4, 1 / 8),
    "triangle": _around([1.0] * 3),
    "diamond": _around([1.0] * 4),
    "cross": np.array(
        [(1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3)]
    ),
    "star": _around([1.0, 0.45] * 5),
}
CONVEX = ("circle", "square", "triangle", "diamond")  # a small one, centred, has room within a large one


@dataclass(frozen=True)
class Sprite:
    """The pixels of a shape, cut out.

    Args:
        mask: (h, w) bool, True = the shape.
        left: column of the mask's first pixel, counted from the centre.
        top: row of the mask's first pixel, counted from the centre.
    """

    mask: np.ndarray
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) from the centre, the latter two exclusive."""
        return self.left, self.top, self.left + self.mask.shape[1], self.top + self.mask.shape[0]


@cache
def sprite(shape: str, side: int) -> Sprite:
    """The ``side`` x ``side`` pixels that a growing outline of the shape reaches first."""
    reach = side + 1  # no corner is as far away
    # the centre of an even square is between pixels
    steps = np.arange(-reach, reach) + (0.5 if side % 2 == 0 else 0.0)
    x, y = np.meshgrid(steps, steps)
    grown = _growth(OUTLINES[shape], np.stack([x.ravel(), y.ravel()], 1))
    # of the pixels that are reached at once, first the upper ones, then the middle ones: left and right stay alike
    first = np.lexsort((np.abs(x.ravel()), y.ravel(), grown.round(9)))[: side * side]
    mask = np.zeros(x.size, bool)
    mask[first] = True
    rows, columns = mask.reshape(x.shape).any(1).nonzero()[0], mask.reshape(x.shape).any(0).nonzero()[0]
    cut = mask.reshape(x.shape)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Sprite(cut, int(columns[0]) - reach, int(rows[0]) - reach)


def _growth(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(N,) by what factor the outline is scaled when it passes through each of the (N, 2) points."""
    smallest = np.full(len(points), np.inf)
    for a, b in zip(corners, np.roll(corners, -1, 0)):
        # the point as a sum of two neighbouring corners: in this wedge if no part is negative
        parts = points @ np.linalg.inv(np.stack([a, b]))
        smallest = np.where((parts >= -1e-9).all(1), np.minimum(smallest, parts.sum(1)), smallest)
    return smallest


# (x, y) from the first thing to the second
DIRECTIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
Box = tuple[int, int, int, int]  # left, top, right, bottom; pixels, the latter two exclusive


def hull(boxes: Iterable[Box]) -> Box:
    """The smallest box around all."""
    left, top, right, bottom = zip(*boxes)
    return min(left), min(top), max(right), max(bottom)


def place(
    size: int, relations: Sequence[str], boxes: Sequence[Box], rng: np.random.Generator
) -> list[tuple[int, int]] | None:
    """Random places in a picture of ``size`` x ``size`` pixels at which the relations hold.

    Boxes with one of `DIRECTIONS` between them are apart, and at least twice as far in this direction as aside; with
    any other relation, one is inside the other, and they have the same centre. Of three, the first and the last are
    apart as well.

    Args:
        relations: of each box to the next, one less than boxes; two or three boxes, at most one relation no direction.
        boxes: from their centres.

    Returns:
        (x, y) pixel of each box's centre; None if no attempt of 20 fits.
    """
    gap = size // 32
    boxes, nested = list(boxes), False
    for n, relation in enumerate(relations):
        if relation not in DIRECTIONS:
            boxes[n : n + 2], nested = [hull(boxes[n : n + 2])] * 2, True
    for draws in rng.random((20, 2 * len(boxes))).tolist():
        centres = [(0, 0)]
        for n, relation in enumerate(relations):
            x, y = centres[-1]
            if relation in DIRECTIONS:
                dx, dy = DIRECTIONS[relation]
                axis = 0 if dx else 1
                first, second = boxes[n : n + 2] if dx + dy > 0 else boxes[n : n + 2][::-1]
                least = first[axis + 2] - second[axis] + gap
                distance = least + int(draws[2 * n] * (size - least))
                aside = round((draws[2 * n + 1] - 0.5) * distance)
                x, y = x + dx * distance + dy * aside, y + dy * distance + dx * aside
            centres.append((x, y))
        placed = [(x + a, y + b, x + c, y + d) for (x, y), (a, b, c, d) in zip(centres, boxes)]
        left, top, right, bottom = hull(placed)
        room = size - 2 * gap - max(right - left, bottom - top)
        if room >= 0 and (nested or _apart(placed[0], placed[-1], gap)):
            shift_x = gap - left + int(draws[-2] * (size - 2 * gap - (right - left) + 1))
            shift_y = gap - top + int(draws[-1] * (size - 2 * gap - (bottom - top) + 1))
            return [(x + shift_x, y + shift_y) for x, y in centres]
    return None


def _apart(a: Box, b: Box, gap: int) -> bool:
    return any(q[n] - p[n + 2] >= gap for p, q in ((a, b), (b, a)) for n in (0, 1))
