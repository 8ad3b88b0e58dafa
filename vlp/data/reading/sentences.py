"""Texts without images: one sentence per line, or a table whose columns are the views of a sample.

Views are, for example, a sentence, a sentence that it entails, and one that it contradicts. Rows are read by random access,
as samples of shards are, so that a run over them resumes at the exact sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vlp.data.reading.shards import RawSample, content_id
from vlp.data.reading.tables import Columns, Lines, Table, as_text, has_columns
from vlp.errors import BadSample, UserError
from vlp.files import resolve
from vlp.specs.fields import setting

KINDS = (".txt", ".tsv", ".csv", ".jsonl")
NLI_COLUMNS = ("label", "premise", "hypothesis")


@dataclass(frozen=True)
class Sentences:
    """A file of texts: .txt (one sentence per line), .tsv or .csv (the first line names the columns), .jsonl.

    Args:
        path: The file.
        columns: Columns of the views of a sample, in this order. Empty for a .txt, which has one text per line.
        join: Separator that joins the columns to one text (" [SEP] " for a pair of sentences). None keeps them separate.
        header: Names of all columns of a table whose first line does not contain them.
        label: Column of the class. None for texts without classes.
        classes: Values of that column. The index of a value is its class number.
        weight: Share of the stream relative to the weights of other sources. None stands for the number of rows.
        together: Consecutive rows that a batch contains together. It must divide the number of rows.
    """

    path: str
    columns: tuple[str, ...] = ()
    join: str | None = None
    header: tuple[str, ...] = ()
    label: str | None = None
    classes: tuple[str, ...] = ()
    weight: float | None = None
    together: int = setting(1, least=1)

    @property
    def location(self) -> str:
        """The file, under the name that all kinds of sources have for their data."""
        return self.path

    def at(self, location: str) -> Sentences:
        """Return a source of another file with the same columns."""
        return replace(self, path=location)

    def open(self) -> SentenceReader:
        """Open the file. Raises UserError if it does not exist, is not UTF-8, or lacks a column."""
        return SentenceReader(self)


class SentenceReader:
    """Rows of a file of texts by index.

    Raises:
        UserError: if the file does not exist, is not UTF-8, or lacks a column.
    """

    def __init__(self, source: Sentences):
        self.source, self.location = source, source.path
        self.path = resolve(source.path)
        kind = self.path.suffix.lower()
        if kind not in KINDS:
            raise UserError(f"{self.path} is not a file of texts; give a {', '.join(KINDS)}")
        if kind == ".txt" and (source.columns or source.label):
            raise UserError(f"{self.path} has no columns; give a .tsv, .csv or .jsonl, or no columns")
        if kind != ".txt" and not source.columns:
            raise UserError(f"name the columns of {self.path} that contain the texts: columns=('sentence',)")
        self.table = self._open_table() if kind in (".tsv", ".csv") else None
        self.lines = self.table.lines if self.table else Lines(self.path)
        if kind == ".jsonl":
            self.lines.check_objects()
        self.sizes = [len(self)]

    def _open_table(self) -> Table:
        wanted = [*self.source.columns, *([self.source.label] if self.source.label else [])]
        names = list(self.source.header)
        if names:
            if missing := [name for name in wanted if name not in names]:
                raise UserError(f"header has no column {missing[0]!r}; it has {', '.join(map(repr, names))}")
            expected = f"{len(names)} columns: {', '.join(map(repr, names))}"
            return Table(self.path, lambda cells: Columns(names, False) if len(cells) == len(names) else None, expected)
        expected = f"a header with the column{'s' * (len(wanted) > 1)} {', '.join(map(repr, wanted))}"
        return Table(self.path, has_columns(wanted), expected)

    def __len__(self) -> int:
        return len(self.lines)

    def _record(self, row: int) -> dict:
        if self.table:
            return self.table.record(row)
        return self.lines.record(row) if self.path.suffix.lower() == ".jsonl" else {"text": self.lines[row]}

    def read(self, shard: int, row: int) -> RawSample:
        """Read a sample.

        Raises:
            BadSample: if a text is missing or not a text, or the label is not a class.
        """
        record, source = self._record(row), self.source
        texts = tuple(as_text(record.get(column), column) for column in source.columns or ("text",))
        if not all(texts):
            missing = [column for column in source.columns if column not in record]
            names = f": no {missing[0]!r} among {', '.join(map(repr, record))[:200]}" if missing and record else ""
            raise BadSample(f"a text is missing or empty{names}")
        if source.join is not None:
            texts = (source.join.join(texts),)
        label = None
        if source.label:
            label = str(record.get(source.label))
            if label not in source.classes:
                raise BadSample(f"label {label!r} is not among {', '.join(source.classes)}")
            label = source.classes.index(label)
        # equal sentences are positives of each other, not negatives
        image_id = content_id(texts[0].encode())
        return RawSample(self._key(row), shard, row, row, None, texts[:1], image_id, {}, texts[1:], label)

    def _key(self, row: int) -> str:
        """Line of the file, from 1."""
        return str(self.lines.numbers[row])

    def quarantine_entry(self, shard: int, row: int, reason: str) -> dict:
        """Return a line of quarantine.jsonl; ``key`` is the line of the file, from 1."""
        return {"source": self.location, "shard": self.path.name, "key": self._key(row), "reason": reason}

    def fingerprint(self) -> dict:
        """Return what the order of the samples depends on."""
        return {"shards": 1, "samples": len(self), "sha256": self.lines.sha256}

    @property
    def shards(self) -> list[str]:
        """The file, under the name that readers of shards have for theirs."""
        return [str(self.path)]


def nli_triples(path: Path, bad: list[dict] | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield (premise, entailed, contradicted) from a table of label, premise and hypothesis (Gao et al. 2021, sec. 4.1).

    The n-th entailment of a premise is combined with its n-th contradiction; further ones are left out.

    Args:
        bad: List to which the quarantine entries of unusable rows are appended.

    Raises:
        UserError: if the file is not such a table, or none of its rows is usable.
    """
    bad = [] if bad is None else bad
    found: dict[str, dict[str, list[str]]] = {}
    table = Table(path, _nli_columns, "label, premise and hypothesis separated by tabs")
    for row in range(len(table)):
        try:
            label, premise, hypothesis = table.record(row).values()
            if not (premise and hypothesis):
                raise BadSample("a text is missing or empty")
        except BadSample as e:
            bad.append({"source": str(path), "key": str(table.lines.numbers[row]), "reason": str(e)})
            continue
        found.setdefault(premise, {}).setdefault(label, []).append(hypothesis)
    if len(table) and not found:
        raise UserError(
            f"none of the {len(table)} rows of {path} is usable; line {bad[-1]['key']}: {bad[-1]['reason']}"
        )
    for premise, by_label in found.items():
        for entailed, contradicted in zip(by_label.get("entailment", []), by_label.get("contradiction", [])):
            yield premise, entailed, contradicted


def _nli_columns(cells: list[str]) -> Columns | None:
    return Columns(list(NLI_COLUMNS), is_header=cells == list(NLI_COLUMNS)) if len(cells) == 3 else None
