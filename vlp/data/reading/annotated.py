"""Annotations of pictures: questions with answers, statements and hypotheses with classes. A line of a .jsonl is a sample.

Read by random access, like shards, so that a run over them resumes to the sample. C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlp.data.reading.lines import Lines
from vlp.data.reading.named_images import open_images
from vlp.data.reading.shards import IMAGE_ID_BITS, RawSample
from vlp.errors import BadSample, UserError
from vlp.files import resolve

UNREADABLE = object()


@dataclass(frozen=True)
class Annotated:
    """A .jsonl of objects that name their picture, and what is said of it.

    Args:
        images: folder that the paths of pictures start from (``pip:PACKAGE/path`` too), or shards (`vlp data pack`, `vlp data world`) whose samples they
            name by key, or by the path that was packed; None = the folder of the .jsonl.
        image: the field of the picture, or the fields of several: NLVR2 has two.
        text: field of the question, hypothesis or statement; None = there is none.
        label: field of the class; None = there is none.
        answers: field of the answers; None = there are none. It holds one; or {answer: weight}; or a list, with what each
            annotator said, where the weight of an answer is its share (VQA v2: 10 annotators).
        classes: what ``label`` may be, or the answers that are classes, by number; a file has one a line, or is a json list.
            With ``answers`` a sample gets a soft target for each.
        scores: the soft target of an answer that 1, 2, ... annotators gave, the last for as many or more; VQA's. What has a
            weight, or is the only answer, has that weight, or 1.
        split: lines whose field ``split_field`` is this one, or one of several joined by "+"; None = all.
        weight: share of the stream relative to the other sources' weights; None = number of lines.
    """

    path: str
    images: str | None = None
    image: tuple[str, ...] = ("image",)
    text: str | None = "text"
    label: str | None = None
    answers: str | None = None
    classes: str | tuple[str, ...] = ()
    scores: tuple[float, ...] = (0.3, 0.6, 0.9, 1.0)
    split: str | None = None
    split_field: str = "split"
    weight: float | None = None

    @property
    def described(self) -> str:
        """The file, and of which split its lines are."""
        return f"{self.path}, split {self.split}" if self.split else self.path

    def at(self, location: str) -> Annotated:
        """Return a source of another file with the same columns."""
        return replace(self, path=location)

    def open(self) -> AnnotatedReader:
        return AnnotatedReader(self)

    def resolved(self) -> Annotated:
        """With the classes written out, so that what a run has learned can be named without their file."""
        return replace(self, classes=self.class_list())

    def class_list(self) -> tuple[str, ...]:
        """The C classes. Raises UserError where their file is not one, or has one twice."""
        classes = read_list(self.classes) if isinstance(self.classes, str) and self.classes else tuple(self.classes)
        if twice := [name for name, count in Counter(classes).items() if count > 1]:
            raise UserError(f"the classes of {self.path} have {twice[0]!r} twice; leave one out")
        return classes


def to_evaluate(train: Sequence[Any], path: str | None, images: str | None, split: str | None) -> Annotated:
    """Annotations read as those that a run was trained on, or, where there are none, by the names of `Annotated`'s fields.

    Args:
        train: the run's sources.
        path: of the .jsonl; None = the one that it was trained on, of which another split is to be evaluated.
        images: None = as in training.
        split: None = all of ``path``.

    Raises:
        UserError: where nothing says what to evaluate.
    """
    trained = next((source for source in train if isinstance(source, Annotated)), None)
    if path is None and (trained is None or split is None):
        raise UserError("there is nothing to evaluate: give data=ANNOTATIONS.jsonl, or split=SPLIT of the run's own")
    base = trained or Annotated(path)
    return replace(base, path=path or base.path, images=images or base.images, split=split)


def read_list(path: str) -> tuple[str, ...]:
    """Texts of a file with one a line, or of a json list (ALBEF's answer_list.json).

    Raises:
        UserError: if there is no such file, or no text in it.
    """
    file = resolve(path)
    try:
        content = file.read_text(encoding="utf-8-sig")
        found = json.loads(content) if file.suffix == ".json" else content.splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"{file} is no list of texts ({e}); give one a line, or a json list") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found) or not any(found):
        raise UserError(f"{file} is no list of texts; give one a line, or a json list")
    return tuple(text.strip() for text in found if text.strip())


class AnnotatedReader:
    """Lines by number, those of the split alone. Neither file handles nor the shards' indexes are pickled.

    Raises UserError where a file or folder is not there, or nothing is of the split.
    """

    def __init__(self, source: Annotated):
        self.source, self.location = source, source.path
        self.lines = Lines(resolve(source.path))
        self.numbers = self._of_split()  # (n,) int64 of the file's lines, from 0
        self.lines.bounds = self.lines.bounds[self.numbers]
        self.sizes = [len(self)]
        self.classes = source.class_list()
        if source.label and not self.classes:
            raise UserError(f"name what the field {source.label!r} of {source.path} may hold: set classes")
        self.store = open_images(source.images or str(self.lines.path.parent))

    def _of_split(self) -> np.ndarray:
        """The lines of the split, none of them blank; one that cannot be read stays, to be counted as bad."""
        filled = [number for number in range(len(self.lines)) if self.lines[number].strip()]
        wanted = self.source.split.split("+") if self.source.split else []
        splits = {number: self._split(number) for number in filled} if wanted else {}
        if wanted and splits and not set(wanted).intersection(splits.values()):
            there = ", ".join(sorted({s for s in splits.values() if isinstance(s, str)})) or "none"
            raise UserError(f"{self.source.path} has no line of split {self.source.split!r}; its splits: {there}")
        kept = [number for number in filled if not wanted or splits[number] in (*wanted, UNREADABLE)]
        return np.array(kept, dtype=np.int64)

    def _split(self, number: int) -> Any:
        try:
            return self.lines.record(number).get(self.source.split_field)
        except BadSample:
            return UNREADABLE

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: n for n, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.lines)

    def locate(self, source_row: int) -> tuple[int, int]:
        """Return (shard, row) of a row of the source."""
        return 0, source_row

    def names(self, row: int) -> tuple[str, ...]:
        """The pictures of a line. Raises BadSample where it names none."""
        record = self.lines.record(row)
        names = [record.get(field) for field in self.source.image]
        if missing := [field for field, name in zip(self.source.image, names) if not isinstance(name, str) or not name]:
            raise BadSample(f"no {missing[0]!r} that names a picture")
        return tuple(names)

    def column(self, field: str) -> list[Any]:
        """What each line has there; None where it has nothing, or cannot be read."""

        def value(row: int) -> Any:
            try:
                return self.lines.record(row).get(field)
            except BadSample:
                return None

        return [value(row) for row in range(len(self))]

    def annotation(self, row: int) -> RawSample:
        """What a line says, without its pictures; answers may be missing, or none of the classes, as in a test set.

        Raises:
            BadSample: without a text or a picture's name, or with a label that is no class.
        """
        record, source = self.lines.record(row), self.source
        names, captions, label = self.names(row), (), None
        if source.text:
            captions = (word(record.get(source.text)),)
            if not captions[0]:
                raise BadSample(f"no text in {source.text!r}")
        if source.label and (label := self._place.get(word(record.get(source.label)))) is None:
            some = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
            raise BadSample(f"label {word(record.get(source.label))!r} is not among {some}")
        answers, targets = (), None
        if source.answers:
            answers, counts = read_answers(record.get(source.answers))
            targets = self._targets(answers, counts) if self.classes and not source.label else None
        # equal names are the same picture; within the bits that a sample's index has
        image_id = int.from_bytes(hashlib.sha256(names[0].encode()).digest()[:8], "big") % (1 << IMAGE_ID_BITS)
        key = str(self.numbers[row] + 1)
        return RawSample(key, 0, row, row, None, captions, image_id, record, (), label, (), answers, targets)

    def _targets(self, answers: Sequence[tuple[str, float]], counts: Sequence[int]) -> Tensor:
        """(C,) soft targets; of VQA's annotators by their number, else the weight."""
        targets, scores = torch.zeros(len(self.classes)), self.source.scores
        for (answer, weight), count in zip(answers, counts):
            if (place := self._place.get(answer)) is not None:
                targets[place] = scores[min(count, len(scores)) - 1] if count else weight
        return targets

    def read(self, shard: int, row: int) -> RawSample:
        """A sample to train on. Raises BadSample where `annotation` does, and without a picture, an answer or a target."""
        raw = self.annotation(row)
        if self.source.answers and not raw.answers:
            raise BadSample(f"no answer in {self.source.answers!r}")
        if raw.targets is not None and not raw.targets.any():
            raise BadSample(f"none of the answers is a class: {', '.join(a for a, _ in raw.answers)}"[:200])
        image, *images = self.images(row)
        return replace(raw, image=image, images=tuple(images))

    def images(self, row: int) -> list[bytes]:
        """The encoded pictures of a line. Raises BadSample where one is not there."""
        return [self.store.read(name) for name in self.names(row)]

    def quarantine_entry(self, shard: int, row: int, reason: str) -> dict:
        """A line of quarantine.jsonl; ``key`` is the line's number, from 1."""
        return {
            "source": self.location,
            "shard": self.lines.path.name,
            "key": str(self.numbers[row] + 1),
            "reason": reason,
        }

    def fingerprint(self) -> dict:
        """What the order of the samples depends on."""
        return {"shards": 1, "samples": len(self), "sha256": self.lines.sha256}

    @property
    def shards(self) -> list[str]:
        return [str(self.lines.path)]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_place"}


def word(value: Any) -> str:
    """A text as it stands; a number, or true, as JSON writes it."""
    return "" if value is None else value.strip() if isinstance(value, str) else json.dumps(value)


def read_answers(given: Any) -> tuple[tuple[tuple[str, float], ...], tuple[int, ...]]:
    """(answer, weight) for each distinct one, and how many annotators gave it (0 where they do not count).

    Args:
        given: one answer; {answer: weight}; or a list, of what each annotator said.

    Raises:
        BadSample: where a weight is no number from 0 on.
    """
    if isinstance(given, dict):
        weights = {word(answer): weight for answer, weight in given.items() if word(answer)}
        if wrong := [
            w for w in weights.values() if isinstance(w, bool) or not isinstance(w, (int, float)) or not w >= 0
        ]:
            raise BadSample(f"the weight of an answer is {wrong[0]!r}; it should be a number from 0 on")
        return tuple((answer, float(weight)) for answer, weight in weights.items()), (0,) * len(weights)
    said = [text for value in (given if isinstance(given, list) else [given]) if (text := word(value))]
    counts = Counter(said)
    annotators = counts.values() if len(said) > 1 else [0] * len(counts)
    return tuple((answer, count / len(said)) for answer, count in counts.items()), tuple(annotators)
