"""Index of a webdataset tar shard: the offsets of its members, stored next to it.

The members of a sample share a key, the name up to its first dot, as in webdataset. A sample is an image (`IMAGES`) with json or
text (`TEXTS`) and a class (`CLASSES`). Further dots are allowed, see `samples_of`. Members are selected by an allow-list of
extensions, those that webdataset's writer encodes without pickle. Members that are not read are counted.

An index is a hint: it is checked when it is read, and one that is wrong is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from vlp.data.reading.locations import LEAST_SAMPLE_BYTES, cache_folder, reason_of
from vlp.errors import UserError
from vlp.files import CHUNK, open_regular, read_regular, write_atomically

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "tiff", "tif", "img", "image")
JSON = ("json", "jsn", "json.gz", "jsn.gz")
PLAIN_TEXTS = ("txt", "text", "txt.gz", "text.gz")
TEXTS = JSON + PLAIN_TEXTS
CLASSES = ("cls", "cls.gz")
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|p[pgbn]m|tiff?)$", re.IGNORECASE)
INDEX_VERSION = 3
OLD_VERSION = 2  # which read fewer extensions. 1 had no checksum and did not read keys with dots
OLD_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "json", "txt")
HEAD = re.compile(
    rb'(\{"version": (\d{1,3}), "samples": (\d{1,12}), "size": (\d{1,15}), "lost": (\d{1,12}), '
    rb'"body": "([0-9a-f]{64})"), "crc32": (\d{1,10})\}\n'
)
HEAD_BYTES = 300  # more than any head
MOST_PADDING = 1 << 20  # bytes of zeros at the end of a tar; writers pad to 10 KiB
MOST_REASONS = 20  # of members that are not read
MOST_EXTENSIONS = 5  # that a reason lists
INDEX_SUFFIX = ".index.json"
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

    @property
    def head(self) -> Head:
        return Head(len(self), self.size, sum(count for count, _ in self.lost.values()))

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
        head = (
            f'{{"version": {INDEX_VERSION}, "samples": {len(self)}, "size": {self.size}, "lost": {self.head.lost}, '
            f'"body": "{hashlib.sha256(body).hexdigest()}"'
        ).encode()
        write_atomically(path, head + b', "crc32": %d}\n' % zlib.crc32(head) + body + b"\n")

    @classmethod
    def load(cls, path: Path, version: int = INDEX_VERSION) -> ShardIndex | None:
        """Read a saved index. Return None if there is none of the version, or it is damaged or contradicts itself."""
        head = cls.peek(path, version)
        if head is None:
            return None
        try:
            return cls.parse(read_regular(path, head.size + MOST_PADDING), version)
        except OSError:
            return None

    @classmethod
    def parse(cls, data: bytes, version: int = INDEX_VERSION) -> ShardIndex | None:
        """Parse the bytes of a saved index, see `load`."""
        first, _, body = data.partition(b"\n")
        head, body = parse_head(first + b"\n", version), body.removesuffix(b"\n")
        try:
            if head is None or HEAD.match(first + b"\n")[6] != hashlib.sha256(body).hexdigest().encode():
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _is_consistent(self, head: Head) -> bool:
        return (
            type(self.size) is int
            and len(self.keys) == len(self.members) == head.samples
            and self.size == head.size
            and all(isinstance(key, str) for key in self.keys)
            and all(any(e in sample for e in IMAGES) for sample in self.members)
            and all(
                e in IMAGES + TEXTS + CLASSES
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

    @property
    def is_complete_of_old_version(self) -> bool:
        """Whether the shard has no member that an index of `OLD_VERSION` did not read and one of today does."""
        reasons = [*self.lost, *self.ignored]
        names = [re.findall(r"further \.(\S+) of a sample|\((.+)\)", reason) for reason in reasons]
        listed = [(further or several).split(", ") for found in names for further, several in found]
        if "other" in reasons or any(len(extensions) == MOST_EXTENSIONS for extensions in listed):
            return False  # it does not name all of them
        read_today = {e.rpartition(".")[2] for e in (*IMAGES, *TEXTS, *CLASSES)}
        return (read_today - set(OLD_EXTENSIONS)).isdisjoint(chain.from_iterable(listed))

    @staticmethod
    def peek(path: Path, version: int = INDEX_VERSION) -> Head | None:
        """Read the head of a saved index. Return None if there is none of the version, or it is damaged."""
        try:
            with open_regular(path) as file:
                return parse_head(file.read(HEAD_BYTES), version)
        except OSError:
            return None


def parse_head(start: bytes, version: int = INDEX_VERSION) -> Head | None:
    """Parse the first line of an index. Return None if it is not of the version, or is damaged."""
    found = HEAD.match(start)
    if found is None or int(found[2]) != version or zlib.crc32(found[1]) != int(found[7]):
        return None
    head = Head(*(int(found[n]) for n in (3, 4, 5)))
    return head if head.samples * LEAST_SAMPLE_BYTES <= head.size else None


def load_index(path: Path) -> ShardIndex | None:
    """Read a saved index, also one of `OLD_VERSION` that misses no member, which is saved again as one of today.

    Return None if there is none, or it is damaged.
    """
    if index := ShardIndex.load(path):
        return index
    old = ShardIndex.load(path, OLD_VERSION)
    if old is None or not old.is_complete_of_old_version:
        return None
    with suppress(OSError):  # a folder that cannot be written keeps the old one
        old.save(path)
    return old


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
        key, kind = os.path.join(os.path.dirname(name), stem), split_suffix(suffix)
        if kind in self.latest.get(key, (kind,)):  # a new key, or one that begins again, which makes two samples
            self.latest[key] = {}
            self.groups.append((key, self.latest[key]))
        self.latest[key][kind] = place

    def samples(self) -> tuple[list[tuple[str, dict[str, Place]]], Counted, Counted]:
        """Return (key, {extension: place}) of each sample, and the members that are lost and ignored."""
        found = []
        for key, members in self.groups:
            samples, used = samples_of(key, members)
            found += samples
            if samples:
                for infix, extension in sorted(members.keys() - used):
                    kind = "image" if extension in IMAGES else "text" if extension in TEXTS else f".{extension}"
                    _count(self.ignored, f"further {kind} of a sample", ".".join(filter(None, (key, infix, extension))))
                continue
            _count(self.ignored if is_failed_download(members) else self.lost, no_image_reason(members), key)
        return found, self.lost, self.ignored


def split_suffix(suffix: str) -> tuple[str, str]:
    """Split the part of a member's name after the key into infix and extension: ``1.JPG`` into ``1`` and ``jpg``."""
    infix, _, extension = suffix.lower().rpartition(".")
    if extension == "gz":
        infix, _, inner = infix.rpartition(".")
        extension = f"{inner}.gz".lstrip(".")
    return infix, extension


