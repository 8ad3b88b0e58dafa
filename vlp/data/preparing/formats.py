"""Image-caption pairs from the files that people have: CSV, TSV, JSONL, Karpathy's, COCO's and ALBEF's json."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlp.data.reading.shards import IMAGE_FILE, make_key
from vlp.errors import UserError

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
RESERVED = ("captions", "index", "source")  # what the shards' json keeps of its own

csv.field_size_limit(10_000_000)  # characters; the library's 131,072 are too few for some alt-texts


@dataclass(frozen=True)
class Pair:
    """One picture and its captions.

    Args:
        image: path of the file.
        captions: at least the empty tuple; blank ones are left out.
        key: unique in its file, derived from the image's path, without dots (webdataset ends a key at the first dot).
        source: where it was read, e.g. ``captions.csv:17``.
        extra: whatever else the file says of it.
    """

    image: str
    captions: tuple[str, ...]
    key: str
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """What a file says in one place: several rows may be of the same image."""

    image: str
    captions: list[str]
    where: str
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_pairs(
    path: str | Path, image_root: str | Path | None = None, format: str | None = None, split: str | None = None
) -> Iterator[Pair]:
    """The pairs of an annotation file in the order of the file, rows of the same image merged into one pair.

    Args:
        path: the file, or a folder with one annotation file beside the images (or several, one named after ``split``).
        image_root: what image paths are relative to; None = the folder of the annotation file.
        format: one of `READERS`; None = by extension and content.
        split: keep only this one of the file's splits, or several joined by "+", as Karpathy's "train+restval".

    Raises:
        UserError: naming file, line and what was expected. That the image files exist is not checked here.
    """
    file = find_file(Path(path), split)
    reader = READERS.get(format or sniff(file))
    if reader is None:
        raise UserError(f"there is no format {format!r}; use one of {', '.join(READERS)}")
    root = Path(image_root) if image_root is not None else file.parent
    keys: set[str] = set()
    for row in merge(select(reader(file), file, split)):
        captions = tuple(c for c in (caption.strip() for caption in row.captions) if c)
        extra = {name: value for name, value in row.extra.items() if name not in RESERVED}
        key = make_key(row.image, keys)
        yield Pair(str(root / row.image), captions, key, f"{file.name}:{row.where}", extra)


def find_file(path: Path, split: str | None) -> Path:
    if not path.exists():
        raise UserError(f"no such file or folder: {path}; give an annotation file, or a folder with one")
    if path.is_file():
        return path
    files = sorted(f for extension in ("jsonl", "csv", "tsv", "json") for f in path.glob(f"*.{extension}"))
    named = [f for f in files if f.stem == split] or files
    if len(named) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(f"{path} should hold one .jsonl, .csv, .tsv or .json file, but holds {found}; name the file")
    return named[0]


def sniff(file: Path) -> str:
    """The format by the extension; that of a .json by its content."""
    by_extension = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    if file.suffix in by_extension:
        return by_extension[file.suffix]
    if file.suffix == ".json":
        content = read_json(file)
        if isinstance(content, list):
            return "albef"
        keys = content if isinstance(content, dict) else ()
        if "annotations" in keys or "images" in keys:
            return "coco" if "annotations" in keys else "karpathy"
        raise UserError(f"{file} is none of the known json forms; expected ALBEF's list, COCO's or Karpathy's object")
    raise UserError(f"{file}: the extension does not tell the format; say --format and one of {', '.join(READERS)}")


def select(rows: Iterator[Row], file: Path, split: str | None) -> Iterator[Row]:
    if split is None or file.stem == split:  # a file that is named after the split is that split
        yield from rows
        return
    wanted, found = split.split("+"), set()
    for row in rows:
        found.add(row.split)
        if row.split in wanted:
            yield row
    if not found.intersection(wanted):
        there = ", ".join(sorted(str(s) for s in found if s is not None)) or "none"
        raise UserError(f"{file} has no rows of split {split!r}; its splits: {there}")


def merge(rows: Iterable[Row]) -> list[Row]:
    """One row an image, in the order of first appearance, with all captions; the rest is what the first one says."""
    merged: dict[str, Row] = {}
    for row in rows:
        if row.image in merged:
            merged[row.image].captions += row.captions
        else:
            merged[row.image] = row
    return list(merged.values())


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line} is not UTF-8; convert the file, e.g. with iconv -f latin1 -t utf-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None


def read_json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno} is not JSON ({error.msg}); is the file complete?") from None


def row_of(record: Any, file: Path, where: str) -> Row:
    """The row that an object with an image and captions states, under any of the usual names."""
    if not isinstance(record, dict):
        raise UserError(f"{file}:{where}: expected an object with image and captions, found {str(record)[:40]!r}")
    image = next((name for name in IMAGE_NAMES if name in record), None)
    text = next((name for name in CAPTION_NAMES if name in record), None)
    if image is None or text is None:
        kind, names = ("image", IMAGE_NAMES) if image is None else ("captions", CAPTION_NAMES)
        raise UserError(f"{file}:{where}: no {kind}; expected one of {', '.join(names)}, found {', '.join(record)}")
    captions = [record[text]] if isinstance(record[text], str) else record[text]
    if not isinstance(record[image], str) or not record[image]:
        raise UserError(f"{file}:{where}: {image!r} should be a path, found {str(record[image])[:40]!r}")
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise UserError(f"{file}:{where}: {text!r} should be a text or a list of texts, found {str(captions)[:40]!r}")
    extra = {name: value for name, value in record.items() if name not in (image, text, "split")}
    return Row(record[image], list(captions), where, record.get("split"), extra)


def read_jsonl(file: Path) -> Iterator[Row]:
    """One object a line: image; captions, caption or text; perhaps split; anything else goes to extra."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number} is not a JSON object ({error.msg})") from None
            yield row_of(record, file, str(number))


