"""Where shards are: local folders, globs, patterns, and through fsspec any URL, of which copies are kept.

A shard is named by a local path or by a full URL; a file system is opened anew wherever it is needed, as those of a
parent process do not survive a fork.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand
from fsspec.implementations.local import LocalFileSystem

from vlp.errors import UserError


def cache_folder() -> Path:
    """Where remote shards, and indexes of shards in read-only folders, are kept: $VLP_CACHE, else ~/.cache/vlp."""
    return Path(os.environ.get("VLP_CACHE", Path.home() / ".cache" / "vlp"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go of the lock of a process that died."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Listed:
    """What a manifest.json says of a shard: samples, bytes, SHA-256."""

    samples: int
    size: int
    sha256: str


def read_manifest(folder: str) -> dict[str, Listed]:
    """Shard -> what the manifest.json beside it says; {} where there is none that `vlp data pack` wrote."""
    try:
        fs, path = fsspec.core.url_to_fs(f"{folder}/manifest.json")
        lines = json.loads(fs.cat_file(path))["shards"]
        return {
            f"{folder}/{os.path.basename(s['shard'])}": Listed(int(s["samples"]), int(s["size"]), s["sha256"])
            for s in lines
        }
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return {}
    except Exception as e:  # every file system has errors of its own
        raise UserError(f"cannot read {folder}/manifest.json: {reason_of(e)}") from None


def list_shards(location: str) -> list[str]:
    """The shards of a folder, a tar, a glob or a ``{000..009}`` pattern, local or at any URL that fsspec opens, sorted.

    Those that a folder's manifest.json names are listed even where they are not there (any more).
    """
    try:
        # what exists is meant by its name, brackets and braces included
        patterns = [location] if os.path.exists(location) else list(braceexpand(location))
        found = {shard for pattern in patterns for shard in _matches(pattern)}
    except UserError:
        raise
    except UnbalancedBracesError:
        raise UserError(f"no shards at {location}: it does not exist; make shards with `vlp data pack`") from None
    except Exception as e:  # every file system has errors of its own; an unknown one is a ValueError or ImportError
        raise UserError(f"cannot list the shards at {location}: {reason_of(e)}") from None
    if not found:
        raise UserError(f"no shards at {location}: it holds no .tar file; make shards with `vlp data pack`")
    return sorted(found)


def _matches(pattern: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(pattern)
    if isinstance(fs, LocalFileSystem):
        if os.path.isdir(path):
            return _folder(fs, path)
        if os.path.exists(path):
            return [path]
        found = fs.glob(path) if any(c in path for c in "*?[") else []
        if not found:
            raise UserError(f"no shards at {pattern}: it does not exist; make shards with `vlp data pack`")
        return found
    if any(c in path for c in "*["):
        return [fs.unstrip_protocol(p) for p in fs.glob(path)]
    # asking for each of a thousand shards would take minutes: one that is not there shows when it is fetched
    return [fs.unstrip_protocol(path)] if ".tar" in os.path.basename(path) else _folder(fs, path)


def _folder(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    path = path.rstrip("/")
    local = isinstance(fs, LocalFileSystem)
    names = read_manifest(path if local else fs.unstrip_protocol(path))
    try:
        found = [p for p in fs.ls(path, detail=False) if p.endswith(".tar")]
    except FileNotFoundError:  # a server without listings
        if not names:
            raise UserError(f"no shards at {path}: it does not exist; make shards with `vlp data pack`") from None
        found = []
    return [*names, *(found if local else map(fs.unstrip_protocol, found))]


def fetch(shard: str) -> Path:
    """The file itself where it is local, else a copy in the cache folder, fetched once for all processes."""
    if "://" not in shard:
        return Path(shard)
    name = os.path.basename(shard.partition("?")[0])
    local = cache_folder() / "shards" / hashlib.sha256(shard.encode()).hexdigest()[:16] / name
    if local.exists():
        return local
    try:
        with locked(local.with_name(name + ".lock")):
            if not local.exists():
                fs, path = fsspec.core.url_to_fs(shard)
                temporary = local.with_name(name + ".tmp")
                fs.get_file(path, str(temporary))
                os.replace(temporary, local)
    except Exception as e:  # every file system has errors of its own
        raise UserError(f"cannot fetch {shard} to {local.parent}: {reason_of(e)}") from None
    return local


def reason_of(error: Exception) -> str:
    """What an exception says, without the file's name, which the message around it has."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
