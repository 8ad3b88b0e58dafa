"""Scenes, drawn in minimal pairs. A scene is a pure function of a seed and a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np

from vlp.data.world.sentences import INVERSE, Thing, captions, links, questions
from vlp.data.world.shapes import CONVEX, DIRECTIONS, OUTLINES, Sprite, hull, place, sprite
from vlp.errors import UserError

COLOURS = {
    "red": (215, 40, 40),
    "orange": (240, 140, 25),
    "yellow": (240, 225, 50),
    "green": (35, 145, 60),
    "blue": (45, 80, 210),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}
SHADE = 12  # of 255: largest distance of a shade from the colour above
GREYS = (110, 180)  # range of the background
SIDES = {"small": 0.14, "large": 0.27}  # side of the square with as many pixels, as a share of the image's side
ATTRIBUTES = {"order": ("shape", "colour", "shade", "size"), "shape": ("shape",), "colour": ("colour", "shade")}
WORD_CLASSES = {
    "colour": tuple(COLOURS),
    "shape": tuple(OUTLINES),
    "size": tuple(SIDES),
    "place": tuple(relation.removesuffix(" of") for relation in INVERSE),
}
"""Words of the captions by class, for `vlp.objectives.mlm.MaskedText.word_classes`."""


@dataclass(frozen=True)
class Scene:
    """An image with its descriptions.

    Args:
        image: (H, W, 3) uint8 RGB, H = W.
        captions: Complete descriptions, one from each end.
        questions: (question, answer) with answers from `World.answers`: first one with "yes" and one with "no", then
            colour, shape and size of the two things that differ in the minimal pair, and their places.
        statements: (sentence, whether it is true), as many true as false.
        minimal_pair: First caption of the other scene of the pair. It has the words of ``captions[0]`` and is false here.
        contrast: Attribute that the two things exchange in the other scene: "order" (their places), "shape" or "colour".
        things: The things in the order of the first caption.
        relations: Relation of each thing to the next.
        boxes: (left, top, width, height) of each thing in pixels, including covered parts.
    """

    image: np.ndarray
    captions: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    statements: tuple[tuple[str, bool], ...]
    minimal_pair: str
    contrast: str
    things: tuple[Thing, ...]
    relations: tuple[str, ...]
    boxes: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class World:
    """Settings of scenes. A scene is a pure function of the world, a seed and a number.

    No two things of a scene have the same colour or the same shape, so that either identifies a thing. A thing is left of
    another if no column of pixels contains both and its horizontal distance is at least twice the vertical one; "above" is
    defined in the same way with the axes exchanged. "Inside" is always a small thing at the centre of a large one, both
    convex.

    Args:
        size: Side of the image in pixels, at least 64: smaller circles are not recognisable.
        objects: Numbers of things in a scene, equally frequent: some of 2 to 6. With more than 3, large things are rarer,
            because they hardly fit.
        shapes: Names from `vlp.data.world.shapes.OUTLINES`.
        colours: Names from `COLOURS`.
        relations: Some of "left of", "above" and "inside", each with its inverse.
        combinations: Colours and shapes that go together. "all" allows every one. "seen" leaves out a quarter, such that
            every colour and every shape still occurs, and in "novel" scenes both scenes of a minimal pair have a thing of
            the quarter. A model that is trained on seen and evaluated on novel combinations must compose what it knows.
    """

    size: int = 64
    objects: tuple[int, ...] = (2, 3)
    shapes: tuple[str, ...] = tuple(OUTLINES)
    colours: tuple[str, ...] = tuple(COLOURS)
    relations: tuple[str, ...] = ("left of", "above", "inside")
    combinations: Literal["all", "seen", "novel"] = "all"

    def __post_init__(self):
        if not 64 <= self.size <= 512:
            raise UserError(f"images of {self.size} pixels a side cannot show the shapes; give a size from 64 to 512")
        for field, given, known in (
            ("objects", self.objects, (2, 3, 4, 5, 6)),
            ("shapes", self.shapes, OUTLINES),
            ("colours", self.colours, COLOURS),
            ("relations", self.relations, ("left of", "above", "inside")),
        ):
            if not given or len(set(given)) < len(given) or not set(given) <= set(known):
                raise UserError(f"{field}={given} of the world; give some of {', '.join(map(str, known))}, each once")
        if self.combinations not in ("all", "seen", "novel"):
            raise UserError(f"combinations={self.combinations!r} of the world; give all, seen or novel")
        shapes = [s for s in self.shapes if s in CONVEX] if "inside" in self.relations else self.shapes
        if min(len(shapes), len(self.colours)) < max(self.objects):
            convex = (
                f"; with the relation inside, only {', '.join(CONVEX)} count" if len(shapes) < len(self.shapes) else ""
            )
            raise UserError(
                f"{max(self.objects)} things of different shape and colour need as many shapes and colours{convex}"
            )
        if self.relations == ("inside",) and max(self.objects) > 2:
            raise UserError("three things cannot be inside each other; give another relation too, or objects of 2")

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers to questions, in a fixed order."""
        relations = (word for relation in self.relations for word in (relation, INVERSE[relation]))
        return ("yes", "no", *self.colours, *self.shapes, *SIDES, *relations)

    def has_novel(self, things: Iterable[Thing]) -> bool:
        """Return whether a thing has one of the combinations that "seen" leaves out."""
        return any((self.colours.index(t.colour) + self.shapes.index(t.shape)) % 4 == 0 for t in things)

    def allows(self, things: Sequence[Thing]) -> bool:
        """Return whether ``combinations`` allows a scene of these things."""
        return self.combinations == "all" or self.has_novel(things) == (self.combinations == "novel")

    @property
    def classes(self) -> tuple[str, ...]:
        """Size, colour and shape of a single thing, in a fixed order."""
        return tuple(" ".join(names) for names in product(SIDES, self.colours, self.shapes))

    def single(self, seed: int, number: int) -> tuple[np.ndarray, int]:
        """Draw the (H, W, 3) uint8 image of one thing, and the number of its class in `classes`."""
        rng = np.random.default_rng([seed, 3, number])
        while True:
            label = int(rng.integers(len(self.classes)))
            size, colour, shape = self.classes[label].split()
            thing = Thing(shape, colour, _draw_shade(colour, rng), size)
            if self.allows([thing]):
                break
        left, top, right, bottom = _sprite(self.size, thing).box
        x, y = rng.integers((-left, -top), (self.size - right + 1, self.size - bottom + 1)).tolist()
        return _draw_image(self.size, _draw_grey(rng), (replace(thing, x=x, y=y),)), label

    def scene(self, seed: int, number: int) -> Scene:
        """Draw the scene with this number, 0 or more."""
        pair = _draw_pair(self, np.random.default_rng([seed, number // 2]))
        own, other = pair.members[::-1] if number % 2 else pair.members
        true, false = links(*pair.linked(own)), links(*pair.linked(other))
        return Scene(
            image=_draw_image(self.size, pair.grey, own),
            captions=captions(own, pair.relations),
            questions=(
                (f"is there {true[0]}?", "yes"),
                (f"is there {false[0]}?", "no"),
                *questions(*pair.linked(own)),
            ),
            statements=(
                *((f"there is {text}", True) for text in true),
                *((f"there is {text}", False) for text in false),
            ),
            minimal_pair=captions(other, pair.relations)[0],
            contrast=pair.contrast,
            things=own,
            relations=pair.relations,
            boxes=tuple(_box(self.size, thing) for thing in own),
        )


@dataclass(frozen=True)
class _Pair:
    """Two scenes that differ in the two things of ``relations[link]``."""

    members: tuple[tuple[Thing, ...], tuple[Thing, ...]]
    relations: tuple[str, ...]
    link: int
    contrast: str
    grey: int

    def linked(self, things: Sequence[Thing]) -> tuple[Thing, str, Thing]:
        return things[self.link], self.relations[self.link], things[self.link + 1]


def _draw_pair(world: World, rng: np.random.Generator) -> _Pair:
    count = world.objects[rng.integers(len(world.objects))]
    while True:
        relations = _draw_relations(world, count, rng)
        nested = not set(relations) <= set(DIRECTIONS)
        things = _draw_things(world, relations, nested, rng)
        link = int(rng.integers(count - 1))
        # The frequency of every colour must not change. If a thing is inside another, only shapes can be exchanged. Things
        # of different size can exchange their places but not their colours.
        contrast = "order" if not nested and rng.random() < 0.5 else "shape"
        if not nested and contrast == "shape" and things[link].size == things[link + 1].size and rng.random() < 0.5:
            contrast = "colour"
        other = _exchange(things, link, ATTRIBUTES[contrast])
        boxes = [hull(_sprite(world.size, t).box for t in alternatives) for alternatives in zip(things, other)]
        centres = place(world.size, relations, boxes, rng)
        # None if there is hardly any room, such as for three large things in a row
        if centres is not None and world.allows(things) and world.allows(other):
            members = tuple(tuple(replace(t, x=x, y=y) for t, (x, y) in zip(m, centres)) for m in (things, other))
            return _Pair(members, relations, link, contrast, _draw_grey(rng))


def _draw_relations(world: World, count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Draw a relation between each thing and the next, at most one of them "inside" or "around"."""
    directions = [r for r in world.relations if r in DIRECTIONS]
    drawn = [world.relations[rng.integers(len(world.relations))]]
    drawn += [directions[rng.integers(len(directions))] for _ in range(count - 2)]
    inverted = rng.random(count - 1) < 0.5
    return tuple(INVERSE[drawn[n]] if inverted[n] else drawn[n] for n in rng.permutation(count - 1))


def _draw_things(world: World, relations: tuple[str, ...], nested: bool, rng: np.random.Generator) -> list[Thing]:
    shapes = [s for s in world.shapes if s in CONVEX] if nested else world.shapes
    sizes = [("small", "large")[n] for n in rng.integers(2, size=len(relations) + 1)]
    for n, relation in enumerate(relations):
        if relation not in DIRECTIONS:
            sizes[n : n + 2] = ("small", "large") if relation == "inside" else ("large", "small")
    things = []
    for s, c, size in zip(rng.permutation(len(shapes)), rng.permutation(len(world.colours)), sizes):
        colour = world.colours[c]
        things.append(Thing(shapes[s], colour, _draw_shade(colour, rng), size))
    return things


def _draw_shade(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    shade = COLOURS[colour] + rng.integers(-SHADE, SHADE + 1, 3)
    return tuple(shade.clip(0, 255).tolist())


def _draw_grey(rng: np.random.Generator) -> int:
    return int(rng.integers(GREYS[0], GREYS[1] + 1))


def _exchange(things: list[Thing], link: int, names: tuple[str, ...]) -> list[Thing]:
    first, second = things[link : link + 2]
    ends = [replace(a, **{name: getattr(b, name) for name in names}) for a, b in ((first, second), (second, first))]
    return [*things[:link], *ends, *things[link + 2 :]]


def _sprite(size: int, thing: Thing) -> Sprite:
    return sprite(thing.shape, round(SIDES[thing.size] * size))


def _box(size: int, thing: Thing) -> tuple[int, int, int, int]:
    left, top, right, bottom = _sprite(size, thing).box
    return thing.x + left, thing.y + top, right - left, bottom - top


def _draw_image(size: int, grey: int, things: tuple[Thing, ...]) -> np.ndarray:
    image = np.full((size, size, 3), grey, np.uint8)
    for thing in sorted(
        things, key=lambda t: -SIDES[t.size]
    ):  # largest first, so that an inner thing is drawn over the outer one
        cut = _sprite(size, thing)
        left, top, right, bottom = cut.box
        image[thing.y + top : thing.y + bottom, thing.x + left : thing.x + right][cut.mask] = thing.shade
    return image
