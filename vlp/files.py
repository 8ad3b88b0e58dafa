"""Resolve paths, write files atomically, hash them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from vlp.errors import UserError


def resolve(path: str) -> Path:
    """The file or folder that ``path`` names.

    Args:
        path: a plain path, or ``pip:PACKAGE/sub/path`` for something inside an installed Python package.

    Raises:
        UserError: if the package is not installed or nothing is there.
    """
    if not path.startswith("pip:"):
        found = Path(path).expanduser()
        if not found.exists():
            raise UserError(f"no such file or folder: {path}; check the path")
        return found
    package, _, inside = path.removeprefix("pip:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise UserError(
            f"{path} needs a package that is not installed: pip install {name} (or pip install 'vlp[demo]')"
        )
    found = Path(spec.submodule_search_locations[0]) / inside
    if not found.exists():
        raise UserError(f"the installed package {package} holds no {inside}; check the path after pip:{package}/")
    return found


def write_atomically(path: Path, data: bytes) -> None:
    """Writes the whole file or nothing: temporary file in the same folder, sync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
