"""Annotations of images: questions with answers, statements and hypotheses with classes. A line of a .jsonl is a sample.

Lines are read by random access, as samples of shards are, so that a run over them resumes at the exact sample. C classes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlp.data.reading.named_images import open_images
from vlp.data.reading.shards import RawSample, content_id
from vlp.data.reading.tables import Lines, as_text, read_json, read_lines
from vlp.errors import BadSample, UserError
from vlp.files import resolve
from vlp.specs.fields import setting

UNREADABLE = object()


@dataclass(frozen=True)
class Annotated:
    """A .jsonl of objects that name an image and annotate it.

    Args:
        path: The .jsonl.
        images: Folder that the paths of images start from (also ``pip:PACKAGE/path``), or shards (`vlp data pack`,
            `vlp data world`) whose samples are named by key, or by the path that was packed. None stands for the folder of
            the .jsonl.
        image: Field of the image, or fields of several images: NLVR2 has two.
        text: Field of the question, hypothesis or statement. None for annotations without text.
        label: Field of the class. None for annotations without classes.
        answers: Field of the answers. It contains one answer, or {answer: weight}, or a list with one answer per annotator,
            in which the weight of an answer is its share (VQA v2 has 10 annotators). None for annotations without answers.
        classes: Values of ``label``, or the answers that are classes; the index is the class number. A file has one per
            line, or is a json list. With ``answers``, a sample gets a soft target for each class.
        scores: Soft target of an answer that 1, 2, ... annotators gave, as in VQA; the last value is for this number or
            more. An answer with a weight has that weight as its target, and a single answer has 1.
        split: Keep lines whose field ``split_field`` has this value, or one of several joined by "+". None keeps all.
        split_field: Field of the split.
        weight: Share of the stream relative to the weights of other sources. None stands for the number of lines.
        together: Consecutive lines that a batch contains together. It must divide the number of lines.
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
    together: int = setting(1, least=1)

    @property
    def described(self) -> str:
        """The file and the split, for reports."""
        return f"{self.path}, split {self.split}" if self.split else self.path

    @property
    def location(self) -> str:
        """The file, under the name that all kinds of sources have for their data."""
        return self.path

    def at(self, location: str) -> Annotated:
        """Return a source of another file with the same columns."""
        return replace(self, path=location)

    def open(self) -> AnnotatedReader:
        """Open the file. Raises UserError if it or the images do not exist, or the split has no lines."""
        return AnnotatedReader(self)

    def resolved(self) -> Annotated:
        """Return the source with its classes written out, so that a run can name them without their file."""
        return replace(self, classes=self.class_list())

    def class_list(self) -> tuple[str, ...]:
        """Return the C classes. Raise UserError if their file is not a list of texts, or has one twice."""
        classes = read_list(self.classes) if isinstance(self.classes, str) and self.classes else tuple(self.classes)
        if twice := [name for name, count in Counter(classes).items() if count > 1]:
            raise UserError(f"the classes of {self.path} have {twice[0]!r} twice; leave one out")
        return classes


def to_evaluate(train: Sequence[Any], path: str | None, images: str | None, split: str | None) -> Annotated:
    """Return annotations to evaluate, with the fields of those that a run was trained on, or the defaults of `Annotated`.

    Args:
        train: Sources of the run.
        path: The .jsonl. None selects the one that the run was trained on, of which another split is evaluated.
        images: None selects the images of training.
        split: None selects all of ``path``.

    Raises:
        UserError: if neither a path nor a split is given.
    """
    trained = next((source for source in train if isinstance(source, Annotated)), None)
    if path is None and (trained is None or split is None):
        raise UserError(
            "there is nothing to evaluate: give data=ANNOTATIONS.jsonl, or split=SPLIT of the run's annotations"
        )
    base = trained or Annotated(path)
    return replace(base, path=path or base.path, images=images or base.images, split=split)


def read_list(path: str) -> tuple[str, ...]:
    """Read texts from a file with one per line, or from a json list (ALBEF's answer_list.json).

    Raises:
        UserError: if the file does not exist, is not UTF-8, or has no text.
    """
    file = resolve(path)
    found = read_json(file) if file.suffix == ".json" else read_lines(file)
    texts = found if isinstance(found, list) and all(isinstance(text, str) for text in found) else []
    if not any(text.strip() for text in texts):
        raise UserError(f"{file} is not a list of texts; give one per line, or a json list")
    return tuple(text.strip() for text in texts if text.strip())


