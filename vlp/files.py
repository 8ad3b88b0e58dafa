"""Local files: paths, safe reading, lines of JSON, atomic writing, hashes."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vlp.errors import UserError

CHUNK = 1 << 22  # bytes read at a time
HASH_BUFFER = 1 << 20  # bytes
RESULT_BYTES = 1 << 28  # of the file of an evaluation's result, at most
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def local_path(path: str | Path) -> Path:
    """Return the path with ``~`` replaced by the home folder. Nothing needs to exist there.

    Raises:
        UserError: if the home folder of ``~NAME`` is unknown, or the path has a character that no path can have.
    """
    if not is_possible_path(path):
        raise UserError(f"{str(path)!r} contains NUL or half of a surrogate pair, which no path can contain")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no user {str(path)[1:].partition('/')[0]!r}; write the folder out") from None


def resolve(path: str) -> Path:
    """Return the existing file or folder that ``path`` names.

    Args:
        path: A local path, which may begin with ``~``, or ``pip:PACKAGE/sub/path`` for a path inside an installed Python
            package.

    Raises:
        UserError: if the package is not installed, or nothing exists at the path.
    """
    if not path.startswith("pip:"):
        found = local_path(path)
        if not found.exists():
            raise UserError(f"no such file or folder: {path}{relative_to(found)}; check the path")
        return found
    package, _, inside = path.removeprefix("pip:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise UserError(
            f"{path} needs a package that is not installed: pip install {name} (or pip install 'vlp[demo]')"
        )
    root = Path(spec.submodule_search_locations[0])
    found = root / inside
    if not found.exists() or not found.resolve().is_relative_to(root.resolve()):
        raise UserError(f"the installed package {package} holds no {inside}; check the path after pip:{package}/")
    return found


def is_possible_path(path: str | Path) -> bool:
    """Return whether the operating system could have a file of this name: it has no NUL and can be encoded."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def why_not_local(path: str, root: str = "the folder of the images") -> str:
    """Return a remark for messages about a missing file: why ``path`` is not a path on this machine, or "".

    Args:
        root: What relative paths start from, as the user knows it.
    """
    if "://" in path:
        return "; it is a URL: download the file first (img2dataset downloads images)"
    if "\\" in path:
        return "; it has backslashes: write it with /"
    if re.match(r"[A-Za-z]:/", path):
        return "; it begins with a drive of Windows: write the path on this machine"
    return f"; it is an absolute path, which {root} does not change" if path.startswith("/") else ""


def relative_to(path: str | Path) -> str:
    """Return a remark for messages about a missing path: the folder that a relative path starts from, or ""."""
    return "" if os.path.isabs(path) else f" (relative to {os.getcwd()})"


def split_locations(text: str) -> list[str]:
    """Split locations at commas, except those inside the braces of a pattern such as ``{a,b}.tar``."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}" and depth > 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading.

    A FIFO would block until somebody writes to it, and a device may never end, so both are refused before a read.

    Raises:
        OSError: if the file cannot be opened, is not a regular file, or has a name that no file can have.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "its name has a character that no file name can have") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'something else')}, not a file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, max_bytes: int | None = None) -> bytes:
    """Read a regular file, see `open_regular`.

    Raises:
        OSError: as `open_regular`, and if the file is larger than ``max_bytes``.
    """
    with open_regular(path) as file:
        if max_bytes is None:
            return file.read()
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes")
    return data


def read_log(path: Path) -> list[dict]:
    """Return the records of a file of JSON lines, without lines that are damaged or were only partly written.

    The result is empty for a missing file.

    Raises:
        UserError: If the path is that of something else than a file.
    """
    try:
        lines = read_regular(path).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); remove it") from None
    return [record for record in map(_record, lines) if record is not None]


def _record(line: bytes) -> dict | None:
    """Return the record of a line, or None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


@contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file of which either everything or nothing is written: a temporary file is synced and renamed at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write the whole file or nothing, see `writing_atomically`."""
    with writing_atomically(path) as file:
        file.write(data)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASH_BUFFER))
    with open_regular(path) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
