"""Locations of shards: local folders, globs, brace patterns, several joined by ``::``, and URLs, which are copied once.

A shard is named by a local path or by a full URL. A file system is opened wherever it is needed, because those of a parent
process do not survive a fork.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand
from fsspec.implementations.local import LocalFileSystem

from vlp.errors import UserError
from vlp.files import is_possible_path, local_path, read_regular, relative_to

# Other protocols of fsspec chain, decompress, or run programs, which a name in somebody's experiment.json must not do.
SCHEMES = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "hdfs", "memory")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
BRACE_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
MAX_SHARDS = 1_000_000  # that one location may name
MANIFEST_BYTES = 1 << 28
TRIES = 6  # of an access to a remote file that fails
TRIES_OF_CONTENT = 3  # of a download that has other bytes than expected
FIRST_WAIT = 0.5  # seconds before the second try; each further wait is twice as long
PERMANENT = (FileNotFoundError, NotADirectoryError, PermissionError, NotImplementedError, ImportError, UserError)
T = TypeVar("T")
LEAST_SAMPLE_BYTES = 512  # of a tar: the header of a link
ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".parquet", ".arrow")
SHARD_NAME = re.compile(r"[^/\0\ud800-\udfff]+\.tar")


def cache_folder() -> Path:
    """Return the folder of remote shards' copies and read-only shards' indexes: $VLP_CACHE, or ~/.cache/vlp."""
    return local_path(os.environ.get("VLP_CACHE") or "~/.cache/vlp")


class OtherContent(Exception):
    """Downloaded bytes that are not those of the file."""


def retry(action: Callable[[], T]) -> T:
    """Call ``action`` until it succeeds, with growing pauses.

    Raises:
        Exception: that of the last try. A file that is missing or forbidden is not tried again.
    """
    for attempt in range(1, TRIES):
        try:
            return action()
        except PERMANENT:
            raise
        except Exception as e:  # every file system has its own errors
            if isinstance(e, OtherContent) and attempt == TRIES_OF_CONTENT:
                raise
        # processes that failed at the same time try again at different times
        time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    return action()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time run the body. The kernel releases the lock of a process that died."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_remote(location: str) -> bool:
    """Return whether a location is on another machine, or in memory."""
    scheme = SCHEME.match(location)
    return scheme is not None and scheme[1].lower() != "file"


def check_scheme(location: str) -> str:
    """Return the location, a ``file://`` URL as a path.

    Raises:
        UserError: if the location is a URL whose scheme is not in `SCHEMES`.
    """
    scheme = SCHEME.match(location)
    if scheme and scheme[1].lower() not in SCHEMES:
        raise UserError(f"cannot list {location}: the scheme {scheme[1]}:// is not one of {', '.join(SCHEMES)}")
    return location if scheme is None or is_remote(location) else location[scheme.end() :]


@dataclass(frozen=True)
class Listed:
    """Entry of a shard in manifest.json: samples, bytes of the tar, and its SHA-256. A hint, verified when it is used."""

    samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of a manifest.json.

    Args:
        shards: Shard to its entry; empty if `vlp data pack` wrote no manifest there.
        problem: Why the file is ignored, or "".
    """

    shards: dict[str, Listed] = field(default_factory=dict)
    problem: str = ""


def read_manifest(folder: str) -> Manifest:
    """Read the manifest.json of a folder. A damaged one is ignored with a reason, another program's without.

    Raises:
        UserError: if the file system cannot be reached.
    """
    try:
        if is_remote(folder):
            fs, path = fsspec.core.url_to_fs(f"{folder}/manifest.json")
            data = retry(lambda: fs.cat_file(path))
        else:
            data = read_regular(f"{folder or '.'}/manifest.json", MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return Manifest()
    except OSError as e:
        if is_remote(folder) or e.errno not in (errno.EINVAL, errno.EFBIG, errno.ENXIO):
            raise UserError(f"cannot read {folder}/manifest.json: {reason_of(e)}") from None
        return Manifest(problem=reason_of(e))
    except Exception as e:  # every file system has its own errors
        raise UserError(f"cannot read {folder}/manifest.json: {reason_of(e)}") from None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return Manifest(problem="it is not JSON")
    if not isinstance(content, dict) or content.get("format") != "webdataset":
        return Manifest()
    lines = content.get("shards")
    if not isinstance(lines, list) or not all(map(_is_entry, lines)):
        return Manifest(problem="its entries are not those of shards")
    found = {f"{folder}/{line['shard']}": Listed(line["samples"], line["size"], line["sha256"]) for line in lines}
    return Manifest(found) if len(found) == len(lines) else Manifest(problem="it names a shard twice")


def _is_entry(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("shard"), str)
        and SHARD_NAME.fullmatch(line["shard"]) is not None
        and all(type(line.get(name)) is int and line[name] >= 0 for name in ("samples", "size"))
        and line["samples"] * LEAST_SAMPLE_BYTES <= line["size"]
        and isinstance(line.get("sha256"), str)
        and re.fullmatch(r"[0-9a-f]{64}", line["sha256"]) is not None
    )


@dataclass(frozen=True)
class Listing:
    """Result of `list_shards`.

    Args:
        shards: Local paths or URLs, sorted.
        unread: Local files next to them that may contain samples and cannot be read, such as compressed archives.
        manifests: Folder to its manifest.
    """

    shards: list[str]
    unread: list[str]
    manifests: dict[str, Manifest]


