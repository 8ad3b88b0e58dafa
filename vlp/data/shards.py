"""Reading webdataset tar shards by random access: an index beside each shard says where every member lies.

A shard holds samples as neighbouring members ``KEY.jpg|jpeg|png|webp`` and ``KEY.json`` or ``KEY.txt``. Ours carry
captions, index and source in the json; those of img2dataset and open_clip are read as they are and indexed on first use.
Members are found by an allow-list of extensions; nothing in a shard is ever unpickled or executed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from vlp.errors import BadSample, UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("json", "txt")
INDEX_VERSION = 1
HEAD = re.compile(rb'{"version": %d, "samples": (\d+), "size": (\d+),' % INDEX_VERSION)
Member = tuple[int, int, int]  # offset in the tar, bytes, CRC-32


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


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Args:
        size: bytes of the tar.
        sha256: of the tar.
        keys: one a sample, in the shard's order.
        members: for each sample, extension -> (offset, bytes, CRC-32).
    """

    size: int
    sha256: str
    keys: tuple[str, ...]
    members: tuple[dict[str, Member], ...]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def scan(cls, shard: Path) -> ShardIndex:
        """Reads the shard once. Raises UserError where it is not a tar or ends early."""
        digest, crcs, samples = hashlib.sha256(), {}, {}
        size = shard.stat().st_size
        try:
            with open(shard, "rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
                for info in tar:
                    stem, _, extension = os.path.basename(info.name).partition(".")
                    extension = extension.lower()
                    if info.isreg() and stem and extension in IMAGES + TEXTS:
                        key = os.path.join(os.path.dirname(info.name), stem)
                        samples.setdefault(key, {})[extension] = (info.offset_data, info.size)
                end = tar.offset
        except tarfile.TarError as e:
            raise UserError(
                f"{shard} is not a readable tar shard ({e}); fetch it again, or remove it from the folder"
            ) from None
        # an archive ends with a block of zeros; without one its writer was cut off, maybe inside a sample
        if end + tarfile.BLOCKSIZE > size:
            raise UserError(f"{shard} is truncated at {size:,} bytes; fetch it again, or remove it from the folder")
        with open(shard, "rb") as f:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
            for members in samples.values():
                for offset, n in members.values():
                    f.seek(offset)
                    crcs[offset] = zlib.crc32(f.read(n))
            # a flipped bit in a header makes tarfile stop as if the archive ended there: whatever follows the last member
            # must be zeros, or samples would go missing silently
            f.seek(end)
            if any(f.read().strip(b"\0")):
                raise UserError(f"{shard} is damaged after {end:,} bytes; fetch it again, or remove it from the folder")
        # a sample without a picture (img2dataset writes KEY.json for failed downloads) is no sample
        complete = {k: m for k, m in samples.items() if any(e in m for e in IMAGES)}
        members = tuple({e: (o, n, crcs[o]) for e, (o, n) in m.items()} for m in complete.values())
        return cls(size, digest.hexdigest(), tuple(complete), members)

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps({"version": INDEX_VERSION, "samples": len(self), **asdict(self)}).encode())

    @classmethod
    def load(cls, path: Path) -> ShardIndex | None:
        """The saved index, or None where there is none of this version or it does not parse."""
        try:
            read = json.loads(path.read_bytes())
            if read["version"] != INDEX_VERSION:
                return None
            members = tuple({e: tuple(m) for e, m in sample.items()} for sample in read["members"])
            return cls(read["size"], read["sha256"], tuple(read["keys"]), members)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @staticmethod
    def peek(path: Path) -> tuple[int, int] | None:
        """(samples, bytes of the tar) from the head of a saved index, without parsing the rest; None where it has none."""
        try:
            with open(path, "rb") as f:
                head = HEAD.match(f.read(200))
        except OSError:
            return None
        return (int(head[1]), int(head[2])) if head else None


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.json")


def cache_folder() -> Path:
    """Where remote shards, and indexes of shards in read-only folders, are kept: $VLP_CACHE, else ~/.cache/vlp."""
    return Path(os.environ.get("VLP_CACHE", Path.home() / ".cache" / "vlp"))


def open_index(shard: Path) -> ShardIndex:
    """The shard's index: the one beside it, else one made now and kept beside it (or in the cache folder if read-only)."""
    here = index_path(shard)
    elsewhere = cache_folder() / "index" / f"{hashlib.sha256(str(shard.resolve()).encode()).hexdigest()}.json"
    size = shard.stat().st_size
    for path in (here, elsewhere):
        index = ShardIndex.load(path)
        if index is None:
            continue
        if index.size != size:
            raise UserError(
                f"{shard} has {size:,} bytes where its index says {index.size:,}: it is truncated or was altered; "
                f"fetch it again, or delete {path} if the new content is meant"
            )
        return index
    index = ShardIndex.scan(shard)
    try:
        index.save(here)
    except OSError:
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        index.save(elsewhere)
    return index


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go of the lock of a process that died."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _local_copy(fs: fsspec.AbstractFileSystem, url: str) -> Path:
    """The file itself where it is local, else a copy in the cache folder, fetched once for all processes."""
    if isinstance(fs, LocalFileSystem):
        return Path(url)
    full = fs.unstrip_protocol(url)
    local = cache_folder() / "shards" / hashlib.sha256(full.encode()).hexdigest()[:16] / os.path.basename(url)
    if not local.exists():
        with _locked(local.with_name(local.name + ".lock")):
            if not local.exists():
                temporary = local.with_name(local.name + ".tmp")
                fs.get_file(url, str(temporary))
                os.replace(temporary, local)
    return local