class AnnotatedReader:
    """Lines of a split by index. File handles and indexes of shards are not pickled.

    Raises:
        UserError: if a file or folder does not exist, or the split has no lines.
    """

    def __init__(self, source: Annotated):
        self.source, self.location = source, source.path
        self.lines = Lines(resolve(source.path))
        self.lines.check_objects()
        self.lines.keep(self._of_split())
        self.sizes = [len(self)]
        self.classes = source.class_list()
        if source.label and not self.classes:
            raise UserError(f"name the values of the field {source.label!r} of {source.path}: set classes")
        self.store = open_images(source.images or str(self.lines.path.parent))

    def _of_split(self) -> np.ndarray:
        """Return the indices of the lines of the split. A line that cannot be read is kept, to be counted as bad."""
        if not self.source.split:
            return np.arange(len(self.lines))
        wanted = self.source.split.split("+")
        splits = [self._split(index) for index in range(len(self.lines))]
        found = {split for split in splits if isinstance(split, str)}
        if splits and not found.intersection(wanted):
            there = ", ".join(sorted(found)) or "none"
            raise UserError(f"{self.source.path} has no line of split {self.source.split!r}; its splits: {there}")
        kept = [index for index, split in enumerate(splits) if split is UNREADABLE or split in wanted]
        return np.array(kept, dtype=np.int64)

    def _split(self, index: int) -> Any:
        try:
            return self.lines.record(index).get(self.source.split_field)
        except BadSample:
            return UNREADABLE

    @cached_property
    def _class_numbers(self) -> dict[str, int]:
        return {name: n for n, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.lines)

    def locate(self, source_row: int) -> tuple[int, int]:
        """Return (shard, row) of a row of the source."""
        return 0, source_row

    def names(self, row: int) -> tuple[str, ...]:
        """Return the names of a line's images, in one spelling of a path. Raises BadSample if it names none."""
        record = self.lines.record(row)
        names = [record.get(field) for field in self.source.image]
        if missing := [field for field, name in zip(self.source.image, names) if not isinstance(name, str) or not name]:
            raise BadSample(f"no {missing[0]!r} that names an image")
        return tuple(map(one_spelling, names))

    def column(self, field: str) -> list[Any]:
        """Return the value of a field in each line; None if a line lacks it or cannot be read."""

        def value(row: int) -> Any:
            try:
                return self.lines.record(row).get(field)
            except BadSample:
                return None

        return [value(row) for row in range(len(self))]

    def annotation(self, row: int) -> RawSample:
        """Read a line without its images. Answers may be missing or not among the classes, as in a test set.

        Raises:
            BadSample: if the text or an image's name is missing, or the label is not a class.
        """
        record, source = self.lines.record(row), self.source
        names, captions, label = self.names(row), (), None
        if source.text:
            captions = (as_text(record.get(source.text), source.text),)
            if not captions[0]:
                raise BadSample(f"no text in {source.text!r}")
        if source.label and (label := self._class_numbers.get(word(record.get(source.label)))) is None:
            some = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
            raise BadSample(f"label {word(record.get(source.label))!r} is not among {some}")
        answers, targets = (), None
        if source.answers:
            answers, counts = read_answers(record.get(source.answers))
            targets = self._targets(answers, counts) if self.classes and not source.label else None
        # by name as long as the image is not read; readers of images replace it by that of the content
        image_id = content_id(names[0].encode(errors="replace"))
        return RawSample(self._key(row), 0, row, row, None, captions, image_id, record, (), label, (), answers, targets)

    def _targets(self, answers: Sequence[tuple[str, float]], counts: Sequence[int]) -> Tensor:
        """Compute (C,) soft targets: VQA's score of the number of annotators, or else the weight."""
        targets, scores = torch.zeros(len(self.classes)), self.source.scores
        for (answer, weight), count in zip(answers, counts):
            if (number := self._class_numbers.get(answer)) is not None:
                targets[number] = scores[min(count, len(scores)) - 1] if count else weight
        return targets

    def read(self, shard: int, row: int) -> RawSample:
        """Read a sample for training.

        Raises:
            BadSample: as `annotation`, and if an image, an answer or a target is missing.
        """
        raw = self.annotation(row)
        if self.source.answers and not raw.answers:
            raise BadSample(f"no answer in {self.source.answers!r}")
        if raw.targets is not None and not raw.targets.any():
            raise BadSample(f"none of the answers is a class: {', '.join(a for a, _ in raw.answers)}"[:200])
        image, *images = self.images(row)
        return replace(raw, image=image, images=tuple(images), image_id=content_id(image))

    def images(self, row: int) -> list[bytes]:
        """Read the encoded images of a line. Raises BadSample if one does not exist."""
        return [self.store.read(name) for name in self.names(row)]

    def quarantine_entry(self, shard: int, row: int, reason: str) -> dict:
        """Return a line of quarantine.jsonl; ``key`` is the line of the file, from 1."""
        return {"source": self.location, "shard": self.lines.path.name, "key": self._key(row), "reason": reason}

    def _key(self, row: int) -> str:
        """Line of the file, from 1."""
        return str(self.lines.numbers[row])

    def fingerprint(self) -> dict:
        """Return what the order of the samples depends on."""
        return {"shards": 1, "samples": len(self), "sha256": self.lines.sha256}

    @property
    def shards(self) -> list[str]:
        """The file, under the name that readers of shards have for theirs."""
        return [str(self.lines.path)]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_class_numbers"}


def one_spelling(name: str) -> str:
    """Return a path in the spelling that `a.jpg`, `./a.jpg` and `b/../a.jpg` share."""
    return name if "\0" in name else os.path.normpath(name)


def word(value: Any) -> str:
    """Return an answer or a label as text: a number or a truth value as JSON writes it, "" for a missing value.

    Raises:
        BadSample: if the value is a list or an object.
    """
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return as_text(value, "answer or label")


def read_answers(given: Any) -> tuple[tuple[tuple[str, float], ...], tuple[int, ...]]:
    """Return (answer, weight) of each distinct answer, and how many annotators gave it (0 if that does not count).

    Args:
        given: One answer, or {answer: weight}, or a list with the answer of each annotator.

    Raises:
        BadSample: if an answer is not a text, or a weight is not a number of 0 or more.
    """
    if isinstance(given, dict):
        weights = {word(answer): weight for answer, weight in given.items() if word(answer)}
        if wrong := [
            w for w in weights.values() if isinstance(w, bool) or not isinstance(w, (int, float)) or not w >= 0
        ]:
            raise BadSample(f"the weight of an answer is {wrong[0]!r}; it should be a number of 0 or more")
        return tuple((answer, float(weight)) for answer, weight in weights.items()), (0,) * len(weights)
    answers = [text for value in (given if isinstance(given, list) else [given]) if (text := word(value))]
    counts = Counter(answers)
    annotators = counts.values() if len(answers) > 1 else [0] * len(counts)
    return tuple((answer, count / len(answers)) for answer, count in counts.items()), tuple(annotators)
