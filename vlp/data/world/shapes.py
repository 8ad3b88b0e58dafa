"""Flat shapes as sets of pixels, and their placement. x to the right, y down.

Shapes with the same side have exactly the same number of pixels, so that counting does not distinguish them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np


def _around(radii: list[float], turn: float = 0.0) -> np.ndarray:
    """Return (V, 2) corners at the given distances from the origin and at equal angles, ``turn`` circles after the top."""
    angles = 2 * np.pi * (np.arange(len(radii)) / len(radii) + turn)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.array(radii)[:, None]


# corners around the centroid, in order; every shape is star-convex about it
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
CONVEX = ("circle", "square", "triangle", "diamond")  # a small shape fits into the centre of a large one


@dataclass(frozen=True)
class Sprite:
    """The pixels of a shape.

    Args:
        mask: (h, w) bool, True inside the shape.
        left: Column of the mask's first pixel, counted from the centre.
        top: Row of the mask's first pixel, counted from the centre.
    """

    mask: np.ndarray
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box (left, top, right, bottom) relative to the centre; right and bottom are exclusive."""
        return self.left, self.top, self.left + self.mask.shape[1], self.top + self.mask.shape[0]


@cache
def sprite(shape: str, side: int) -> Sprite:
    """Return the first ``side`` x ``side`` pixels that a growing outline of the shape reaches."""
    reach = side + 1  # farther than any corner
    # the centre of an even square is between pixels
    steps = np.arange(-reach, reach) + (0.5 if side % 2 == 0 else 0.0)
    x, y = np.meshgrid(steps, steps)
    grown = _growth(OUTLINES[shape], np.stack([x.ravel(), y.ravel()], 1))
    # ties: upper pixels first, then those in the middle, so that left and right stay symmetric
    first = np.lexsort((np.abs(x.ravel()), y.ravel(), grown.round(9)))[: side * side]
    mask = np.zeros(x.size, bool)
    mask[first] = True
    rows, columns = mask.reshape(x.shape).any(1).nonzero()[0], mask.reshape(x.shape).any(0).nonzero()[0]
    cut = mask.reshape(x.shape)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Sprite(cut, int(columns[0]) - reach, int(rows[0]) - reach)


def _growth(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Compute the (N,) factors by which the outline is scaled when it passes through each of the (N, 2) points."""
    smallest = np.full(len(points), np.inf)
    for a, b in zip(corners, np.roll(corners, -1, 0)):
        # the point as a linear combination of two neighbouring corners: inside their wedge if no coefficient is negative
        parts = points @ np.linalg.inv(np.stack([a, b]))
        smallest = np.where((parts >= -1e-9).all(1), np.minimum(smallest, parts.sum(1)), smallest)
    return smallest


# direction (x, y) from the first thing to the second
DIRECTIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive


def hull(boxes: Iterable[Box]) -> Box:
    """Return the smallest box around all boxes."""
    left, top, right, bottom = zip(*boxes)
    return min(left), min(top), max(right), max(bottom)


def place(
    size: int, relations: Sequence[str], boxes: Sequence[Box], rng: np.random.Generator
) -> list[tuple[int, int]] | None:
    """Draw random places in an image of ``size`` x ``size`` pixels at which the relations are true.

    Boxes related by one of `DIRECTIONS` do not overlap, and their distance in this direction is at least twice the other
    one. With any other relation, one box is inside the other, and they have the same centre. Of three boxes, the first and
    the last do not overlap either.

    Args:
        relations: Relation of each of two or three boxes to the next; at most one is not a direction.
        boxes: Boxes relative to their centres.

    Returns:
        (x, y) pixel of each box's centre; None if no attempt of 20 fits.
    """
    gap = size // 32
    spread = 1.0 if len(boxes) <= 3 else 1 / len(boxes)  # many things fit only if they are close
    boxes = list(boxes)
    for n, relation in enumerate(relations):
        if relation not in DIRECTIONS:
            boxes[n : n + 2] = [hull(boxes[n : n + 2])] * 2
    for draws in rng.random((20, 2 * len(boxes))).tolist():
        centres = [(0, 0)]
        for n, relation in enumerate(relations):
            x, y = centres[-1]
            if relation in DIRECTIONS:
                dx, dy = DIRECTIONS[relation]
                axis = 0 if dx else 1
                first, second = boxes[n : n + 2] if dx + dy > 0 else boxes[n : n + 2][::-1]
                least = first[axis + 2] - second[axis] + gap
                distance = least + int(spread * draws[2 * n] * (size - least))
                aside = round((draws[2 * n + 1] - 0.5) * distance)
                x, y = x + dx * distance + dy * aside, y + dy * distance + dx * aside
            centres.append((x, y))
        placed = [(x + a, y + b, x + c, y + d) for (x, y), (a, b, c, d) in zip(centres, boxes)]
        left, top, right, bottom = hull(placed)
        room = size - 2 * gap - max(right - left, bottom - top)
        if room >= 0 and all(_apart(a, b, gap) for n, a in enumerate(placed) for b in placed[n + 2 :]):
            shift_x = gap - left + int(draws[-2] * (size - 2 * gap - (right - left) + 1))
            shift_y = gap - top + int(draws[-1] * (size - 2 * gap - (bottom - top) + 1))
            return [(x + shift_x, y + shift_y) for x, y in centres]
    return None


def _apart(a: Box, b: Box, gap: int) -> bool:
    return any(q[n] - p[n + 2] >= gap for p, q in ((a, b), (b, a)) for n in (0, 1))
