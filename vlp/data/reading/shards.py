"""Random access to webdataset tar shards. An index next to each shard contains the offsets of its members.

The members of a sample share a key, the name up to its first dot, as in webdataset. A sample is ``KEY.jpg|jpeg|png|webp`` with
``KEY.json`` or ``KEY.txt``. Our own shards have captions and source in the json. Those of img2dataset and open_clip are read as
they are and indexed on first use. Further dots are allowed, see `_samples_of`. Members are selected by an allow-list of
extensions; members that are not read are counted. Nothing in a shard is unpickled or executed.

Index and manifest are hints: they are checked when they are read, and an index that is wrong is replaced.
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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from vlp.data.order import GROUP_SAMPLES
from vlp.data.reading.locations import (
    LEAST_SAMPLE_BYTES,
    Listed,
    Listing,
    cache_folder,
    fetch,
    is_remote,
    list_shards,
    reason_of,
)
from vlp.data.reading.tables import as_text, parse_object
from vlp.errors import BadSample, UserError
from vlp.files import CHUNK, open_regular, read_regular, write_atomically

if TYPE_CHECKING:  # packing needs no torch, which takes 0.5 GB
    from torch import Tensor

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("json", "txt")
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)
CAPTIONS = ("captions", "caption", "text")  # fields of a json with captions: ours, img2dataset's, others'
INDEX_VERSION = 2  # 1 had no checksum and did not read keys with dots
HEAD = re.compile(
    rb'(\{"version": %d, "samples": (\d{1,12}), "size": (\d{1,15}), "lost": (\d{1,12}), "body": "([0-9a-f]{64})"), '
    rb'"crc32": (\d{1,10})\}\n' % INDEX_VERSION
)
HEAD_BYTES = 300  # more than any head
MOST_PADDING = 1 << 20  # bytes of zeros at the end of a tar; writers pad to 10 KiB
MOST_REASONS = 20  # of members that are not read
FETCH_AGAIN = "fetch it again, or remove it from the folder"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
Place = tuple[int, int]  # offset in the tar, bytes
Member = tuple[int, int, int]  # offset in the tar, bytes, CRC-32
Counted = dict[str, tuple[int, str]]  # reason -> number of members or keys, the first of them


def short_key(image: str) -> str:
    """Return the key of an image's members if no other image has it: its path without extension, in safe characters."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", IMAGE_FILE.sub("", image)).strip("_")[-100:] or "image"


def long_key(image: str) -> str:
    """Return the key of an image whose `short_key` is taken, as that of x.png by x.jpg, or of a_b.jpg by a/b.jpg."""
    return f"{short_key(image)}-{hashlib.sha256(image.encode(errors='replace')).hexdigest()[:16]}"