def list_shards(location: str) -> Listing:
    """List the shards at a location.

    Shards that a folder's manifest.json names are listed even if they are missing.

    Args:
        location: A folder, a tar, a glob or a ``{000..009}`` pattern, local (``~`` is the home folder) or at a URL with one
            of `SCHEMES`. Several are joined by ``::``.

    Raises:
        UserError: if there is no shard, or the location cannot be listed.
    """
    found: set[str] = set()
    unread: list[str] = []
    manifests = _Manifests()
    try:
        for pattern in _patterns(location):
            shards, others = _matches(check_scheme(pattern), manifests)
            found.update(shards)
            unread += others
    except UserError:
        raise
    except UnbalancedBracesError:
        raise _missing(location) from None
    except Exception as e:  # every file system has its own errors; an unavailable one raises ValueError or ImportError
        raise UserError(f"cannot list the shards at {location}: {reason_of(e)}") from None
    if not found:
        content = f"only {_some(unread)}, which must be unpacked" if unread else "no .tar file"
        raise UserError(f"no shards at {location}: it contains {content}; make shards with `vlp data pack`")
    folders = {os.path.dirname(shard) for shard in found}
    return Listing(sorted(found), sorted(unread), {folder: manifests[folder] for folder in sorted(folders)})


class _Manifests(dict[str, Manifest]):
    """Manifests by folder, each read once."""

    def __missing__(self, folder: str) -> Manifest:
        return self.setdefault(folder, read_manifest(folder))


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(os.path.basename(name) for name in names[:count]) + more


def _missing(location: str) -> UserError:
    where = "" if is_remote(location) else relative_to(local_path(location))
    return UserError(f"no shards at {location}: it does not exist{where}; make shards with `vlp data pack`")


def _patterns(location: str) -> list[str]:
    """Split a location at ``::`` and expand its braces, unless a file has exactly this name."""
    if location.startswith("pipe:"):
        raise UserError(
            f"no shards at {location[:100]!r}: a command cannot be indexed; train from it with a WebDatasetStream, and evaluate "
            "on shards"
        )
    if not is_possible_path(location):
        raise UserError(f"no shards at {location!r}: a path cannot contain NUL or half of a surrogate pair")
    # before any part becomes a path, which would make one slash of the two of a URL
    if "::" in location and not os.path.exists(local_path(location)):
        parts = location.split("::")
        if not all(parts):
            raise UserError(f"no shards at {location}: a location next to :: is empty")
        return [pattern for part in parts for pattern in _patterns(part)]
    if not is_remote(location):
        location = str(local_path(check_scheme(location)))
    if os.path.exists(location):
        return [location]
    return expand_braces(location)


def expand_braces(pattern: str, escape: bool = True) -> list[str]:
    """Expand a brace pattern such as ``{000..009}``.

    Args:
        escape: Whether a backslash escapes a brace.

    Raises:
        UnbalancedBracesError: if a brace has no counterpart.
        UserError: if it names more than `MAX_SHARDS`.
    """
    # checked beforehand, as the expansion of a range is in memory at once
    counts = [abs(int(end[:20]) - int(begin[:20])) + 1 for begin, end in BRACE_RANGE.findall(pattern)]
    expanded = [] if math.prod(counts) > MAX_SHARDS else list(islice(braceexpand(pattern, escape), MAX_SHARDS + 1))
    if not 0 < len(expanded) <= MAX_SHARDS:
        raise UserError(f"no shards at {pattern}: it names more than {MAX_SHARDS:,}")
    return expanded


def _matches(pattern: str, manifests: _Manifests) -> tuple[list[str], list[str]]:
    """Return the shards and the unread files that one pattern matches."""
    if not is_remote(pattern):
        path = os.path.abspath(pattern)
        if os.path.isdir(path):
            return _folder(LocalFileSystem(), path, manifests)
        if os.path.exists(path):
            return [path], []
        found = LocalFileSystem().glob(path) if any(c in path for c in "*?[") else []
        if not found:
            raise _missing(pattern)
        folders = [_folder(LocalFileSystem(), p, manifests) for p in found if os.path.isdir(p)]
        shards, unread = _sort([p for p in found if not os.path.isdir(p)])
        return sum((s for s, _ in folders), shards), sum((u for _, u in folders), unread)
    fs, path = fsspec.core.url_to_fs(pattern)
    if any(c in path for c in "*["):
        return [fs.unstrip_protocol(p) for p in retry(lambda: fs.glob(path))], []
    # whether each of a thousand shards exists would take minutes to ask: a missing one shows when it is fetched
    if ".tar" in os.path.basename(path):
        return [fs.unstrip_protocol(path)], []
    return _folder(fs, path, manifests)


def _folder(fs: fsspec.AbstractFileSystem, path: str, manifests: _Manifests) -> tuple[list[str], list[str]]:
    path = path.rstrip("/") or "/"
    local = isinstance(fs, LocalFileSystem)
    listed = list(manifests[path if local else fs.unstrip_protocol(path)].shards)
    try:
        shards, unread = _sort(retry(lambda: fs.ls(path, detail=False)))
    except FileNotFoundError:  # a server without listings
        if not listed:
            raise _missing(path) from None
        return listed, []
    if local:
        return [*listed, *shards], unread
    return [*listed, *map(fs.unstrip_protocol, shards)], []


def _sort(files: list[str]) -> tuple[list[str], list[str]]:
    """Divide files into shards and other files that may contain samples. Hidden files are neither."""
    visible = [file for file in files if not os.path.basename(file.rstrip("/")).startswith(".")]
    shards = [file for file in visible if file.lower().endswith(".tar")]
    return shards, [file for file in visible if file.lower().endswith(ARCHIVES)]


def reason_of(error: Exception) -> str:
    """Return the text of an exception without the file's name, which the message around it contains."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
