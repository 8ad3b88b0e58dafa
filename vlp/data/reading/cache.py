"""Copies of remote shards on the local disk, shared by the processes of a machine.

The folder ``$VLP_CACHE/shards`` has one folder for each shard, with the shard and its index, and lock files that are never
removed. A process that reads a shard holds a shared lock on the shard. One that downloads or removes it holds an exclusive
lock on its lock file. With ``$VLP_CACHE_BYTES`` the least recently opened shards that nobody has locked are removed before a
download.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import fsspec

from vlp.data.reading.index import (
    HEAD_BYTES,
    INDEX_SUFFIX,
    OLD_VERSION,
    Head,
    ShardIndex,
    load_index,
    parse_head,
)
from vlp.data.reading.locations import (
    Listed,
    OtherContent,
    cache_folder,
    check_scheme,
    is_remote,
    locked,
    reason_of,
    retry,
)
from vlp.errors import UserError
from vlp.files import file_hash, open_regular

INDEX_BYTES = 1 << 28
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_bytes() -> int | None:
    """Return the most bytes of copies to keep, from $VLP_CACHE_BYTES, or None for no limit.

    Raises:
        UserError: if the variable is not a number of bytes.
    """
    given = os.environ.get("VLP_CACHE_BYTES") or None
    if given is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", given.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"VLP_CACHE_BYTES={given!r} is not a number of bytes; give one such as 500GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def fetch(shard: str, listed: Listed | None = None) -> Path:
    """Return the local file of a shard. A remote one is copied to the cache folder, once for all processes.

    Args:
        listed: Entry of the shard in manifest.json, which the copy is compared with.

    Raises:
        UserError: if the copy fails several times, has other bytes than expected, or is larger than the cache may be.
    """
    if not is_remote(shard):
        return Path(shard)
    local = _local(shard)
    if local.exists():
        return local
    try:
        with locked(_lock_of(local.parent)):
            if not local.exists():  # no other process was faster
                _download(shard, local, listed)
    except OSError as e:
        raise UserError(f"cannot fetch {shard} to {local.parent}: {reason_of(e)}") from None
    return local


@contextmanager
def _reserved(temporary: Path, size: int | None) -> Iterator[None]:
    """Make room for a download, and remove what is left of it at the end.

    A sparse file of the whole size stands for the download, which starts empty, while other processes make room.
    """
    room = temporary.with_suffix(".room")
    with locked(cache_folder() / "shards" / ".lock"):
        limit = cache_bytes()
        if limit is not None:
            evict(limit - (size or 0))
        with open(room, "wb") as file:
            file.truncate(size or 0)
    try:
        yield
    finally:
        temporary.unlink(missing_ok=True)
        room.unlink(missing_ok=True)


def _download(shard: str, local: Path, listed: Listed | None) -> None:
    def copy() -> None:
        fs, path = fsspec.core.url_to_fs(check_scheme(shard))
        size = listed.size if listed else fs.info(path).get("size")
        limit = cache_bytes()
        if limit is not None and size is not None and size > limit:
            raise UserError(f"{shard} has {size:,} bytes, more than VLP_CACHE_BYTES={limit:,}; raise the limit")
        local.parent.mkdir(parents=True, exist_ok=True)  # another process may have made room meanwhile
        for left in (*local.parent.glob(".*.tmp"), *local.parent.glob(".*.room")):  # of a process that was killed
            left.unlink(missing_ok=True)
        index = _download_index(fs, path, local)
        temporary = local.with_name(f".{local.name}.{os.getpid()}.tmp")
        with _reserved(temporary, size):
            fs.get_file(path, str(temporary))
            _verify(temporary, listed, index)
            os.replace(temporary, local)

    try:
        retry(copy)
    except UserError:
        raise
    except OtherContent as e:
        raise UserError(f"{shard} {e}; pack or upload it again") from None
    except Exception as e:  # every file system has its own errors
        raise UserError(f"cannot fetch {shard} to {local.parent}: {reason_of(e)}") from None


def _download_index(fs: fsspec.AbstractFileSystem, path: str, local: Path) -> Path | None:
    """Copy the index that is stored next to a remote shard, or return None."""
    index = local.with_name(local.name + INDEX_SUFFIX)
    try:
        data = retry(lambda: fs.cat_file(path + INDEX_SUFFIX, end=INDEX_BYTES))
    except Exception:  # without one the copy is indexed; every file system has its own errors
        return None
    index.write_bytes(data)
    return index


def _verify(copy: Path, listed: Listed | None, index: Path | None) -> None:
    """Compare a copy with manifest.json, or else with the index next to the shard."""
    own = load_index(index) if index else None
    if listed:
        expected, where = (listed.size, listed.sha256), "manifest.json says"
    elif own:
        expected, where = (own.size, own.sha256), "its index says"
    else:
        return  # the scan that makes the index finds a truncated one
    if (copy.stat().st_size, file_hash(copy)) != expected:
        raise OtherContent(f"is not the shard that {where}: its copy has other bytes")


def open_copy(shard: str, listed: Listed | None = None) -> BinaryIO:
    """Open a shard. A remote one is fetched first, and its copy stays in the cache until the file is closed."""
    while True:
        local = fetch(shard, listed)
        try:
            file = open_regular(local)
        except FileNotFoundError:
            if not is_remote(shard):
                raise
            continue  # removed by another process since it was fetched
        if not is_remote(shard):
            return file
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:  # not removed before it was locked
            with suppress(OSError):
                os.utime(local.parent)
            return file
        file.close()


def _local(shard: str) -> Path:
    name = os.path.basename(shard.partition("?")[0])
    return cache_folder() / "shards" / sha256(shard.encode()).hexdigest()[:16] / name


def _lock_of(folder: Path) -> Path:
    return folder.parent / ".locks" / folder.name


def evict(limit: int) -> None:
    """Remove the least recently opened copies that nobody uses, until the others have at most ``limit`` bytes."""
    found = []
    for folder in (cache_folder() / "shards").glob("[!.]*"):
        with suppress(OSError):  # it may be removed or written at this moment
            size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".tmp")  # room stands for it
            found.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    for _, size, folder in sorted(found):
        if total <= limit:
            return
        if _remove(folder):
            total -= size


def _remove(folder: Path) -> bool:
    """Remove the folder of a copy unless a process downloads or reads it."""
    with suppress(OSError), open(_lock_of(folder), "a") as lock:  # BlockingIOError if it is locked
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in folder.iterdir():
            if not file.name.startswith(".") and not file.name.endswith(INDEX_SUFFIX):
                with open(file, "rb") as copy:
                    fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.unlink()
        shutil.rmtree(folder)
        return True
    return False


def peek_remote_index(shard: str) -> Head | None:
    """Read the head of the index that is stored next to a remote shard. Return None if there is none."""
    try:
        fs, path = fsspec.core.url_to_fs(check_scheme(shard))
        start = retry(lambda: fs.cat_file(path + INDEX_SUFFIX, start=0, end=HEAD_BYTES))
        if parse_head(start, OLD_VERSION) is None:
            return parse_head(start)
        old = ShardIndex.parse(retry(lambda: fs.cat_file(path + INDEX_SUFFIX, end=INDEX_BYTES)), OLD_VERSION)
        return old.head if old and old.is_complete_of_old_version else None
    except Exception:  # every file system has its own errors; the shard itself is read instead
        return None