def list_shards(location: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The shards of a folder, a tar, a glob or a ``{000..009}`` pattern, local or at any URL that fsspec opens, sorted."""
    patterns = list(braceexpand(location))
    fs, _ = fsspec.core.url_to_fs(patterns[0])
    found: list[str] = []
    for pattern in patterns:
        path = fs._strip_protocol(pattern)
        if fs.isdir(path):
            found += fs.glob(path.rstrip("/") + "/*.tar")
        elif any(c in path for c in "*?["):
            found += fs.glob(path)
        elif fs.exists(path):
            found.append(path)
        else:
            raise UserError(f"no shards at {pattern}: it does not exist; make shards with `vlp data pack`")
    if not found:
        raise UserError(f"no shards at {location}: it holds no .tar file; make shards with `vlp data pack`")
    return fs, sorted(found)


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in the shard.

    Args:
        key: within the shard.
        number: of the sample within the source, in the order of the shards.
        image: the encoded picture.
        captions: none empty; () where the sample has no text.
        index: equal index = same picture.
        meta: whatever else the json holds.
    """

    key: str
    shard: int
    row: int
    number: int
    image: bytes
    captions: tuple[str, ...]
    index: int
    meta: dict


class ShardReader:
    """All shards of one source. Indexes and file handles are opened when first needed and are not pickled.

    Raises UserError where there is no shard, or one is truncated, altered or no tar.
    """

    def __init__(self, location: str):
        self.location = location
        self.fs, self.shards = list_shards(location)
        self.sizes = self._sizes()
        self._open_caches()

    def _open_caches(self) -> None:
        self._offsets = [0, *accumulate(self.sizes)]
        self.index = lru_cache(maxsize=256)(lambda shard: open_index(self.local(shard)))
        self._handle = lru_cache(maxsize=64)(lambda shard: open(self.local(shard), "rb"))

    def local(self, shard: int) -> Path:
        """The shard's file, fetched first if it is remote."""
        return _local_copy(self.fs, self.shards[shard])

    def _sizes(self) -> list[int]:
        """Samples of each shard: from manifest.json where it names them all, else from every index."""
        counted = {}
        manifest = os.path.join(os.path.dirname(self.shards[0]), "manifest.json")
        if self.fs.exists(manifest):
            with self.fs.open(manifest) as f:
                counted = {s["shard"]: s for s in json.load(f)["shards"]}
        sizes = []
        for shard in self.shards:
            entry = counted.get(os.path.basename(shard))
            if entry is None:
                local = _local_copy(self.fs, shard)
                known = ShardIndex.peek(index_path(local))
                whole = known is not None and known[1] == local.stat().st_size
                sizes.append(known[0] if whole else len(open_index(local)))
                continue
            if self.fs.size(shard) != entry["size"]:
                raise UserError(
                    f"{shard} has {self.fs.size(shard):,} bytes where manifest.json says {entry['size']:,}: it is truncated "
                    f"or was altered; fetch it again, or run `vlp data pack` again"
                )
            sizes.append(entry["samples"])
        return sizes

    def __len__(self) -> int:
        return sum(self.sizes)

    def _read(self, shard: int, member: Sequence[int]) -> bytes:
        offset, size, crc = member
        data = os.pread(self._handle(shard).fileno(), size, offset)
        if zlib.crc32(data) != crc:
            raise BadSample("altered since the shard was indexed (CRC-32 differs)")
        return data

    def complaint(self, shard: int, row: int, reason: str) -> dict:
        """A line of quarantine.jsonl."""
        name = os.path.basename(self.shards[shard])
        return {"source": self.location, "shard": name, "key": self.index(shard).keys[row], "reason": reason}

    def read(self, shard: int, row: int) -> RawSample:
        """Raises BadSample where the bytes changed or the json is not one of a sample."""
        members = self.index(shard).members[row]
        image = self._read(shard, next(members[e] for e in IMAGES if e in members))
        meta = {}
        if "json" in members:
            try:
                meta = json.loads(self._read(shard, members["json"]))
            except ValueError as e:
                raise BadSample(f"json does not parse ({e})") from None
            if not isinstance(meta, dict):
                raise BadSample("json is not an object")
        captions = meta.get("captions") or meta.get("caption") or meta.get("text")
        if not captions and "txt" in members:
            captions = self._read(shard, members["txt"]).decode("utf-8", errors="replace")
        captions = (captions,) if isinstance(captions, str) else tuple(captions or ())
        captions = tuple(c.strip() for c in captions if isinstance(c, str) and c.strip())
        own = meta.get("index")
        number = self._offsets[shard] + row
        index = own if isinstance(own, int) and own >= 0 else number
        return RawSample(self.index(shard).keys[row], shard, row, number, image, captions, index, meta)

    def __getstate__(self):
        return {k: getattr(self, k) for k in ("location", "fs", "shards", "sizes")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_caches()
