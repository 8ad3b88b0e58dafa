"""Texts without pictures: a sentence a line, or a table whose columns are the views of a sample (a sentence, what it
entails, what contradicts it). Read by random access, like shards, so that a run over them resumes to the sample."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlp.data.shards import RawSample
from vlp.errors import BadSample, UserError
from vlp.models.pretrained import resolve

TABLES = {".tsv": "\t", ".csv": ","}
INDEX_MASK = (1 << 40) - 1


@dataclass(frozen=True)
class Sentences:
    """One file of texts: .txt (a sentence a line), .tsv or .csv (the first line names the columns), .jsonl.

    Args:
        columns: each is a view of the sample, in this order; () = the only text of a .txt.
        join: put between the columns, which then are one text together (" [SEP] " for a pair of sentences); None = not.
        header: names of all columns of a table whose first line does not give them; () = it does.
        label: column with the class; None = there is none.
        classes: what that column holds; a class's number is its place here.
        weight: share of the stream relative to the other sources' weights; None = number of lines.
    """

    path: str
    columns: tuple[str, ...] = ()
    join: str | None = None
    header: tuple[str, ...] = ()
    label: str | None = None
    classes: tuple[str, ...] = ()
    weight: float | None = None

    def open(self) -> SentenceReader:
        return SentenceReader(self)


class SentenceReader:
    """Lines of a file by number. Only their offsets are in memory; the handle is opened when first needed, not pickled.

    Raises UserError where there is no such file, or it lacks a column.
    """

    def __init__(self, source: Sentences):
        self.source, self.location = source, source.path
        self.path = resolve(source.path)
        if self.path.suffix not in (*TABLES, ".txt", ".jsonl"):
            raise UserError(f"{self.path} is no file of texts; give a .txt, .tsv, .csv or .jsonl")
        if self.path.suffix == ".txt" and (source.columns or source.label):
            raise UserError(f"{self.path} has no columns; give a .tsv, .csv or .jsonl, or no columns")
        if self.path.suffix != ".txt" and not source.columns:
            raise UserError(f"name the columns of {self.path} that hold the texts: columns=('sentence',)")
        self.header: list[str] = []
        self.offsets, self.sha256 = self._scan()
        self.sizes = [len(self)]

    def _scan(self) -> tuple[np.ndarray, str]:
        """Where the lines begin, with the end of the last, and the hash of the file."""
        content = self.path.read_bytes()
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
        offsets = np.concatenate([[0], ends, [] if content.endswith(b"\n") or not content else [len(content)]])
        offsets = offsets.astype(np.int64)
        if self.path.suffix in TABLES and len(offsets) > 1:
            self.header = list(self.source.header)
            if not self.header:
                self.header = self._cells(content[: offsets[1]].decode("utf-8-sig", errors="replace"))
                offsets = offsets[1:]
            wanted = [*self.source.columns, *([self.source.label] if self.source.label else [])]
            if missing := [name for name in wanted if name not in self.header]:
                raise UserError(f"{self.path} has no column {missing[0]!r}; it has {', '.join(self.header)}")
        return offsets, hashlib.sha256(content).hexdigest()

    def _cells(self, line: str) -> list[str]:
        # a tab-separated file is never quoted: sentences have single quotation marks
        quoting = csv.QUOTE_NONE if self.path.suffix == ".tsv" else csv.QUOTE_MINIMAL
        rows = list(csv.reader(io.StringIO(line), delimiter=TABLES[self.path.suffix], quoting=quoting))
        return rows[0] if rows else []

    @cached_property
    def _file(self):
        return open(self.path, "rb")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _line(self, row: int) -> str:
        begin, end = self.offsets[row : row + 2].tolist()
        text = os.pread(self._file.fileno(), end - begin, begin).decode("utf-8", errors="replace")
        return text.strip("\r\n")

    def _record(self, row: int) -> dict[str, str]:
        line = self._line(row)
        if self.path.suffix == ".txt":
            return {"text": line}
        if self.path.suffix == ".jsonl":
            try:
                record = json.loads(line)
            except ValueError as e:
                raise BadSample(f"json does not parse ({e})") from None
            if not isinstance(record, dict):
                raise BadSample("json is not an object")
            return record
        cells = self._cells(line)
        if len(cells) != len(self.header):
            raise BadSample(f"{len(cells)} columns where the first line has {len(self.header)}")
        return dict(zip(self.header, cells))

    def read(self, shard: int, row: int) -> RawSample:
        """Raises BadSample for a line without a text, or with a label that is no class."""
        record, source = self._record(row), self.source
        texts = tuple(str(record.get(column, "")).strip() for column in source.columns or ("text",))
        if not all(texts):
            raise BadSample("a text is missing or empty")
        if source.join is not None:
            texts = (source.join.join(texts),)
        label = None
        if source.label:
            label = str(record.get(source.label))
            if label not in source.classes:
                raise BadSample(f"label {label!r} is not among {', '.join(source.classes)}")
            label = source.classes.index(label)
        # equal sentences are positives of each other, not negatives
        index = int.from_bytes(hashlib.sha256(texts[0].encode()).digest()[:8], "big") & INDEX_MASK
        return RawSample(str(row), shard, row, row, None, texts[:1], index, {}, texts[1:], label)

    def complaint(self, shard: int, row: int, reason: str) -> dict:
        """A line of quarantine.jsonl."""
        return {"source": self.location, "shard": self.path.name, "key": str(row), "reason": reason}

    def fingerprint(self) -> dict:
        """What the order of the samples depends on."""
        return {"shards": 1, "samples": len(self), "sha256": self.sha256}

    @property
    def shards(self) -> list[str]:
        return [str(self.path)]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_file"}


def nli_triples(path: Path) -> Iterator[tuple[str, str, str]]:
    """(premise, what it entails, what contradicts it) from lines ``label<TAB>premise<TAB>hypothesis`` (Gao et al. 2021,
    sec. 4.1): the n-th entailment of a premise goes with its n-th contradiction, what is over is left out.

    Raises:
        UserError: naming the line that has not three columns.
    """
    found: dict[str, dict[str, list[str]]] = {}
    with open(path, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) != 3:
                raise UserError(f"{path} line {number}: expected label, premise and hypothesis separated by tabs")
            label, premise, hypothesis = cells
            found.setdefault(premise, {}).setdefault(label, []).append(hypothesis)
    for premise, by_label in found.items():
        for entailed, contradicted in zip(by_label.get("entailment", []), by_label.get("contradiction", [])):
            yield premise, entailed, contradicted
