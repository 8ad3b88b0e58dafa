"""Text files: lines, delimited tables and JSON lines, with one rule for all of them.

A file that is not UTF-8 is refused, with its line and its probable encoding. Blank lines are skipped. A value that is not a
text is a bad sample. Only the bounds of records are in memory, so that any record is read at the same cost.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vlp.errors import BadSample, UserError
from vlp.files import CHUNK, open_regular, read_regular

CONTAINERS = {  # first bytes of files that contain a text file, or are not one
    b"\x1f\x8b": "compressed by gzip: unpack it with gzip -d",
    b"BZh": "compressed by bzip2: unpack it with bzip2 -d",
    b"\xfd7zXZ": "compressed by xz: unpack it with xz -d",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it with zstd -d",
    b"PK\x03\x04": "a zip archive or an .xlsx: unpack it, or export the sheet as CSV in UTF-8",
    b"PAR1": "Parquet: convert it, e.g. with pandas.read_parquet(FILE).to_csv(OUT)",
    b"ARROW1": "Arrow: convert it, e.g. with pandas.read_feather(FILE).to_csv(OUT)",
    b"\xd0\xcf\x11\xe0": "an old .xls: export the sheet as CSV in UTF-8",
}
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BLANKS = " \t\n\r\x0b\x0c"  # characters of a blank line
VISIBLE = np.ones(256, dtype=bool)  # bytes that make a line more than blank
VISIBLE[list(BLANKS.encode())] = False
QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)
LINES_TO_TRY = 100  # of a table, in search of its columns
MAX_RESTARTS = 20  # after quotation marks that are never closed

csv.field_size_limit(10_000_000)  # characters; the library's 131,072 are too few for some alt-texts


def as_text(value: Any, name: str = "text") -> str:
    """Return a text without surrounding white space; "" for a missing value.

    Half of a surrogate pair, which JSON can express and no tokenizer accepts, becomes "?".

    Raises:
        BadSample: if the value is not a text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadSample(f"{name!r} should be a text, found {json.dumps(value)[:40]}")
    return value.encode(errors="replace").decode().strip()


def probable_encoding(start: bytes, line: bytes) -> str:
    """Guess the encoding of a file that is not UTF-8.

    Args:
        start: The first bytes of the file.
        line: The line that is not UTF-8.
    """
    for mark, name in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return name
    if start.count(0) > len(start) // 4:
        even, odd = start[::2].count(0), start[1::2].count(0)
        return "UTF-16LE" if odd > even else "UTF-16BE"
    # a Western text has few letters outside ASCII; texts in other scripts have hardly any inside
    high = sum(byte >= 0x80 for byte in line)
    return "windows-1252" if high <= 0.3 * len(line) else "an encoding of its own script, such as GB18030"


def _not_utf8(path: Path, line_number: int, encoding: str) -> UserError:
    name = encoding if " " not in encoding else "ENCODING"
    return UserError(
        f"{path}:{line_number} is not UTF-8; it is probably {encoding}: convert the file, e.g. with "
        f"iconv -f {name} -t UTF-8"
    )


