"""Texts without pictures: a sentence a line, or a table whose columns are the views of a sample (a sentence, what it
entails, what contradicts it). Read by random access, like shards, so that a run over them resumes to the sample."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vlp.data.reading.lines import Lines
from vlp.data.reading.shards import RawSample
from vlp.errors import BadSample, UserError
from vlp.files import resolve

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

    def at(self, location: str) -> Sentences:
        """Return a source of another file with the same columns."""
        return replace(self, path=location)

    def open(self) -> SentenceReader:
        return SentenceReader(self)


class SentenceReader:
    """Lines of a file by number.

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
        self.lines = Lines(self.path)
        self.header: list[str] = []
        if self.path.suffix in TABLES and len(self.lines):
            self._read_header()
        self.sizes = [len(self)]

    def _read_header(self) -> None:
        self.header = list(self.source.header)
        if not self.header:
            self.header = self._cells(self.lines[0])
            self.lines.bounds = self.lines.bounds[1:]
        wanted = [*self.source.columns, *([self.source.label] if self.source.label else [])]
        if missing := [name for name in wanted if name not in self.header]:
            raise UserError(f"{self.path} has no column {missing[0]!r}; it has {', '.join(self.header)}")

    def _cells(self, line: str) -> list[str]:
        # a tab-separated file is never quoted: sentences have single quotation marks
        quoting = csv.QUOTE_NONE if self.path.suffix == ".tsv" else csv.QUOTE_MINIMAL
        rows = list(csv.reader(io.StringIO(line), delimiter=TABLES[self.path.suffix], quoting=quoting))
        return rows[0] if rows else []

    def __len__(self) -> int:
        return len(self.lines)

    def _record(self, row: int) -> dict[str, str]:
        if self.path.suffix == ".txt":
            return {"text": self.lines[row]}
        if self.path.suffix == ".jsonl":
            return self.lines.record(row)
        cells = self._cells(self.lines[row])
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
        image_id = int.from_bytes(hashlib.sha256(texts[0].encode()).digest()[:8], "big") & INDEX_MASK
        return RawSample(str(row), shard, row, row, None, texts[:1], image_id, {}, texts[1:], label)

    def quarantine_entry(self, shard: int, row: int, reason: str) -> dict:
        """A line of quarantine.jsonl."""
        return {"source": self.location, "shard": self.path.name, "key": str(row), "reason": reason}

    def fingerprint(self) -> dict:
        """What the order of the samples depends on."""
        return {"shards": 1, "samples": len(self), "sha256": self.lines.sha256}

    @property
    def shards(self) -> list[str]:
        return [str(self.path)]


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