def read_albef(file: Path) -> Iterator[Row]:
    """ALBEF's pre-training and retrieval lists: ``[{"image": path, "caption": text or list, "image_id": ...}]``."""
    content = read_json(file)
    if not isinstance(content, list):
        raise UserError(f"{file}: expected a list of objects with image and caption")
    for number, record in enumerate(content):
        yield row_of(record, file, f"[{number}]")


def read_karpathy(file: Path) -> Iterator[Row]:
    """Karpathy's splits: ``images[]`` of filepath, filename, sentences[].raw, split, cocoid."""
    content = read_json(file)
    try:
        for number, image in enumerate(content["images"]):
            name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
            captions = [sentence["raw"] for sentence in image["sentences"]]
            extra = {k: v for k, v in image.items() if k not in ("filepath", "filename", "sentences", "sentids")}
            yield row_of({"image": name, "captions": captions, **extra}, file, f"images[{number}]")
    except (KeyError, TypeError, AttributeError) as error:
        expected = "Karpathy's images[] with filename and sentences[].raw"
        raise UserError(f"{file}: expected {expected}; {_lacks(error)}") from None


def read_coco(file: Path) -> Iterator[Row]:
    """COCO's captions: ``images[]`` of id and file_name, ``annotations[]`` of image_id and caption."""
    content = read_json(file)
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] not in captions:
                raise UserError(f"{file}: an annotation has image_id {annotation['image_id']}, which no image has")
            captions[annotation["image_id"]].append(annotation["caption"])
        for number, image in enumerate(content["images"]):
            record = {"image": image["file_name"], "captions": captions[image["id"]], "image_id": image["id"]}
            yield row_of(record, file, f"images[{number}]")
    except (KeyError, TypeError) as error:
        expected = "COCO's images[] with id and file_name, annotations[] with image_id and caption"
        raise UserError(f"{file}: expected {expected}; {_lacks(error)}") from None


def _lacks(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else f"its structure is another ({error})"


def read_csv(file: Path) -> Iterator[Row]:
    """Separated by commas (or ``;`` or ``|`` if the first line has no comma), quotes as spreadsheets write them."""
    text = read_text(file)
    first = text.partition("\n")[0]
    delimiter = next((d for d in ",;|" if d in first), ",")
    return read_table(
        file, _csv_lines(file, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    )


def _csv_lines(file: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num} is not a row of a table ({error})") from None


def read_tsv(file: Path) -> Iterator[Row]:
    """Separated by tabs; a quotation mark inside a caption is only that."""
    lines = enumerate(read_text(file).split("\n"), 1)
    return read_table(file, ((number, [_unquote(cell) for cell in line.split("\t")]) for number, line in lines))


def _unquote(cell: str) -> str:
    cell = cell.strip()
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if quoted else cell


def read_table(file: Path, lines: Iterable[tuple[int, list[str]]]) -> Iterator[Row]:
    """Rows under a header that names the columns, or without one, of an image and a caption in either order."""
    header: list[str] | None = None
    for number, cells in lines:
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if header is None:
            header, is_data = _header(cells, file, number)
            if not is_data:
                continue
        if len(cells) != len(header):
            raise UserError(f"{file}:{number}: {len(cells)} columns; expected {len(header)}: {', '.join(header)}")
        row = row_of(dict(zip(header, cells)), file, str(number))
        row.image = re.sub(CAPTION_NUMBER, "", row.image)
        yield row


def _header(cells: list[str], file: Path, number: int) -> tuple[list[str], bool]:
    """(names of the columns, whether the line is itself a row) from the first line."""
    names = [cell.lower() for cell in cells]
    if any(n in IMAGE_NAMES for n in names) and any(n in CAPTION_NAMES for n in names):
        return names, False
    is_image = [bool(IMAGE_FILE.search(re.sub(CAPTION_NUMBER, "", cell))) for cell in cells]
    if len(cells) == 2 and sum(is_image) == 1:
        return ["image" if i else "caption" for i in is_image], True
    raise UserError(
        f"{file}:{number}: expected a header with an image column ({', '.join(IMAGE_NAMES)}) and a caption column "
        f"({', '.join(CAPTION_NAMES)}), or two columns of which one is an image file; found {', '.join(cells)[:80]!r}"
    )


READERS = {
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "albef": read_albef,
}
