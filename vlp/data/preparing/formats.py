"""Image-caption pairs from common annotation files: CSV, TSV, JSONL, Karpathy's, COCO's and ALBEF's json.

A file that cannot be read as a whole is an error. A row that cannot be used is a pair with a `Pair.problem`, which `pack`
writes to quarantine.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlp.data.preparing.documents import Records, read_document
from vlp.data.reading.index import IMAGE_FILE, long_key, short_key
from vlp.data.reading.tables import (
    DELIMITERS,
    Columns,
    Record,
    TableForm,
    as_text,
    first_line,
    first_lines,
    is_json_lines,
    parse_object,
    read_records,
    split_cells,
)
from vlp.errors import BadSample, UserError
from vlp.files import local_path, open_regular, relative_to

IMAGE_NAMES = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "filename",
    "file_name",
    "image_name",
    "file",
    "path",
    "img",
)
CAPTION_NAMES = ("captions", "caption", "title", "text", "sentences", "sentence", "description", "comment", "name")
CAPTION_NUMBER = r"#\d+$"  # Flickr8k's and Flickr30k's x.jpg#0 is x.jpg
RESERVED = ("captions", "index", "source")  # fields that the json of a shard defines
NO_SPLIT, UNKNOWN_SPLIT, OWN_SPLIT, OTHER_SPLIT = range(4)  # kinds of rows; the second is of rows that cannot be read
MOST_SPLITS = 100  # that a message names
HASH_PARTS = 16


@dataclass(frozen=True)
class Pair:
    """One image and its captions.

    Args:
        image: Path of the file.
        captions: Captions that are not blank; may be empty.
        key: Unique in its file, derived from the image's path, without dots (webdataset ends a key at the first dot).
        source: Where it was read, e.g. ``captions.csv:17``.
        extra: Further fields of the annotation.
        problem: Why the row cannot be used, or "".
        listed: The path as the annotation has it, for error messages.
    """

    image: str
    captions: tuple[str, ...]
    key: str
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    listed: str = ""


@dataclass
class Row:
    """One entry of a file. Several rows may be about the same image."""

    image: str
    captions: list[str]
    where: str
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class Rows(Protocol):
    """Rows of an annotation file, which are read again on each iteration."""

    def __iter__(self) -> Iterator[Row]: ...

    def reader(self, indices: np.ndarray) -> Callable[[int], Row]:
        """Return a function that reads the n-th of the rows at ``indices``, which are sorted."""


@dataclass(frozen=True)
class LineRows:
    """Rows of a file with one record per line, of which one is in memory at a time.

    Args:
        parse: Function from a record to its row.
        quoted: Delimiter of a table whose quoted cells may contain line breaks.
        header: Number of lines above the first row.
    """

    path: Path
    parse: Callable[[Record], Row]
    quoted: str | None = None
    header: int = 0

    def _records(self) -> Iterator[Record]:
        return islice(read_records(self.path, self.quoted), self.header, None)

    def __iter__(self) -> Iterator[Row]:
        return map(self.parse, self._records())

    def reader(self, indices: np.ndarray) -> Callable[[int], Row]:
        begins, sizes, lines = (np.empty(len(indices), dtype) for dtype in (np.int64, np.uint32, np.int64))
        found = 0
        for number, record in enumerate(self._records() if len(indices) else ()):
            if found < len(indices) and number == indices[found]:
                begins[found], sizes[found], lines[found] = record.begin, record.end - record.begin, record.line
                found += 1
        file = open_regular(self.path)

        def read(n: int) -> Row:
            begin, end, line = int(begins[n]), int(begins[n]) + int(sizes[n]), int(lines[n])
            text = os.pread(file.fileno(), end - begin, begin).decode().rstrip("\r\n")
            return self.parse(Record(begin, end, line, text))

        return read


@dataclass(frozen=True)
class DocumentRows:
    """Rows of a JSON document, of which one is in memory at a time.

    Args:
        count: Number of rows.
        row: Function that reads a row by its number.
    """

    count: int
    row: Callable[[int], Row]

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(self.count))

    def reader(self, indices: np.ndarray) -> Callable[[int], Row]:
        return lambda n: self.row(int(indices[n]))


class Pairs:
    """Pairs of an annotation file in the order of the file. Rows about the same image are one pair.

    The file is read twice or three times, and again on each iteration. Between the readings about 20 bytes a row are in
    memory.
    """

    def __init__(self, file: Path, rows: Rows, root: Path, split: str | None):
        self._file, self._rows, self._root = file, rows, root
        images, keys, kept = self._scan(split)
        later, first = _repeated(images, kept)  # rows about an image of an earlier row, and that row
        del images
        self._is_first = kept
        self._is_first[later] = False
        self._has_long_key = np.zeros(len(kept), dtype=bool)
        self._has_long_key[_repeated(keys, self._is_first)[0]] = True
        del keys
        self._order = np.argsort(first, kind="stable").astype(first.dtype)
        self._first = first[self._order]  # sorted, as rows are read in this order
        del first
        self._read_later = rows.reader(later)

    def _scan(self, split: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (rows,) 64 bits of a hash of each row's image, and of its short key; and whether it is of the split."""
        images, keys, kinds = array("Q"), array("Q"), bytearray()
        wanted, found = set((split or "").split("+")), set()
        for row in self._rows:
            # a row with a problem is reported independently of others about its image
            images.append(_hash(f"\0{row.where}" if row.problem else image_path(self._root, row.image)))
            keys.append(_hash(short_key(self._name(row))))
            if row.split is None:
                kinds.append(UNKNOWN_SPLIT if row.problem else NO_SPLIT)
            else:
                kinds.append(OWN_SPLIT if row.split in wanted else OTHER_SPLIT)
                if len(found) < MOST_SPLITS:
                    found.add(row.split)
        kind = np.frombuffer(kinds, dtype=np.uint8)
        if split is None or not found and self._file.stem == split:  # a file without splits that is named after one
            kept = np.ones(len(kind), dtype=bool)
        else:
            kept = (kind == OWN_SPLIT) | (kind == UNKNOWN_SPLIT)
            if not (kind == OWN_SPLIT).any():
                there = ", ".join(sorted(found)) or "none"
                raise UserError(f"{self._file} has no rows of split {split!r}; its splits: {there}")
        return np.frombuffer(images, dtype=np.uint64), np.frombuffer(keys, dtype=np.uint64), kept

    def _name(self, row: Row) -> str:
        return row.image or f"{self._file.name}-{row.where}"

    def __len__(self) -> int:
        return int(self._is_first.sum())

    def __iter__(self) -> Iterator[Pair]:
        at = 0  # in the repeated rows, which are sorted by their first row
        for index, row in enumerate(self._rows):
            if not self._is_first[index]:
                continue
            end = at
            while end < len(self._first) and self._first[end] == index:
                end += 1
            others = map(self._read_later, self._order[at:end])
            at = end
            # two images with the same hash, which is improbable, are two pairs
            for n, merged in enumerate(merge([row, *others], self._root)):
                yield self._pair(merged, n > 0 or bool(self._has_long_key[index]))

    def _pair(self, row: Row, has_long_key: bool) -> Pair:
        captions = tuple(c for c in (caption.strip() for caption in row.captions) if c)
        extra = {name: value for name, value in row.extra.items() if name not in RESERVED}
        key = (long_key if has_long_key else short_key)(self._name(row))
        source = f"{self._file.name}:{row.where}"
        return Pair(image_path(self._root, row.image), captions, key, source, extra, row.problem, row.image)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _repeated(hashes: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept rows whose hash an earlier kept row has, sorted, and the first such row of each."""
    parts = hashes.view(np.uint8)[:: hashes.itemsize] % HASH_PARTS  # compared part by part, to need less memory
    later, first = [], []
    dtype = np.min_scalar_type(len(hashes))
    for part in range(HASH_PARTS):
        rows = np.flatnonzero(kept & (parts == part))
        _, index, inverse = np.unique(hashes[rows], return_index=True, return_inverse=True)
        first_row = rows[index[inverse]]
        is_later = first_row != rows
        later.append(rows[is_later].astype(dtype))
        first.append(first_row[is_later].astype(dtype))
    order = np.argsort(np.concatenate(later))
    return np.concatenate(later)[order], np.concatenate(first)[order]


def read_pairs(
    path: str | Path, image_root: str | Path | None = None, format: str | None = None, split: str | None = None
) -> Pairs:
    """Read the pairs of an annotation file.

    Args:
        path: The file, or a folder with one annotation file next to the images (or several, one named after ``split``).
        image_root: Folder that relative image paths start from. None stands for the folder of the annotation file.
        format: One of `READERS`. None detects it from the content.
        split: Keep only this split of the file, or several joined by "+", as Karpathy's "train+restval".

    Raises:
        UserError: naming file, line and the expected content. Whether image files exist is not checked here.
    """
    file = find_file(local_path(path), split)
    if format in ("csv", "tsv") and is_json_lines(file) or format == "jsonl" and _is_table(file):
        raise UserError(f"{file} is not {format}: its content is {sniff(file)}; leave out --format")
    reader = READERS.get(format or sniff(file))
    if reader is None:
        raise UserError(f"there is no format {format!r}; use one of {', '.join(READERS)}")
    return Pairs(file, reader(file), local_path(image_root) if image_root is not None else file.parent, split)


def image_path(root: Path, image: str) -> str:
    """Return the path of an image, in one spelling. URLs stay as they are, so that messages can show them."""
    if not image or "://" in image or "\0" in image:
        return image
    return os.path.normpath(os.path.join(root, image))


def find_file(path: Path, split: str | None) -> Path:
    """Return the annotation file that ``path`` names or contains."""
    if not path.exists():
        raise UserError(
            f"no such file or folder: {path}{relative_to(path)}; give an annotation file, or a folder with one"
        )
    if not path.is_dir():
        return path
    files = sorted(f for extension in ("jsonl", "csv", "tsv", "json") for f in path.glob(f"*.{extension}"))
    named = [f for f in files if f.stem == split] or files
    if len(named) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(f"{path} should hold one .jsonl, .csv, .tsv or .json file, but holds {found}; name the file")
    return named[0]


def sniff(file: Path) -> str:
    """Detect the format by the content. The extension only decides how a line is meant that is not JSON."""
    extension = file.suffix.lower()
    start = first_line(file).lstrip()[:1]
    if is_json_lines(file):
        return "jsonl"
    if _is_table(file) or extension not in (".json", ".jsonl", ".ndjson") and start not in ("{", "["):
        if not start and extension not in (".csv", ".tsv", ".txt"):
            raise UserError(
                f"{file}: the extension does not tell the format; say --format and one of {', '.join(READERS)}"
            )
        return "csv" if extension == ".csv" else "tsv"
    if start == "[":
        return "albef"
    if extension in (".jsonl", ".ndjson"):
        return "jsonl"
    content = read_document(file)
    keys = content if isinstance(content, dict) else ()
    if "annotations" in keys or "images" in keys:
        return "coco" if "annotations" in keys else "karpathy"
    if any(name in keys for name in IMAGE_NAMES) and len(first_lines(file, 2)) == 1:
        return "jsonl"
    raise UserError(f"{file} is none of the known json forms; expected ALBEF's list, COCO's or Karpathy's object")


def merge(rows: Iterable[Row], root: Path) -> list[Row]:
    """Join rows about the same image, in the order of first appearance. Further fields are those of the first row.

    Two spellings of a path are the same image.
    """
    merged: dict[str, Row] = {}
    for row in rows:
        # a row with a problem is reported by itself
        path = f"\0{row.where}" if row.problem else image_path(root, row.image)
        if path in merged:
            merged[path].captions += row.captions
        else:
            merged[path] = row
    return list(merged.values())


def row_of(record: Any, where: str) -> Row:
    """Read the row of an object with an image and captions, under any of the usual names.

    A row that cannot be used has a ``problem``.
    """
    if not isinstance(record, dict):
        problem = f"expected an object with image and captions, found {json.dumps(record)[:40]}"
        return Row("", [], where, problem=problem)
    split = None if record.get("split") is None else str(record["split"])
    try:
        image, image_name = _image_of(record)
    except BadSample as e:
        return Row("", [], where, split, problem=str(e))
    try:
        captions, caption_name = _captions_of(record)
    except BadSample as e:
        return Row(image, [], where, split, problem=str(e))
    extra = {name: value for name, value in record.items() if name not in (image_name, caption_name, "split")}
    return Row(image, captions, where, split, extra)


def _image_of(record: dict) -> tuple[str, str]:
    """Return the path of the image, and the field that contains it."""
    name = next((name for name in IMAGE_NAMES if name in record), None)
    if name is None:
        raise BadSample(f"no image; expected one of {', '.join(IMAGE_NAMES)}, found {', '.join(map(repr, record))}")
    if not isinstance(record[name], str) or not record[name].strip():
        raise BadSample(f"{name!r} should be a path, found {json.dumps(record[name])[:40]}")
    return record[name], name


def _captions_of(record: dict) -> tuple[list[str], str]:
    """Return the captions, and the field that contains them. Missing values (null, "") are left out."""
    names = [name for name in CAPTION_NAMES if name in record]
    if not names:
        raise BadSample(
            f"no captions; expected one of {', '.join(CAPTION_NAMES)}, found {', '.join(map(repr, record))}"
        )
    captions: list[str] = []
    # captions and caption mean the same, so an empty one does not hide the other
    for name in [name for name in names if name in ("captions", "caption")] or names[:1]:
        value = record[name]
        if value is not None and not isinstance(value, (str, list)):
            raise BadSample(f"{name!r} should be a text or a list of texts, found {json.dumps(value)[:40]}")
        captions = [text for item in (value if isinstance(value, list) else [value]) if (text := as_text(item, name))]
        if captions:
            return captions, name
    return captions, names[0]


def read_jsonl(file: Path) -> Rows:
    """Read one object per line: image; captions, caption or text; optionally split; further fields become extra."""
    return LineRows(file, partial(_parse_line, parse_object))


def _parse_line(read: Callable[[str], dict], record: Record) -> Row:
    """Return the row of a line, with a problem if ``read`` raises BadSample."""
    try:
        return row_of(read(record.text), str(record.line))
    except BadSample as e:
        return Row("", [], str(record.line), problem=str(e))


def read_albef(file: Path) -> Rows:
    """Read ALBEF's pre-training and retrieval lists: ``[{"image": path, "caption": text or list, "image_id": ...}]``."""
    records = read_document(file)
    if not isinstance(records, Records):
        raise UserError(f"{file}: expected a list of objects with image and caption")
    return DocumentRows(len(records), lambda n: row_of(records[n], f"[{n}]"))


def read_karpathy(file: Path) -> Rows:
    """Read Karpathy's splits: ``images[]`` of filepath, filename, sentences[].raw, split, cocoid."""
    (images,) = _lists_of(file, ("images",), "Karpathy's images[] with filename and sentences[].raw")
    return DocumentRows(len(images), lambda n: _karpathy_row(images[n], f"images[{n}]"))


def _karpathy_row(image: Any, where: str) -> Row:
    try:
        name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        captions = [sentence["raw"] for sentence in image["sentences"]]
    except (KeyError, TypeError, AttributeError) as e:
        return Row("", [], where, problem=f"expected Karpathy's filename and sentences[].raw; {_lacks(e)}")
    extra = {k: v for k, v in image.items() if k not in ("filepath", "filename", "sentences", "sentids")}
    return row_of({"image": name, "captions": captions, **extra}, where)


def read_coco(file: Path) -> Rows:
    """Read COCO's captions: ``images[]`` of id and file_name, ``annotations[]`` of image_id and caption."""
    expected = "COCO's images[] with id and file_name, annotations[] with image_id and caption"
    rows = CocoRows(*_lists_of(file, ("images", "annotations"), expected))
    return DocumentRows(len(rows), rows.row)


class CocoRows:
    """Rows of COCO's captions: a row for each image with an id, then the images and annotations with a problem.

    Between the rows about 30 bytes an annotation are in memory.
    """

    def __init__(self, images: Records, annotations: Records):
        self.images, self.annotations = images, annotations
        own, has_id = _hashes(images, lambda image: image["id"])
        of, is_complete = _hashes(annotations, lambda annotation: (annotation["image_id"], annotation["caption"])[0])
        is_complete &= np.isin(of, own[has_id])
        self.named, self.unnamed, self.lost = map(np.flatnonzero, (has_id, ~has_id, ~is_complete))
        self.ids = own[has_id]
        complete = np.flatnonzero(is_complete)
        order = np.argsort(of[complete], kind="stable")
        # annotations by the hash of their image's id
        self.by_image = complete[order].astype(np.min_scalar_type(len(of)))
        self.hashes = of[complete][order]

    def __len__(self) -> int:
        return len(self.named) + len(self.unnamed) + len(self.lost)

    def row(self, n: int) -> Row:
        if n < len(self.named):
            return self._named(n)
        n -= len(self.named)
        return self._unnamed(int(self.unnamed[n])) if n < len(self.unnamed) else self._lost(n - len(self.unnamed))

    def _named(self, n: int) -> Row:
        number = int(self.named[n])
        image = self.images[number]
        begin, end = (np.searchsorted(self.hashes, self.ids[n], side) for side in ("left", "right"))
        found = (self.annotations[int(annotation)] for annotation in self.by_image[begin:end])
        # -1 and -2 have the same hash
        captions = [annotation["caption"] for annotation in found if annotation["image_id"] == image["id"]]
        name = {"image": image["file_name"]} if "file_name" in image else {}
        return row_of({**name, "captions": captions, "image_id": image["id"]}, f"images[{number}]")

    def _unnamed(self, number: int) -> Row:
        try:
            hash(self.images[number]["id"])
        except (KeyError, TypeError) as e:
            return Row("", [], f"images[{number}]", problem=f"expected COCO's id; {_lacks(e)}")
        raise AssertionError("it has an id")

    def _lost(self, n: int) -> Row:
        number = int(self.lost[n])
        annotation = self.annotations[number]
        try:
            image_id, _ = annotation["image_id"], annotation["caption"]
            hash(image_id)
            problem = f"no image has the id {image_id}"
        except (KeyError, TypeError) as e:
            problem = f"expected COCO's image_id and caption; {_lacks(e)}"
        return Row("", [], f"annotations[{number}]", problem=problem)


def _hashes(records: Records, of: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return (records,) hashes of a value of each record, int64, and whether the record has it."""
    hashes, has = np.zeros(len(records), dtype=np.int64), np.ones(len(records), dtype=bool)
    for n, record in enumerate(records):
        try:
            hashes[n] = hash(of(record))
        except (KeyError, TypeError):
            has[n] = False
    return hashes, has


def _lists_of(file: Path, names: tuple[str, ...], expected: str) -> list[Records]:
    content = read_document(file)
    lists = [content.get(name) if isinstance(content, dict) else None for name in names]
    for name, found in zip(names, lists):
        if found is None:
            raise UserError(f"{file}: expected {expected}; there is no list {name!r}")
    return lists


def _lacks(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else f"its structure differs ({error})"


def read_table(file: Path, delimiter: str) -> Rows:
    """Read a table with a header that names the columns, or one of an image and a caption in either order without it.

    Args:
        delimiter: The delimiter to try first.
    """
    form = TableForm.detect(
        file,
        _columns_of,
        f"a header with an image column ({', '.join(IMAGE_NAMES)}) and a caption column ({', '.join(CAPTION_NAMES)}), or "
        "two columns of which one is an image file",
        delimiter,
    )

    def parse(record: Record) -> Row:
        row = _parse_line(form.parse, record)
        row.image = re.sub(CAPTION_NUMBER, "", row.image)
        row.split = row.split or None
        return row

    return LineRows(file, parse, form.quoted, int(form.is_header))


def _is_table(file: Path) -> bool:
    """Return whether the first line of a file is that of a table with images and captions."""
    first = first_line(file)
    return any((cells := split_cells(first, delimiter)) and _columns_of(cells) for delimiter in DELIMITERS)


def _columns_of(cells: list[str]) -> Columns | None:
    """Recognise the columns of a table by its first line."""
    names = [cell.lower() for cell in cells]
    if any(n in IMAGE_NAMES for n in names) and any(n in CAPTION_NAMES for n in names):
        return Columns(names, True)
    is_image = [bool(IMAGE_FILE.search(re.sub(CAPTION_NUMBER, "", cell))) for cell in cells]
    if len(cells) == 2 and sum(is_image) == 1:
        return Columns(["image" if i else "caption" for i in is_image], False)
    return None


READERS = {
    "csv": partial(read_table, delimiter=","),
    "tsv": partial(read_table, delimiter="\t"),
    "jsonl": read_jsonl,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "albef": read_albef,
}