def _check_start(path: Path, start: bytes) -> None:
    """Refuse containers of texts, and UTF-16 and UTF-32, which without a mark may be valid UTF-8 with NULs between letters."""
    if kind := next((kind for magic, kind in CONTAINERS.items() if start.startswith(magic)), None):
        raise UserError(f"{path} is not a text file but {kind}")
    if start.startswith(tuple(BYTE_ORDER_MARKS)) or start.count(0) > len(start) // 4:
        raise _not_utf8(path, 1, probable_encoding(start, b""))


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8.
    """
    try:
        data = read_regular(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None
    _check_start(path, data[:4096])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        # the decoder counts from behind the byte-order mark
        bad = e.start + len(data) - len(e.object)
        begin, end = data.rfind(b"\n", 0, bad) + 1, data.find(b"\n", bad)
        line = data[begin : end if end >= 0 else None]
        raise _not_utf8(path, data.count(b"\n", 0, bad) + 1, probable_encoding(data[:4096], line)) from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if the file is not UTF-8 or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno} is not JSON ({e.msg}); is the file complete?") from None
    except (ValueError, RecursionError) as e:  # a number of too many digits, or too deep nesting
        raise UserError(f"{path} is not JSON that can be read ({e})") from None


def parse_object(text: str | bytes) -> dict:
    """Parse a JSON object.

    Raises:
        BadSample: if the text is anything else.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadSample(f"json does not parse ({e})") from None
    if not isinstance(record, dict):
        raise BadSample("json is not an object")
    return record


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file that are not blank, without the spaces around them.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8.
    """
    lines = Lines(path)
    return [lines[index].strip() for index in range(len(lines))]


class Record(NamedTuple):
    """Record of a text file: a line, or several lines with a quoted line break.

    Args:
        begin: First byte in the file.
        end: Byte after the last one.
        line: Line of the file at which it begins, from 1.
        text: Its text without the last line's end.
    """

    begin: int
    end: int
    line: int
    text: str


def read_records(path: Path, quoted: str | None = None) -> Iterator[Record]:
    """Yield the records of a UTF-8 text file that are not blank. One record is in memory at a time.

    Args:
        quoted: Delimiter of a table whose quoted cells may contain line breaks.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8.
    """
    if quoted is not None and _has_quotes(path):
        yield from _join_quoted(path, _read_lines(path), quoted)
        return
    for record in _read_lines(path):
        if record.text.strip(BLANKS):
            yield record._replace(text=record.text.rstrip("\r\n"))


def _read_lines(path: Path) -> Iterator[Record]:
    """Yield all lines, with their ends."""
    try:
        with open_regular(path) as file:
            start = file.read(4096)
            _check_start(path, start)
            begin = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
            file.seek(begin)
            for number, line in enumerate(_split_lines(file), 1):
                try:
                    yield Record(begin, begin + len(line), number, line.decode())
                except UnicodeDecodeError:
                    raise _not_utf8(path, number, probable_encoding(start, line)) from None
                begin += len(line)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None


def _split_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of an open file with their ends: a line feed, or carriage returns in a file without line feeds."""
    begin, has_line_feed = file.tell(), False
    while not has_line_feed and (chunk := file.read(CHUNK)):
        has_line_feed = b"\n" in chunk
    file.seek(begin)
    if has_line_feed:
        yield from file
        return
    rest = b""
    while chunk := file.read(CHUNK):
        *lines, rest = (rest + chunk).split(b"\r")
        yield from (line + b"\r" for line in lines)
    if rest:
        yield rest


def _has_quotes(path: Path) -> bool:
    with open_regular(path) as file:
        return any(b'"' in chunk for chunk in iter(partial(file.read, CHUNK), b""))


def _join_quoted(path: Path, lines: Iterator[Record], delimiter: str) -> Iterator[Record]:
    """Join the lines that one record of a table extends over."""
    waiting: list[Record] = []  # lines of the current record, and lines that are read again
    restarts = 0

    def texts() -> Iterator[str]:
        yield from (line.text for line in waiting)
        for line in lines:
            waiting.append(line)
            yield line.text

    while True:
        reader = csv.reader(texts(), delimiter=delimiter, strict=True)
        try:
            is_blank, taken = not any(cell.strip() for cell in next(reader)), reader.line_num
        except StopIteration:
            return
        except csv.Error as e:  # this line is bad, and the lines that its quotation mark swallowed are read again
            is_blank, taken = False, 1
            # the mark is closed neither in the rest of the file nor in the longest cell that is allowed
            further = list(islice(lines, 1))
            waiting += further
            restarts += not further or "field limit" in str(e)
            if restarts > MAX_RESTARTS:
                raise UserError(
                    f"{path}:{waiting[0].line} has a quotation mark that is never closed, as have {MAX_RESTARTS} lines "
                    "before it; are the cells quoted as spreadsheets do it?"
                ) from None
        if not is_blank:
            joined = "".join(line.text for line in waiting[:taken])
            yield Record(waiting[0].begin, waiting[taken - 1].end, waiting[0].line, joined.rstrip("\r\n"))
        del waiting[:taken]