def is_failed_download(members: Iterable[tuple[str, str]]) -> bool:
    """Return whether a key has only texts: img2dataset writes only KEY.json for a failed download."""
    return {extension for _, extension in members} <= set(TEXTS)


def no_image_reason(members: Iterable[tuple[str, str]]) -> str:
    extensions = sorted({extension or "no extension" for _, extension in members})
    return f"no image that can be read ({', '.join(extensions[:MOST_EXTENSIONS])})"


T = TypeVar("T")


def samples_of(
    key: str, members: dict[tuple[str, str], T]
) -> tuple[list[tuple[str, dict[str, T]]], set[tuple[str, str]]]:
    """Divide the members of a key into samples.

    Images with a text of the same infix are samples (``a.1.jpg``, ``a.1.txt``, ``a.2.jpg``, ``a.2.txt``). Otherwise the key
    is one sample, of its first image and its only text (``a.input.jpg``, ``a.output.txt``). Without texts, every image is a
    sample if all have an infix. A class belongs to the image or text of its infix, or without an infix to all samples of the key.

    Args:
        members: (infix, extension) to the member, whatever stands for it.

    Returns:
        (key, {extension: member}) of each sample, and the members that the samples contain.
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
        kinds += [(i, e) for i in (image, text, "") for e in CLASSES if (i, e) in members][:1]
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
    return shard.with_name(shard.name + INDEX_SUFFIX)


def _index_paths(shard: Path) -> tuple[Path, Path]:
    """Return the path next to the shard, and the one for a shard in a read-only folder."""
    name = hashlib.sha256(str(shard.resolve()).encode(errors="surrogateescape")).hexdigest()
    return index_path(shard), cache_folder() / "index" / f"{name}.json"


def file_size(shard: Path) -> int:
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
    size = file_size(shard)
    heads = (ShardIndex.peek(path) for path in _index_paths(shard))
    return next((head for head in heads if head and head.size == size), None)


def open_index(shard: Path) -> ShardIndex:
    """Return the index next to a shard, or else build one and save it there, or in the cache folder if that is read-only.

    Raises:
        UserError: if the shard is not the indexed one or is damaged, or its index can be saved nowhere.
    """
    size = file_size(shard)
    for path in _index_paths(shard):
        index = load_index(path)
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
