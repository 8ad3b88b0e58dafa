"""Reading webdataset tar shards by random access: an index beside each shard says where every member lies.

A shard holds samples as neighbouring members ``KEY.jpg|jpeg|png|webp`` and ``KEY.json`` or ``KEY.txt``. Ours carry
captions, index and source in the json; those of img2dataset and open_clip are read as they are and indexed on first use.
Members are found by an allow-list of extensions; nothing in a shard is ever unpickled or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from vlp.data.order import GROUP_SAMPLES
from vlp.data.reading.locations import cache_folder, fetch, list_shards, read_manifest, reason_of
from vlp.errors import BadSample, UserError
from vlp.files import write_atomically

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("json", "txt")
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)
CAPTIONS = ("captions", "caption", "text")  # where a json has them: ours, img2dataset's, others'
IMAGE_ID_BITS = 40
INDEX_VERSION = 1
HEAD = re.compile(rb'{"version": %d, "samples": (\d+), "size": (\d+),' % INDEX_VERSION)
MOST_PADDING = 1 << 20  # bytes of zeros at the end of a tar; writers pad to 10 KiB
CHUNK = 1 << 22  # bytes read at a time
FETCH_AGAIN = "fetch it again, or remove it from the folder"
Member = tuple[int, int, int]  # offset in the tar, bytes, CRC-32


def make_key(image: str, taken: set[str]) -> str:
    """A name for the members of a tar, added to ``taken``: the path without extension, safe characters only."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", IMAGE_FILE.sub("", image)).strip("_")[-100:] or "image"
    if key in taken:  # x.jpg and x.png, or a/b.jpg and a_b.jpg
        key = f"{key}-{hashlib.sha256(image.encode()).hexdigest()[:16]}"
    taken.add(key)
    return key


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
        """Reads the shard once. Raises UserError where it is not a tar, is damaged, or ends early."""
        try:
            with open(shard, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                samples, end = _walk(f, size)
                # an archive ends with a block of zeros; without one its writer was cut off, maybe inside a sample
                if end + tarfile.BLOCKSIZE > size:
                    raise UserError(f"{shard} is truncated at {size:,} bytes; {FETCH_AGAIN}")
                # a flipped bit in a header makes tarfile stop as if the archive ended there, and so does a download
                # into a file of zeros that broke off: samples would go missing silently
                if size - end > MOST_PADDING or not _only_zeros(f, end):
                    raise UserError(f"{shard} is damaged after {end:,} bytes; {FETCH_AGAIN}")
                members = tuple({e: (*m, _crc(f, *m)) for e, m in sample.items()} for _, sample in samples)
                digest = hashlib.sha256()
                f.seek(0)
                while chunk := f.read(CHUNK):
                    digest.update(chunk)
        except UserError:
            raise
        except Exception as e:  # a damaged header makes tarfile raise anything from ValueError to RecursionError
            raise UserError(f"{shard} is not a readable tar shard ({reason_of(e)}); {FETCH_AGAIN}") from None
        return cls(size, digest.hexdigest(), tuple(key for key, _ in samples), members)

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps({"version": INDEX_VERSION, "samples": len(self), **asdict(self)}).encode())

    @classmethod
    def load(cls, path: Path) -> ShardIndex | None:
        """The saved index, or None where there is none of this version, or what it says cannot be."""
        try:
            read = json.loads(path.read_bytes())
            members = tuple({e: tuple(m) for e, m in sample.items()} for sample in read["members"])
            index = cls(read["size"], read["sha256"], tuple(read["keys"]), members)
            inside = all(0 <= o <= o + n <= index.size for sample in members for o, n, _ in sample.values())
            pictures = all(any(e in sample for e in IMAGES) for sample in members)
            same_length = len(index.keys) == len(members) == read["samples"]
            return index if read["version"] == INDEX_VERSION and inside and pictures and same_length else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
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


def _walk(f: BinaryIO, size: int) -> tuple[list[tuple[str, dict[str, tuple[int, int]]]], int]:
    """The samples of a tar, extension -> (offset, bytes) for each, and where its last member ends."""
    samples: list[tuple[str, dict]] = []
    latest: dict[str, dict] = {}
    with tarfile.open(fileobj=f, mode="r:") as tar:
        for info in tar:
            # whoever made the header can claim any size; a negative one would send tarfile round in circles
            if info.size < 0 or info.isreg() and info.offset_data + info.size > size:
                raise tarfile.ReadError(f"{info.name[:80]!r} does not fit into {size:,} bytes")
            stem, _, extension = os.path.basename(info.name).partition(".")
            extension = extension.lower()
            if not info.isreg() or not stem or extension not in IMAGES + TEXTS:
                continue
            key = os.path.join(os.path.dirname(info.name), stem)
            if extension in latest.get(key, (extension,)):  # a new key, or one that begins again: two samples then
                latest[key] = {}
                samples.append((key, latest[key]))
            latest[key][extension] = (info.offset_data, info.size)
        # a sample without a picture (img2dataset writes KEY.json for failed downloads) is no sample
        return [(key, members) for key, members in samples if any(e in members for e in IMAGES)], tar.offset