def content_id(data: bytes) -> int:
    """Return an id of 63 bits that equal contents share: samples with the same image have the same id in all sources."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


class Head(NamedTuple):
    """Head of an index: samples, bytes of the tar, and number of members that are lost, see `ShardIndex`."""

    samples: int
    size: int
    lost: int


@dataclass(frozen=True)
class ShardIndex:
    """Offsets of the samples of one shard.

    Args:
        size: Bytes of the tar.
        sha256: Hash of the tar.
        keys: Key of each sample, in the order of the shard.
        members: For each sample, extension to (offset, bytes, CRC-32).
        lost: Members that a user would expect to be read, such as ``KEY.bmp``.
        ignored: Other members that are not read, such as the json of a failed download.
    """

    size: int
    sha256: str
    keys: tuple[str, ...]
    members: tuple[dict[str, Member], ...]
    lost: Counted = field(default_factory=dict)
    ignored: Counted = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def scan(cls, shard: Path) -> ShardIndex:
        """Read the whole shard.

        Raises:
            UserError: if it is not a tar, is damaged, or is truncated.
        """
        try:
            with open_regular(shard) as file:
                start = file.read(8)
                file.seek(0)
                for magic, program in COMPRESSED.items():
                    if start.startswith(magic):
                        raise UserError(f"{shard} is compressed; unpack it, e.g. with {program} -dc OLD.tar > NEW.tar")
                size = os.fstat(file.fileno()).st_size
                contents, end = _walk(file, size)
                # an archive ends with a block of zeros; without one its writer was stopped, maybe inside a sample
                if end + tarfile.BLOCKSIZE > size:
                    raise UserError(f"{shard} is truncated at {size:,} bytes; {FETCH_AGAIN}")
                # a flipped bit in a header makes tarfile stop as if the archive ended there, and so does an interrupted
                # download into a file of zeros: samples would be missing without an error
                if size - end > MOST_PADDING or not _only_zeros(file, end):
                    raise UserError(f"{shard} is damaged after {end:,} bytes; {FETCH_AGAIN}")
                samples, lost, ignored = contents.samples()
                members = tuple({e: (*m, _crc(file, *m)) for e, m in sample.items()} for _, sample in samples)
                digest = hashlib.sha256()
                file.seek(0)
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except UserError:
            raise
        except Exception as e:  # a damaged header makes tarfile raise anything from ValueError to RecursionError
            raise UserError(f"{shard} is not a readable tar shard ({reason_of(e)}); {FETCH_AGAIN}") from None
        return cls(size, digest.hexdigest(), tuple(key for key, _ in samples), members, lost, ignored)

    def save(self, path: Path) -> None:
        """Write two lines: a head, which can be read without the rest, and the fields. Both have a checksum."""
        body = json.dumps(asdict(self)).encode()
        lost = sum(count for count, _ in self.lost.values())
        head = (
            f'{{"version": {INDEX_VERSION}, "samples": {len(self)}, "size": {self.size}, "lost": {lost}, '
            f'"body": "{hashlib.sha256(body).hexdigest()}"'
        ).encode()
        write_atomically(path, head + b', "crc32": %d}\n' % zlib.crc32(head) + body + b"\n")

    @classmethod
    def load(cls, path: Path) -> ShardIndex | None:
        """Read a saved index. Return None if there is none of this version, or it is damaged or contradicts itself."""
        head = cls.peek(path)
        if head is None:
            return None
        try:
            first, _, body = read_regular(path, head.size + MOST_PADDING).partition(b"\n")
            body = body.removesuffix(b"\n")
            if HEAD.match(first + b"\n")[5] != hashlib.sha256(body).hexdigest().encode():
                return None
            read = json.loads(body)
            index = cls(
                read["size"],
                read["sha256"],
                tuple(read["keys"]),
                tuple({e: tuple(m) for e, m in sample.items()} for sample in read["members"]),
                {reason: tuple(counted) for reason, counted in read["lost"].items()},
                {reason: tuple(counted) for reason, counted in read["ignored"].items()},
            )
            return index if index._is_consistent(head) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _is_consistent(self, head: Head) -> bool:
        return (
            type(self.size) is int
            and len(self.keys) == len(self.members) == head.samples
            and self.size == head.size
            and all(isinstance(key, str) for key in self.keys)
            and all(any(e in sample for e in IMAGES) for sample in self.members)
            and all(
                e in IMAGES + TEXTS
                and len(m) == 3
                and all(type(n) is int and n >= 0 for n in m)
                and m[0] + m[1] <= self.size
                for sample in self.members
                for e, m in sample.items()
            )
            and all(
                len(counted) == 2 and type(counted[0]) is int and isinstance(counted[1], str)
                for counted in (*self.lost.values(), *self.ignored.values())
            )
        )

    @staticmethod
    def peek(path: Path) -> Head | None:
        """Read the head of a saved index. Return None if there is none of this version, or it is damaged."""
        try:
            with open_regular(path) as file:
                found = HEAD.match(file.read(HEAD_BYTES))
        except OSError:
            return None
        if found is None or zlib.crc32(found[1]) != int(found[6]):
            return None
        head = Head(*(int(found[n]) for n in (2, 3, 4)))
        return head if head.samples * LEAST_SAMPLE_BYTES <= head.size else None


class _Contents:
    """Members of a tar by key and extension, as `_walk` finds them.

    Attributes:
        groups: (key, {(infix, extension): place}) in the order of the first member. ``a.b.jpg`` has the key ``a``, the
            infix ``b`` and the extension ``jpg``.
    """

    def __init__(self):
        self.groups: list[tuple[str, dict[tuple[str, str], Place]]] = []
        self.latest: dict[str, dict[tuple[str, str], Place]] = {}
        self.files: dict[str, Place] = {}
        self.lost: Counted = {}
        self.ignored: Counted = {}

    def add(self, name: str, place: Place) -> None:
        self.files[os.path.normpath(name)] = place
        stem, _, suffix = os.path.basename(name).partition(".")
        if not stem:
            _count(self.ignored, "hidden file", name)
            return
        infix, _, extension = suffix.lower().rpartition(".")
        key, kind = os.path.join(os.path.dirname(name), stem), (infix, extension)
        if kind in self.latest.get(key, (kind,)):  # a new key, or one that begins again, which makes two samples
            self.latest[key] = {}
            self.groups.append((key, self.latest[key]))
        self.latest[key][kind] = place

    def samples(self) -> tuple[list[tuple[str, dict[str, Place]]], Counted, Counted]:
        """Return (key, {extension: place}) of each sample, and the members that are lost and ignored."""
        found = []
        for key, members in self.groups:
            samples, used = _samples_of(key, members)
            found += samples
            if samples:
                for infix, extension in sorted(members.keys() - used):
                    kind = "image" if extension in IMAGES else "text" if extension in TEXTS else f".{extension}"
                    _count(self.ignored, f"further {kind} of a sample", ".".join(filter(None, (key, infix, extension))))
                continue
            extensions = sorted({extension or "no extension" for _, extension in members})
            # img2dataset writes only KEY.json for a failed download
            where = self.ignored if set(extensions) <= set(TEXTS) else self.lost
            _count(where, f"no image that can be read ({', '.join(extensions[:5])})", key)
        return found, self.lost, self.ignored


def _samples_of(
    key: str, members: dict[tuple[str, str], Place]
) -> tuple[list[tuple[str, dict[str, Place]]], set[tuple[str, str]]]:
    """Divide the members of a key into samples.

    Images with a text of the same infix are samples (``a.1.jpg``, ``a.1.txt``, ``a.2.jpg``, ``a.2.txt``). Otherwise the key
    is one sample, of its first image and its only text (``a.input.jpg``, ``a.output.txt``). Without texts, every image is a
    sample if all have an infix.

    Returns:
        (key, {extension: place}) of each sample, and the members that the samples contain.
    """
    images, texts = ({i: None for i, e in members if e in kinds} for kinds in (IMAGES, TEXTS))
    plain = [i for i in images if i == ""]
    if own := [i for i in images if i in texts]:
        pairs = [(i, i) for i in own]
    elif texts:
        text = "" if "" in texts else next(iter(texts)) if len(texts) == 1 else None
        pairs = [(i, text) for i in (plain or list(images))[:1]]
    else:
        pairs = [(i, None) for i in plain or images]
    samples, used = [], set()
    for image, text in pairs:
        kinds = [(i, e) for i, e in members if i == image and e in IMAGES or i == text and e in TEXTS]
        # a second encoding of an image is not read
        first = min((k for k in kinds if k[1] in IMAGES), key=lambda kind: IMAGES.index(kind[1]))
        kinds = [k for k in kinds if k[1] in TEXTS or k == first]
        name = f"{key}.{image}" if image and text in (image, None) else key
        samples.append((name, {e: members[i, e] for i, e in kinds}))
        used.update(kinds)
    return samples, used


def _count(counted: Counted, reason: str, example: str) -> None:
    if reason not in counted and len(counted) >= MOST_REASONS:
        reason = "other"
    count, first = counted.get(reason, (0, example[:200]))
    counted[reason] = (count + 1, first)


def _walk(file: BinaryIO, size: int) -> tuple[_Contents, int]:
    """Return the members of a tar, and the offset at which the last one ends."""
    contents, links = _Contents(), []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # tarfile would keep all of them
            # whoever wrote the header can claim any size; a negative one would make tarfile loop
            if info.size < 0 or info.isreg() and info.offset_data + info.size > size:
                raise tarfile.ReadError(f"{info.name[:80]!r} does not fit into {size:,} bytes")
            if info.islnk():  # the name of an earlier member
                links.append((info.name, info.linkname))
            elif info.issym():  # a path relative to the member's folder
                links.append((info.name, os.path.join(os.path.dirname(info.name), info.linkname)))
            elif info.isreg() and not info.issparse():
                contents.add(info.name, (info.offset_data, info.size))
            elif not info.isdir():
                _count(contents.lost, "neither a file nor a link", info.name)
        for name, target in links:
            place = contents.files.get(os.path.normpath(target))
            if place is not None:
                contents.add(name, place)
            else:
                _count(contents.lost, "link to a file that is not in the shard", name)
        return contents, tar.offset


def _only_zeros(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    return not file.read().strip(b"\0")


def _crc(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    return zlib.crc32(file.read(size))


def index_path(shard: Path) -> Path:
    """Return the path of the index next to a shard."""
    return shard.with_name(shard.name + ".index.json")


def _index_paths(shard: Path) -> tuple[Path, Path]:
    """Return the path next to the shard, and the one for a shard in a read-only folder."""
    name = hashlib.sha256(str(shard.resolve()).encode(errors="surrogateescape")).hexdigest()
    return index_path(shard), cache_folder() / "index" / f"{name}.json"


def _size(shard: Path) -> int:
    """Return the bytes of a shard. Raise UserError if it is not a file."""
    try:
        status = shard.stat()
    except OSError as e:
        raise UserError(f"the shard {shard} cannot be read ({e.strerror}); {FETCH_AGAIN}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"the shard {shard} is not a file; remove it from the folder")
    return status.st_size


def peek_index(shard: Path) -> Head | None:
    """Return the head of a shard's index, or None if there is no index of a shard of this size."""
    size = _size(shard)
    heads = (ShardIndex.peek(path) for path in _index_paths(shard))
    return next((head for head in heads if head and head.size == size), None)


