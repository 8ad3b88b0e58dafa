"""Images by name: files of a folder, or samples of shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from vlp.data.reading.shards import ShardReader, make_key
from vlp.errors import BadSample, UserError
from vlp.files import resolve


class NamedImages(Protocol):
    """Where pictures are read by name."""

    def read(self, name: str) -> bytes:
        """The encoded picture. Raises BadSample where there is none of this name."""


def open_images(location: str) -> NamedImages:
    """Shards where there are some, else a folder of files, which may be inside a package."""
    if location.startswith("pip:"):
        location = str(resolve(location))
    if os.path.isdir(location):
        entries = os.listdir(location)
        shards = "manifest.json" in entries or any(name.endswith(".tar") for name in entries)
        return ShardImages(location) if shards else FolderImages(Path(location))
    if ".tar" in location or "://" in location:
        return ShardImages(location)
    raise UserError(f"no folder {location}; set images to the folder that the pictures' paths start from, or to shards")


@dataclass(frozen=True)
class FolderImages:
    """A folder; names are paths in it."""

    folder: Path

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except (OSError, ValueError) as e:
            raise BadSample(f"no picture {name!r} in {self.folder} ({getattr(e, 'strerror', None) or e})") from None


class ShardImages:
    """Shards; names are keys of their samples, or the paths that `vlp data pack` made the keys from."""

    def __init__(self, location: str):
        self.reader = ShardReader(location)

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        shards = range(len(self.reader.shards))
        return {key: (shard, row) for shard in shards for row, key in enumerate(self.reader.index(shard).keys)}

    def read(self, name: str) -> bytes:
        place = self._places.get(name)
        if place is None:  # of x.jpg and x.png the second has a key with more to it, which is asked for first
            packed = make_key(name, set())
            place = self._places.get(make_key(name, {packed}), self._places.get(packed))
        if place is None:
            raise BadSample(f"no picture {name!r} in {self.reader.location}")
        return self.reader.read(*place).image

    def __getstate__(self):
        return {"reader": self.reader}
