"""Identity of evaluated data: equal for the same data at any location, different for different data with one name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from vlp.data.reading.annotated import AnnotatedReader
from vlp.data.reading.locations import is_remote
from vlp.data.reading.shards import ShardReader
from vlp.files import local_path, open_regular

# Shards, image files, or annotations that name their images.
Images = str | list[Path] | AnnotatedReader

HEAD_BYTES = 4096  # of an image file, which with its size and name tell it from others without reading it whole
MAX_FILES = 20_000  # of a folder that a task does not list


def data_id(images: Images | None, location: str, split: str = "") -> str:
    """Return the identity of evaluated data, 64 hexadecimal digits.

    Args:
        images: `Task.evaluated_images`. Shards are identified by the checksums of their members, annotations by the content
            of their file, and image files by name, size and first bytes.
        location: `Result.data`, which is read where the task does not list its images.
        split: `Result.split`.
    """
    digest = hashlib.sha256(f"{split}\n".encode())
    for part in _parts(images, location):
        digest.update(part.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _parts(images: Images | None, location: str) -> Iterator[str]:
    if isinstance(images, AnnotatedReader):
        yield f"{images.lines.sha256} {images.source.split}"
    elif isinstance(images, str):
        reader = ShardReader(images)
        samples = (sample for shard in range(len(reader.shards)) for sample in reader.index(shard).members)
        # sorted, so that the division into shards does not matter
        yield from sorted(str(sorted((e, size, crc) for e, (_, size, crc) in sample.items())) for sample in samples)
    else:
        yield from _files(images, location)


def _files(images: list[Path] | None, location: str) -> Iterator[str]:
    path = Path(location) if is_remote(location) else local_path(location)
    labels = path / "labels.jsonl"
    if images:
        files = [*images, *([labels] if labels.is_file() else [])]
    elif path.is_dir():
        files = sorted(islice(filter(Path.is_file, path.rglob("*")), MAX_FILES))
    else:
        files = [path] if path.is_file() else []
    if not files:  # nothing can be read, e.g. at a URL
        yield location if is_remote(location) else os.path.abspath(path)
    for file in files:
        yield f"{file.parent.name}/{file.name} {_head(file, whole=file == labels)}"


def _head(file: Path, whole: bool) -> str:
    """Return a hash of the size and the beginning of a file."""
    try:
        with open_regular(file) as opened:
            content = opened.read(None if whole else HEAD_BYTES)
            return f"{os.fstat(opened.fileno()).st_size} {hashlib.sha256(content).hexdigest()}"
    except OSError:  # unreadable images are counted as bad by the task
        return "unreadable"