def open_index(shard: Path) -> ShardIndex:
    """Return the index next to a shard, or else build one and save it there, or in the cache folder if that is read-only.

    Raises:
        UserError: if the shard is not the indexed one or is damaged, or its index can be saved nowhere.
    """
    size = _size(shard)
    for path in _index_paths(shard):
        index = ShardIndex.load(path)
        if index is None:
            continue
        if index.size != size:
            raise UserError(
                f"{shard} has {size:,} bytes where its index says {index.size:,}: it is truncated or was altered; "
                f"fetch it again, or delete {path} if the new content is intended"
            )
        return index
    return build_index(shard)


def build_index(shard: Path) -> ShardIndex:
    """Scan a shard and save its index, see `open_index`."""
    index = ShardIndex.scan(shard)
    here, elsewhere = _index_paths(shard)
    try:
        index.save(here)
    except OSError:
        try:
            elsewhere.parent.mkdir(parents=True, exist_ok=True)
            index.save(elsewhere)
        except OSError as e:
            raise UserError(
                f"cannot write the index of {shard}, neither next to it nor to {elsewhere.parent} ({reason_of(e)}); "
                "set VLP_CACHE to a folder that can be written"
            ) from None
    return index


@dataclass(frozen=True)
class RawSample:
    """One sample as it is stored in its source.

    Args:
        key: Name within the shard.
        shard: Index of the shard in its source.
        row: Row of the sample in its shard.
        source_row: Row of the sample in its source, in the order of the shards.
        image: The encoded image; None in a file of texts.
        captions: Captions that are not blank; empty for a sample without text.
        image_id: Equal for samples that show the same image, or have the same sentence.
        meta: All fields of the json.
        texts: Further views of a text.
        label: Class number; None without classes.
        images: Further encoded images of the sample (NLVR2 has two).
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
    """Shards at one location.

    Args:
        shards: Location, see `list_shards`.
        weight: Share of the stream relative to the weights of other sources. None stands for the number of samples.
        label: Field of a sample's json with its class number. None for samples without classes.
    """

    shards: str
    weight: float | None = None
    label: str | None = None

    def at(self, location: str) -> Source:
        """Return a source of other shards. The weight belongs to these shards, so it is dropped."""
        return Source(location, label=self.label)

    def open(self) -> ShardReader:
        """Open the shards. Raises UserError if there are none, or one is missing or damaged."""
        return ShardReader(self.shards, self.label)


class ShardReader:
    """All shards of one source. Indexes and file handles are opened on first use and not pickled.

    Raises:
        UserError: if there is no shard, or one is missing, truncated, altered, or not a tar.
    """

    def __init__(self, location: str, label: str | None = None, listing: Listing | None = None):
        """Open the shards.

        Args:
            listing: Result of `list_shards`, if it is known.
        """
        self.location, self.label = location, label
        listing = listing or list_shards(location)
        self.shards, self.unread = listing.shards, listing.unread
        self.ignored_manifests = {folder: m.problem for folder, m in listing.manifests.items() if m.problem}
        listed = {shard: line for manifest in listing.manifests.values() for shard, line in manifest.shards.items()}
        self.listed = [listed.get(shard) for shard in self.shards]
        counts = [self._count(*pair) for pair in zip(self.shards, self.listed)]
        self.sizes, self.lost = [samples for samples, _ in counts], [lost for _, lost in counts]
        self._open_caches()

    @staticmethod
    def _count(shard: str, listed: Listed | None) -> tuple[int, int]:
        """Return the samples and the lost members of a shard, by its index or else by manifest.json.

        Both are verified when the index is loaded. A remote shard is not fetched for its number of samples.
        """
        if listed is None:
            local = fetch(shard)
            index = peek_index(local) or open_index(local)
            return (index.samples, index.lost) if isinstance(index, Head) else (len(index), _total(index.lost))
        if is_remote(shard):
            return listed.samples, 0
        if (size := _size(Path(shard))) != listed.size:
            raise UserError(
                f"{shard} has {size:,} bytes where manifest.json says {listed.size:,}: it is truncated or was altered; "
                "fetch it again, or run `vlp data pack` again"
            )
        head = peek_index(Path(shard))
        if head and head.samples != listed.samples:  # one of the two is wrong
            index = build_index(Path(shard))
            head = Head(len(index), index.size, _total(index.lost))
            if head.samples != listed.samples:
                raise _altered(shard, "manifest.json")
        return listed.samples, head.lost if head else 0

    def _open_caches(self) -> None:
        self._offsets = [0, *accumulate(self.sizes)]
        # the order alternates between the shards of a group: keep as many indexes as that, about 100 MB at most
        mean = max(1, len(self) // len(self.shards))
        self.index = lru_cache(maxsize=2 + 2 * GROUP_SAMPLES // mean)(self._index)
        self._handle = lru_cache(maxsize=128)(self._open)

    def _open(self, shard: int) -> BinaryIO:
        return open_regular(self.local(shard))

    def local(self, shard: int) -> Path:
        """Return the file of a shard, which is fetched first if it is remote."""
        return fetch(self.shards[shard])

    def _index(self, shard: int) -> ShardIndex:
        local, listed = self.local(shard), self.listed[shard]
        index = open_index(local)
        if listed and listed.sha256 != index.sha256:  # one of the two is wrong
            index = build_index(local)
            if listed.sha256 != index.sha256:
                raise _altered(local, "manifest.json")
        if len(index) != self.sizes[shard]:
            raise _altered(local, "manifest.json" if listed else "its index")
        return index

    def __len__(self) -> int:
        return self._offsets[-1]

    def locate(self, source_row: int) -> tuple[int, int]:
        """Return (shard, row) of a row of the source."""
        shard = bisect_right(self._offsets, source_row) - 1  # the last of equal offsets: empty shards are skipped
        return shard, source_row - self._offsets[shard]

    def notes(self) -> list[str]:
        """Return one line for each kind of input at the location that is not read."""
        found = [f"{folder}/manifest.json is ignored: {problem}" for folder, problem in self.ignored_manifests.items()]
        if self.unread:
            names = ", ".join(map(os.path.basename, self.unread[:3]))
            found.append(f"{len(self.unread)} files next to the shards are not read ({names}); unpack them")
        if total := sum(self.lost):
            shard = next(n for n, lost in enumerate(self.lost) if lost)
            reason, (_, example) = next(iter(self.index(shard).lost.items()))
            found.append(
                f"{total:,} keys or members of {self.location} are not read, the first {example!r}: {reason}; "
                "`vlp data check` lists the reasons"
            )
        return found

    def _read(self, shard: int, member: Sequence[int]) -> bytes:
        offset, size, crc = member
        handle = self._handle(
            shard
        )  # a local reference: if two threads open it at once, the cache keeps only one handle
        try:
            data = os.pread(handle.fileno(), size, offset)
        except OSError as e:
            raise UserError(f"the shard {self.shards[shard]} cannot be read ({e.strerror})") from None
        if zlib.crc32(data) != crc:
            raise BadSample("altered since the shard was indexed (CRC-32 differs)")
        return data

    def quarantine_entry(self, shard: int, row: int, reason: str) -> dict:
        """Return a line of quarantine.jsonl."""
        name = os.path.basename(self.shards[shard])
        return {"source": self.location, "shard": name, "key": self.index(shard).keys[row], "reason": reason}

    def read(self, shard: int, row: int) -> RawSample:
        """Read a sample.

        Raises:
            BadSample: if its bytes changed, or its json is not that of a sample.
        """
        members = self.index(shard).members[row]
        image = self._read(shard, next(members[e] for e in IMAGES if e in members))
        meta = parse_object(self._read(shard, members["json"])) if "json" in members else {}
        captions = next((texts for name in CAPTIONS if (texts := _captions(meta.get(name)))), ())
        if not captions and "txt" in members:
            captions = _captions(_text_file(self._read(shard, members["txt"])))
        label = None
        if self.label is not None:
            label = meta.get(self.label)
            if not isinstance(label, int) or isinstance(label, bool) or label < 0:
                raise BadSample(f"{self.label} is {label!r}, which is not a class number")
        key, source_row = self.index(shard).keys[row], self._offsets[shard] + row
        return RawSample(key, shard, row, source_row, image, captions, content_id(image), meta, label=label)

    def fingerprint(self) -> dict:
        """Return what the order of the samples depends on, and their content if a manifest has its hash.

        It does not depend on the location, so that shards may move between the sessions of a run.
        """
        listed = [line.sha256 if line else None for line in self.listed]
        names = [os.path.basename(shard) for shard in self.shards]
        digest = hashlib.sha256(json.dumps([names, self.sizes, listed]).encode()).hexdigest()
        return {"shards": len(self.shards), "samples": len(self), "sha256": digest}

    def __getstate__(self):
        cached = ("_offsets", "index", "_handle")
        return {name: value for name, value in vars(self).items() if name not in cached}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_caches()


def _total(counted: Counted) -> int:
    return sum(count for count, _ in counted.values())


def _altered(shard: str | Path, where: str) -> UserError:
    return UserError(
        f"{shard} is not the shard that {where} says: it was altered; delete it with its index and fetch it again, or run "
        "`vlp data pack` again"
    )


def _text_file(data: bytes) -> str:
    """Decode a KEY.txt. Raises BadSample if it is not UTF-8."""
    if b"\0" in data:  # valid UTF-8, but in practice UTF-16 without a byte-order mark
        raise BadSample("its text has NUL bytes; it may be UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample("its text is not UTF-8") from None


def _captions(found: Any) -> tuple[str, ...]:
    """Return the texts of a text or a list that are not blank. Other values count as missing."""
    values: Iterable[Any] = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return tuple(filter(None, (as_text(value) for value in values if isinstance(value, str))))