def _only_zeros(f: BinaryIO, start: int) -> bool:
    f.seek(start)
    return not f.read().strip(b"\0")


def _crc(f: BinaryIO, offset: int, size: int) -> int:
    f.seek(offset)
    return zlib.crc32(f.read(size))


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.json")


def _index_paths(shard: Path) -> tuple[Path, Path]:
    """Beside the shard, and for one in a read-only folder."""
    name = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()
    return index_path(shard), cache_folder() / "index" / f"{name}.json"


def _size(shard: Path) -> int:
    """Bytes. Raises UserError where there is no such file."""
    try:
        status = shard.stat()
    except OSError as e:
        raise UserError(f"the shard {shard} cannot be read ({e.strerror}); {FETCH_AGAIN}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"the shard {shard} is not a file; remove it from the folder")
    return status.st_size


def count_samples(shard: Path) -> int:
    """Samples of a shard, by the head of its index where it has one."""
    size = _size(shard)
    heads = [head for path in _index_paths(shard) if (head := ShardIndex.peek(path))]
    return heads[0][0] if heads and heads[0][1] == size else len(open_index(shard))


def open_index(shard: Path) -> ShardIndex:
    """The shard's index: the one beside it, else one made now and kept beside it (or in the cache folder if read-only)."""
    size = _size(shard)
    here, elsewhere = _index_paths(shard)
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
        try:
            elsewhere.parent.mkdir(parents=True, exist_ok=True)
            index.save(elsewhere)
        except OSError as e:
            raise UserError(
                f"cannot write the index of {shard}, neither beside it nor to {elsewhere.parent} ({reason_of(e)}); "
                "set VLP_CACHE to a folder that can be written"
            ) from None
    return index


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in the shard.

    Args:
        key: within the shard.
        source_row: row of the sample in its source, in the order of the shards.
        image: the encoded picture; None in a file of texts.
        captions: none empty; () where the sample has no text.
        image_id: equal for samples that show the same image, or have the same sentence.
        meta: whatever else the json holds.
        texts: further views of a text.
        label: number of the class, where there are classes.
        images: further encoded pictures of the sample (NLVR2 has two).
        answers: (answer, weight) of a question.
        targets: (C,) soft target of each class.
    """

    key: str
    shard: int
    row: int
    source_row: int
    image: bytes | None
    captions: tuple[str, ...]
    image_id: int
    meta: dict
    texts: tuple[str, ...] = ()
    label: int | None = None
    images: tuple[bytes, ...] = ()
    answers: tuple[tuple[str, float], ...] = ()
    targets: Tensor | None = None


@dataclass(frozen=True)
class Source:
    """One folder, glob or URL of shards.

    Args:
        shards: what `list_shards` takes.
        weight: share of the stream relative to the other sources' weights; None = number of samples.
        label: what of a sample's json is the number of its class; None = samples have no class.
    """

    shards: str
    weight: float | None = None
    label: str | None = None

    def at(self, location: str) -> Source:
        """Return a source of other shards; the weight belongs to these shards, so it is dropped."""
        return Source(location, label=self.label)

    def open(self) -> ShardReader:
        return ShardReader(self.shards, self.label)


class ShardReader:
    """All shards of one source. Indexes and file handles are opened when first needed and are not pickled.

    Raises UserError where there is no shard, or one is missing, truncated, altered or no tar.
    """

    def __init__(self, location: str, label: str | None = None):
        self.location, self.label = location, label
        self.shards = list_shards(location)
        folders = {os.path.dirname(shard) for shard in self.shards}
        self.one_folder = len(folders) == 1
        listed = {shard: line for folder in folders for shard, line in read_manifest(folder).items()}
        self.listed = [listed.get(shard) for shard in self.shards]
        self.sizes = [self._count(shard) for shard in range(len(self.shards))]
        self._open_caches()

    def _count(self, shard: int) -> int:
        """Samples: by manifest.json where it names the shard, else by the shard's index."""
        name, listed = self.shards[shard], self.listed[shard]
        if listed is None:
            return count_samples(fetch(name))
        # a remote one is compared when it is fetched
        if "://" not in name and (size := _size(Path(name))) != listed.size:
            raise UserError(
                f"{name} has {size:,} bytes where manifest.json says {listed.size:,}: it is truncated or was altered; "
                "fetch it again, or run `vlp data pack` again"
            )
        return listed.samples

    def _open_caches(self) -> None:
        self._offsets = [0, *accumulate(self.sizes)]
        # the shards of a group of the order are read in turns: as many indexes as that, about 100 MB of them at most
        mean = max(1, len(self) // len(self.shards))
        self.index = lru_cache(maxsize=2 + 2 * GROUP_SAMPLES // mean)(self._index)
        self._handle = lru_cache(maxsize=128)(self._open)

    def _open(self, shard: int) -> BinaryIO:
        return open(self.local(shard), "rb")

    def local(self, shard: int) -> Path:
        """The shard's file, fetched first if it is remote."""
        return fetch(self.shards[shard])

    def _index(self, shard: int) -> ShardIndex:
        local, listed = self.local(shard), self.listed[shard]
        index = open_index(local)
        if len(index) != self.sizes[shard] or listed and listed.sha256 != index.sha256:
            raise UserError(
                f"{local} is not the shard that {'manifest.json' if listed else 'its index'} says: it was altered; "
                "delete it with its index and fetch it again, or run `vlp data pack` again"
            )
        return index

    def __len__(self) -> int:
        return self._offsets[-1]

    def locate(self, source_row: int) -> tuple[int, int]:
        """Return (shard, row) of a row of the source."""
        shard = bisect_right(self._offsets, source_row) - 1  # the last of equal offsets: empty shards are skipped
        return shard, source_row - self._offsets[shard]

    def _read(self, shard: int, member: Sequence[int]) -> bytes:
        offset, size, crc = member
        handle = self._handle(shard)  # held while it is read: of two threads that open it at once the cache keeps one's
        try:
            data = os.pread(handle.fileno(), size, offset)
        except OSError as e:
            raise UserError(f"the shard {self.shards[shard]} cannot be read ({e.strerror})") from None
        if zlib.crc32(data) != crc:
            raise BadSample("altered since the shard was indexed (CRC-32 differs)")
        return data

    def quarantine_entry(self, shard: int, row: int, reason: str) -> dict:
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
            except (ValueError, RecursionError) as e:
                raise BadSample(f"json does not parse ({e})") from None
            if not isinstance(meta, dict):
                raise BadSample("json is not an object")
        captions = next((texts for name in CAPTIONS if (texts := _captions(meta.get(name)))), ())
        if not captions and "txt" in members:
            captions = _captions(self._read(shard, members["txt"]).decode("utf-8-sig", errors="replace"))
        source_row = self._offsets[shard] + row
        label = None
        if self.label is not None:
            label = meta.get(self.label)
            if not isinstance(label, int) or isinstance(label, bool) or label < 0:
                raise BadSample(f"{self.label} is {label!r}, which is no number of a class")
        key, image_id = self.index(shard).keys[row], self._image_id(meta, source_row)
        return RawSample(key, shard, row, source_row, image, captions, image_id, meta, label=label)

    def _image_id(self, meta: dict, source_row: int) -> int:
        """Our json's index, which is unique in its folder; others may number anything by that name."""
        own = meta.get("index")
        ours = self.one_folder and isinstance(own, int) and {"captions", "source"} <= meta.keys()
        return own if ours and 0 <= own < 1 << IMAGE_ID_BITS else source_row

    def fingerprint(self) -> dict:
        """What the order of the samples, and where a manifest says so their content, depends on."""
        listed = [line.sha256 if line else None for line in self.listed]
        names = [os.path.basename(shard) for shard in self.shards]
        digest = hashlib.sha256(json.dumps([names, self.sizes, listed]).encode()).hexdigest()
        return {"shards": len(self.shards), "samples": len(self), "sha256": digest}

    def __getstate__(self):
        return {k: getattr(self, k) for k in ("location", "label", "shards", "one_folder", "listed", "sizes")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_caches()


def _captions(found: object) -> tuple[str, ...]:
    """The texts of a text or a list, none blank; half of a surrogate pair, which no tokenizer takes, becomes "?"."""
    texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    texts = (text.encode(errors="replace").decode().strip() for text in texts if isinstance(text, str))
    return tuple(text for text in texts if text)
