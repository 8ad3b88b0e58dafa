"""Statements about two images, as in NLVR2 (Suhr et al. 2019), that neither the text nor one image decides.

Lines come in groups of four: one text with each combination of two first images and two second images. The compared
attribute has one value in one first and one second image, and another value in the other two. For every text and single
image, the statement is therefore true as often as false.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from itertools import combinations, product

import numpy as np

from vlp.data.world.scenes import Scene
from vlp.data.world.sentences import between

Keyed = tuple[str, Scene]
# compared attribute -> statement that it is the same, statement that it differs
STATEMENTS = {
    "colour": ("the {} has the same colour in both pictures", "the {} has another colour in the other picture"),
    "shape": (
        "the {} thing has the same shape in both pictures",
        "the {} thing has another shape in the other picture",
    ),
    "place": ("the {} and the {} are placed alike in both pictures", "the {} and the {} have changed places"),
    "number": ("both pictures have the same number of things", "one picture has more things than the other"),
}


def paired(scenes: Iterable[Keyed], seed: int) -> Iterator[dict]:
    """Yield lines with ``image0`` and ``image1`` (keys of samples), ``text``, ``answer`` (a bool) and ``kind`` of `STATEMENTS`.

    Colours, shapes and places are compared between two minimal pairs, so that the histograms of the images carry no
    information. A scene is in at most one group of four per kind. The lines of fewer scenes are a prefix of those of more.

    Args:
        scenes: Keys of samples with their scenes; the two of a minimal pair follow each other.
    """
    waiting: dict[Hashable, list[tuple[Keyed, Keyed]]] = defaultdict(list)
    numbers: dict[int, list[Keyed]] = defaultdict(list)
    for n, (own, other) in enumerate(zip(*[iter(scenes)] * 2)):
        rng = np.random.default_rng([seed, 2, n])
        for kind in ("colour", "shape", "place"):
            found = list(_compared(kind, own[1], other[1]))
            if found:
                names, one, two = found[rng.integers(len(found))]
                members = (own, other) if one < two else (other, own)
                yield from _four(kind, names, waiting[kind, names, frozenset((one, two))], members, rng)
        # only one of the pair: with both, the histogram would show which images belong together
        numbers[len(own[1].things)].append((own, other)[rng.integers(2)])
        for few, many in combinations(sorted(numbers), 2):
            while numbers[few] and numbers[many]:
                members = numbers[few].pop(), numbers[many].pop()
                yield from _four("number", (), waiting["number", few, many], members, rng)


def _compared(kind: str, own: Scene, other: Scene) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the differences of a minimal pair: names of the compared things, and the value in each scene."""
    if kind == "place":
        places = [between(scene.things, scene.relations) for scene in (own, other)]
        yield from ((names, places[0][names], places[1][names]) for names in places[0] if _differ(names, *places))
    else:
        name = "shape" if kind == "colour" else "colour"
        values = [{getattr(t, name): getattr(t, kind) for t in scene.things} for scene in (own, other)]
        yield from (((known,), values[0][known], values[1][known]) for known in values[0] if _differ(known, *values))


def _differ(name: Hashable, own: dict, other: dict) -> bool:
    return name in other and own[name] != other[name]


def _four(
    kind: str, names: tuple[str, ...], waiting: list[tuple[Keyed, Keyed]], members: tuple[Keyed, Keyed], rng
) -> Iterator[dict]:
    """Yield the four lines of two minimal pairs that differ in the same way, once there are two."""
    waiting.append(members)
    if len(waiting) < 2:
        return
    left, right = (waiting[n] for n in rng.permutation(2))
    waiting.clear()
    said_same = bool(rng.integers(2))
    text = STATEMENTS[kind][not said_same].format(*names)
    for (n, (left_key, _)), (m, (right_key, _)) in product(enumerate(left), enumerate(right)):
        yield {"image0": left_key, "image1": right_key, "text": text, "answer": (n == m) == said_same, "kind": kind}
