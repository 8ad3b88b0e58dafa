"""The things of a scene, and sentences and questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INVERSE = {"left of": "right of", "above": "below", "inside": "around"}
INVERSE |= {inverse: relation for relation, inverse in INVERSE.items()}


@dataclass(frozen=True)
class Thing:
    """One coloured shape. ``x`` and ``y`` are the pixel of its centre, ``shade`` is the RGB value of its colour."""

    shape: str
    colour: str
    shade: tuple[int, int, int]
    size: str
    x: int = 0
    y: int = 0

    @property
    def short(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"

    @property
    def full(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


def captions(things: Sequence[Thing], relations: Sequence[str]) -> tuple[str, str]:
    """Describe all things, from the first to the last and from the last to the first."""

    def chain(things: Sequence[Thing], relations: Sequence[str]) -> str:
        text = f"{things[0].full} {relations[0]} {things[1].full}"
        return text + "".join(f" that is {r} {t.full}" for r, t in zip(relations[1:], things[2:]))

    return chain(things, relations), chain(things[::-1], [INVERSE[r] for r in relations[::-1]])


def links(first: Thing, relation: str, second: Thing) -> tuple[str, str]:
    """Describe the relation of two things, in both directions."""
    return f"{first.short} {relation} {second.short}", f"{second.short} {INVERSE[relation]} {first.short}"


def between(things: Sequence[Thing], relations: Sequence[str]) -> dict[tuple[str, str], str]:
    """Map each pair of neighbouring shapes, in alphabetical order, to their relation."""
    found = {}
    for first, relation, second in zip(things, relations, things[1:]):
        names = (first.shape, second.shape)
        found[tuple(sorted(names))] = relation if names[0] < names[1] else INVERSE[relation]
    return found


def questions(first: Thing, relation: str, second: Thing) -> list[tuple[str, str]]:
    """Return (question, answer) about colour, shape, size and place.

    The questions stay the same if the two things exchange attributes.
    """
    both = (first, second)
    found = [(f"what colour is the {t.shape}?", t.colour) for t in both]
    found += [(f"what shape is the {t.colour} thing?", t.shape) for t in both]
    found += [(f"what size is the {t.shape}?", t.size) for t in both]
    found.append((f"where is the {first.shape}, seen from the {second.shape}?", relation))
    found.append((f"where is the {second.shape}, seen from the {first.shape}?", INVERSE[relation]))
    return found
