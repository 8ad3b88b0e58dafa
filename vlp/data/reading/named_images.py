"""Images by name: files of a folder, or samples of shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from vlp.data.reading.index import long_key, short_key
from vlp.data.reading.locations import is_remote
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError
from vlp.files import local_path, read_regular, relative_to, resolve, why_not_local


class NamedImages(Protocol):
    """A collection from which images are read by name."""

    def read(self, name: str) -> bytes:
        """Return the encoded image. Raises BadSample if there is no image of this name."""


def open_images(location: str) -> NamedImages:
    """Open shards, or else a folder of files, which may be inside a package.

    Raises:
        UserError: if the location is neither.
    """
    if is_remote(location):
        return ShardImages(location)
    folder = resolve(location) if location.startswith("pip:") else local_path(location)
    if folder.is_dir():
        entries = os.listdir(folder)
        shards = "manifest.json" in entries or any(name.lower().endswith(".tar") for name in entries)
        return ShardImages(str(folder)) if shards else FolderImages(folder)
    if ".tar" in location or "::" in location:
        return ShardImages(location)
    raise UserError(
        f"no folder {location}{relative_to(folder)}; set images to the folder that the images' paths start from, or to shards"
    )


@dataclass(frozen=True)
class FolderImages:
    """Images of a folder; names are paths in it."""

    folder: Path

    def read(self, name: str) -> bytes:
        try:
            return read_regular(self.folder / name)
        except OSError as e:
            raise BadSample(f"no image {name!r} in {self.folder} ({e.strerror}{why_not_local(name)})") from None


class ShardImages:
    """Images of shards; names are keys of samples, or the paths from which `vlp data pack` derived the keys."""

    def __init__(self, location: str):
        self.reader = ShardReader(location)

    @cached_property
    def _rows(self) -> dict[str, tuple[int, int]]:
        """(shard, row) of each key."""
        shards = range(len(self.reader.shards))
        return {key: (shard, row) for shard in shards for row, key in enumerate(self.reader.index(shard).keys)}

    def read(self, name: str) -> bytes:
        found = self._rows.get(name)
        if found is None:  # of x.jpg and x.png the second has the long key
            found = self._rows.get(long_key(name), self._rows.get(short_key(name)))
        if found is None:
            raise BadSample(f"no image {name!r} in {self.reader.location}")
        return self.reader.read(*found).image

    def __getstate__(self):
        return {"reader": self.reader}