class Lines:
    """Lines of a UTF-8 text file that are not blank, by index.

    The file is opened on first access and not pickled.

    Attributes:
        bounds: (n, 2) int64 begin and end of each record in bytes.
        numbers: (n,) int64 line of the file at which each record begins, from 1.
        sha256: Hash of the file.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8.
    """

    def __init__(self, path: Path, quoted: str | None = None):
        """Scan the file.

        Args:
            quoted: Delimiter of a table whose quoted cells may contain line breaks.
        """
        self.path = path
        try:
            bounds, visible, has_quotes = self._scan()
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror})") from None
        if quoted and has_quotes:
            places = [(record.begin, record.end, record.line) for record in read_records(path, quoted)]
            self.bounds, self.numbers = np.split(np.array(places, dtype=np.int64).reshape(-1, 3), [2], 1)
            self.numbers = self.numbers[:, 0]
        else:
            self.bounds, self.numbers = bounds[visible], np.flatnonzero(visible) + 1

    def _scan(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return (lines, 2) bounds of all lines, (lines,) whether each is not blank, and whether there is a quotation mark."""
        for newline in (b"\n", b"\r"):
            ends, seen, size, total, has_quotes = [], [], 0, 0, False
            digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
            with open_regular(self.path) as file:
                start = file.read(4096)
                _check_start(self.path, start)
                file.seek(0)
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    try:
                        decoder.decode(chunk)
                    except UnicodeDecodeError as e:
                        raise self._error(file, size + e.start - (len(e.object) - len(chunk)), start) from None
                    characters = np.frombuffer(chunk, np.uint8)
                    at = np.flatnonzero(characters == newline[0])
                    visible = np.cumsum(VISIBLE[characters]) + total  # visible characters up to each one
                    ends.append(at + 1 + size)
                    seen.append(visible[at])
                    size, total = size + len(chunk), int(visible[-1])
                    has_quotes |= b'"' in chunk
                try:
                    decoder.decode(b"", final=True)
                except UnicodeDecodeError as e:
                    raise self._error(file, size - len(e.object), start) from None
            if sum(map(len, ends)) or newline == b"\r":
                break  # a file with only carriage returns is read a second time
        self.sha256 = digest.hexdigest()
        begin = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        mark = sum(VISIBLE[byte] for byte in start[:begin])
        ends, seen = np.concatenate([*ends, [size]]), np.concatenate([*seen, [total]])
        bounds = np.stack([np.concatenate([[begin], ends[:-1]]), ends], 1).astype(np.int64)
        visible = np.diff(seen, prepend=mark) > 0
        return bounds, visible, has_quotes

    def _error(self, file, position: int, start: bytes) -> UserError:
        """Return the error for the byte at ``position``, which is not UTF-8."""
        file.seek(0)
        lines, left = 1, position
        while left > 0:
            chunk = file.read(min(left, CHUNK))
            lines, left = lines + chunk.count(b"\n"), left - len(chunk)
        file.seek(max(0, position - 100))
        around = file.read(200)
        return _not_utf8(self.path, lines, probable_encoding(start, around.replace(b"\n", b"")))

    def _decode(self, begin: int, end: int) -> str:
        return os.pread(self._file.fileno(), int(end) - int(begin), int(begin)).decode(errors="replace")

    @cached_property
    def _file(self):
        return open_regular(self.path)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> str:
        return self._decode(*self.bounds[index]).rstrip("\r\n")

    def keep(self, indices: np.ndarray) -> None:
        """Keep only the records at ``indices``."""
        self.bounds, self.numbers = self.bounds[indices], self.numbers[indices]

    def record(self, index: int) -> dict:
        """Parse a line of a .jsonl.

        Raises:
            BadSample: if the line is not a JSON object.
        """
        return parse_object(self[index])

    def check_objects(self) -> None:
        """Raise UserError if the file is one JSON list instead of one object per line.

        One line that is a list, among lines that are objects, is a bad sample instead.
        """
        if len(self) and self[0].lstrip().startswith("[") and not is_json_lines(self.path):
            raise UserError(f"{self.path} is a JSON list; write one object per line, e.g. with jq -c '.[]'")

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_file"}


def first_lines(path: Path, count: int) -> list[str]:
    """Return at most ``count`` lines from the start of a file that are not blank. They are not checked to be UTF-8."""
    try:
        with open_regular(path) as file:
            start = file.read(CHUNK)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None
    _check_start(path, start[:4096])
    lines = re.split(r"[\r\n]", start.decode("utf-8-sig", errors="replace"))
    return list(islice((line for line in lines if line.strip()), count))


def first_line(path: Path) -> str:
    """Return the first line of a file that is not blank, or ""."""
    return next(iter(first_lines(path, 1)), "")


def is_json_lines(path: Path) -> bool:
    """Return whether the first two lines are JSON by themselves, and one of them is an object."""
    try:
        values = [json.loads(line) for line in first_lines(path, 2)]
    except (ValueError, RecursionError):
        return False
    return len(values) > 1 and any(isinstance(value, dict) for value in values)


class Columns(NamedTuple):
    """Names of a table's columns, and whether its first line contains them."""

    names: list[str]
    is_header: bool


@dataclass(frozen=True)
class TableForm:
    """Delimiter and columns of a table.

    Tables with commas, semicolons or vertical bars are quoted as spreadsheets do it (RFC 4180). In a table with tabs a
    quotation mark is an ordinary character, unless a cell is completely and correctly quoted.

    Args:
        delimiter: One of `DELIMITERS`.
        names: Names of the columns; empty for an empty file.
        is_header: Whether the first line contains them.
    """

    delimiter: str
    names: tuple[str, ...]
    is_header: bool

    @classmethod
    def detect(
        cls, path: Path, columns_of: Callable[[list[str]], Columns | None], expected: str, delimiter: str | None = None
    ) -> TableForm:
        """Find the delimiter with which the first line has the expected columns.

        A table without a header may begin with malformed rows: then its columns are those of the first line that has them.

        Args: as `Table`.

        Raises:
            UserError: if the file cannot be read, or has other columns.
        """
        delimiter = delimiter or ("\t" if path.suffix.lower() in (".tsv", ".txt") else ",")
        candidates = tuple(dict.fromkeys([delimiter, *DELIMITERS]))
        lines = first_lines(path, LINES_TO_TRY)
        if not lines:
            return cls(delimiter, (), False)
        first = lines[0]
        found = cls._find(lines[:1], candidates, columns_of)
        if found is None:  # a malformed row has another number of cells
            found = cls._find(lines[1:], candidates, columns_of)
            if found and (found.is_header or len(split_cells(first, found.delimiter) or ()) == len(found.names)):
                found = None
        if found is None:  # the message names the delimiter that the line has
            delimiter = max(candidates, key=first.count)
            shown = ", ".join(map(repr, first.split(delimiter)))[:200]
            how = f"separated by {DELIMITERS[delimiter]}" if delimiter in first else "in one column"
            line = next(read_records(path)).line
            raise UserError(f"{path}:{line}: expected {expected}; found {shown}, {how}")
        return found

    @classmethod
    def _find(
        cls, lines: list[str], delimiters: Sequence[str], columns_of: Callable[[list[str]], Columns | None]
    ) -> TableForm | None:
        for delimiter in delimiters:
            for line in lines:
                if (cells := split_cells(line, delimiter)) and (columns := columns_of(cells)):
                    return cls(delimiter, tuple(columns.names), columns.is_header)
        return None

    @property
    def quoted(self) -> str | None:
        """The delimiter if cells may contain line breaks, else None."""
        return None if self.delimiter == "\t" else self.delimiter

    def parse(self, text: str) -> dict[str, str]:
        """Return the cells of a row by column.

        Raises:
            BadSample: if the row is not quoted correctly, or has another number of cells.
        """
        cells = split_cells(text, self.delimiter)
        if cells is None:
            raise BadSample("not a row of a table: a quotation mark is not closed, or not followed by a delimiter")
        if len(cells) != len(self.names):
            lines = text.count("\n")
            swallowed = f" (it extends over {lines + 1} lines: is a quotation mark missing?)" if lines else ""
            raise BadSample(f"{len(cells)} columns; expected {len(self.names)}: {', '.join(self.names)}{swallowed}")
        return dict(zip(self.names, cells))


class Table:
    """Rows of a delimited table, by index.

    Args:
        path: The file.
        columns_of: Function from the cells of the first line to `Columns`, or to None if they are not those of such a table.
        expected: Description of the expected columns, for the error message.
        delimiter: The delimiter to try first. None selects it by the extension.

    Raises:
        UserError: if the file cannot be read, is not UTF-8, or has other columns.
    """

    def __init__(
        self,
        path: Path,
        columns_of: Callable[[list[str]], Columns | None],
        expected: str,
        delimiter: str | None = None,
    ):
        self.path, self.form = path, TableForm.detect(path, columns_of, expected, delimiter)
        self.lines = Lines(path, quoted=self.form.quoted)
        if self.form.is_header:
            self.lines.keep(np.arange(1, len(self.lines)))

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, index: int) -> dict[str, str]:
        """Return the cells of a row by column. Raises BadSample as `TableForm.parse`."""
        return self.form.parse(self.lines[index])


def split_cells(text: str, delimiter: str) -> list[str] | None:
    """Return the stripped cells of a row, or None if its quotation marks are wrong."""
    if delimiter == "\t":
        return [_unquote(cell.strip()) for cell in text.split("\t")]
    try:
        rows = list(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return [cell.strip() for cell in rows[0]] if len(rows) == 1 else None


def _unquote(cell: str) -> str:
    quoted = QUOTED.fullmatch(cell)
    return quoted[1].replace('""', '"') if quoted else cell


def has_columns(wanted: Sequence[str]) -> Callable[[list[str]], Columns | None]:
    """Return a ``columns_of`` for `Table` that accepts a header with all ``wanted`` names."""
    return lambda cells: Columns(cells, True) if set(wanted) <= set(cells) else None
