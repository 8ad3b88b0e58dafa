"""Random access to webdataset tar shards. An index next to each shard contains the offsets of its members.

Our own shards have captions and source in the json. Those of img2dataset and open_clip are read as they are and indexed on
first use, see `vlp.data.reading.index`. Nothing in a shard is unpickled or executed. Index and manifest are hints: they are
checked when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from vlp.data.order import GROUP_SAMPLES
from vlp.data.reading.cache import fetch, open_copy, peek_remote_index
from vlp.data.reading.index import (
    CLASSES,
    IMAGES,
    JSON,
    PLAIN_TEXTS,
    ShardIndex,
    build_index,
    file_size,
    open_index,
    peek_index,
)
from vlp.data.reading.locations import Listed, Listing, is_remote, list_shards
from vlp.data.reading.tables import as_text, parse_object
from vlp.errors import BadSample, UserError
from vlp.specs.fields import setting

COUNTING_THREADS = 16
MAX_UNPACKED_BYTES = 1 << 24  # of a member that is compressed
CAPTIONS = ("captions", "caption", "text")  # fields of a json with captions: ours, img2dataset's, others'


def content_id(data: bytes) -> int:
    """Return an id of 63 bits that equal contents share: samples with the same image have the same id in all sources."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


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
        label: Field of a sample's json with its class number. "cls" is also the member ``KEY.cls``, webdataset's convention.
            None for samples without classes.
        together: Consecutive samples that a batch contains together, in order of the shards' names: 2 for the minimal pairs
            of ``vlp data world``. Hard negatives then include the related sample. It must divide the number of samples.
    """

    shards: str
    weight: float | None = None
    label: str | None = None
    together: int = setting(1, least=1)

    @property
    def location(self) -> str:
        """The shards, under the name that all kinds of sources have for their data."""
        return self.shards

    def at(self, location: str) -> Source:
        """Return a source of other shards. The weight belongs to these shards, so it is dropped."""
        return Source(location, label=self.label, together=self.together)

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
        with ThreadPoolExecutor(COUNTING_THREADS) as pool:  # a remote shard without a manifest is asked for its index
            counts = list(pool.map(self._count, self.shards, self.listed))
        self.sizes, self.lost = [samples for samples, _ in counts], [lost for _, lost in counts]
        self._open_caches()

    @staticmethod
    def _count(shard: str, listed: Listed | None) -> tuple[int, int]:
        """Return the samples and the lost members of a shard, by its index or else by manifest.json.

        Both are verified when the index is loaded. A remote shard is not fetched for its number of samples.
        """
        if listed is None:
            if is_remote(shard) and (head := peek_remote_index(shard)):
                return head.samples, head.lost
            local = fetch(shard)
            head = peek_index(local) or open_index(local).head
            return head.samples, head.lost
        if is_remote(shard):
            return listed.samples, 0
        if (size := file_size(Path(shard))) != listed.size:
            raise UserError(
                f"{shard} has {size:,} bytes where manifest.json says {listed.size:,}: it is truncated or was altered; "
                "fetch it again, or run `vlp data pack` again"
            )
        head = peek_index(Path(shard))
        if head and head.samples != listed.samples:  # one of the two is wrong
            head = build_index(Path(shard)).head
            if head.samples != listed.samples:
                raise _altered(shard, "manifest.json")
        return listed.samples, head.lost if head else 0

    def _open_caches(self) -> None:
        self._offsets = [0, *accumulate(self.sizes)]
        # the order alternates between the shards of a group: keep as many indexes as that, about 100 MB at most
        mean = max(1, len(self) // len(self.shards))
        self.index = lru_cache(maxsize=2 + 2 * GROUP_SAMPLES // mean)(self._index)
        # a copy of a remote shard cannot be removed while it is open, so only the latest is kept open
        self._handle = lru_cache(maxsize=1 if any(map(is_remote, self.shards)) else 128)(self._open)

    def _open(self, shard: int) -> BinaryIO:
        return open_copy(self.shards[shard], self.listed[shard])

    def local(self, shard: int) -> Path:
        """Return the file of a shard, which is fetched first if it is remote."""
        return fetch(self.shards[shard], self.listed[shard])

    def _index(self, shard: int) -> ShardIndex:
        if not is_remote(self.shards[shard]):
            return self._index_of(Path(self.shards[shard]), shard)
        with open_copy(self.shards[shard], self.listed[shard]):  # the copy stays until it is indexed
            return self._index_of(self.local(shard), shard)

    def _index_of(self, local: Path, shard: int) -> ShardIndex:
        index, listed = open_index(local), self.listed[shard]
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
        key, members = self.index(shard).keys[row], self.index(shard).members[row]
        place = SamplePlace(key, shard, row, self._offsets[shard] + row)
        return parse_sample(place, members, lambda extension: self._read(shard, members[extension]), self.label)

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


class SamplePlace(NamedTuple):
    """The first fields of a `RawSample`."""

    key: str
    shard: int
    row: int
    source_row: int


def parse_sample(
    place: SamplePlace, extensions: Collection[str], read: Callable[[str], bytes], label: str | None
) -> RawSample:
    """Return the sample of a shard's members.

    Args:
        extensions: Extensions of its members, as `vlp.data.reading.index.samples_of` selects them.
        read: Returns the bytes of the member with an extension. Members that are not needed are not read.
        label: See `Source`.

    Raises:
        BadSample: if a member is not that of a sample.
    """

    def find(kinds: Sequence[str]) -> bytes | None:
        """Return the content of the first member of the kinds, or None if there is none."""
        extension = next((e for e in kinds if e in extensions), None)
        return None if extension is None else _unpack(extension, read(extension))

    image, record = find(IMAGES), find(JSON)
    meta = {} if record is None else parse_object(record)
    captions = next((texts for name in CAPTIONS if (texts := _captions(meta.get(name)))), ())
    if not captions and (text := find(PLAIN_TEXTS)) is not None:
        captions = _captions(_text_file(text))
    number = None
    if label is not None:
        member = find(CLASSES) if label == "cls" else None
        number = meta.get(label) if member is None else _class_file(member)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise BadSample(f"{label} is {number!r}, which is not a class number")
    return RawSample(*place, image, captions, content_id(image), meta, label=number)


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


def _class_file(data: bytes) -> int | str:
    """Return the class number of a KEY.cls, or its text if it is something else."""
    text = data[:40].decode(errors="replace").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text


def _unpack(extension: str, data: bytes) -> bytes:
    """Return the content of a member, decompressed if its extension says so.

    Raises:
        BadSample: if it is damaged, or over the limit.
    """
    if not extension.endswith(".gz"):
        return data
    decompress = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # of gzip
    try:
        content = decompress.decompress(data, MAX_UNPACKED_BYTES)
    except zlib.error as e:
        raise BadSample(f"its {extension} is not gzip ({e})") from None
    if not decompress.eof:
        raise BadSample(f"its {extension} is truncated, or has more than {MAX_UNPACKED_BYTES:,} bytes unpacked")
    return content


def _captions(found: Any) -> tuple[str, ...]:
    """Return the texts of a text or a list that are not blank. Other values count as missing."""
    values: Iterable[Any] = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return tuple(filter(None, (as_text(value) for value in values if isinstance(value, str))))
