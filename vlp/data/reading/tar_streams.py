"""Tar streams, which are read from their beginning to their end without an index: outputs of commands, endless archives.

Opening, grouping and shuffling are webdataset's, which is imported where a stream is read. Its reader of tar files is not used,
because it ends a damaged shard without an error. Members are selected and parsed as those of indexed shards: nothing is
unpickled.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from subprocess import TimeoutExpired
from typing import Any, BinaryIO, ClassVar, NamedTuple

from braceexpand import UnbalancedBracesError

from vlp.data.reading.index import (
    CLASSES,
    IMAGES,
    MOST_PADDING,
    TEXTS,
    is_failed_download,
    no_image_reason,
    samples_of,
    split_suffix,
)
from vlp.data.reading.locations import SCHEME, expand_braces, is_remote, list_shards, reason_of
from vlp.data.reading.shards import RawSample, SamplePlace, parse_sample
from vlp.errors import BadSample, UserError
from vlp.files import CHUNK
from vlp.specs.fields import setting

COMMAND = "pipe:"
SCHEMES = ("http", "https", "gs", "hf")  # that webdataset.gopen reads; others need a command
LARGEST_MEMBER = 1 << 30  # bytes
PATIENCE = 5.0  # seconds that a command has to end after its output could not be used
BROKEN_PIPE = (-13, 141)  # exit code of a process, and of a shell, that writes to a closed pipe


@dataclass(frozen=True)
class WebDatasetStream:
    """Shards that are read from beginning to end, without an index: for data that cannot be indexed.

    They are commands that write a tar, endless archives, and shards that are read over a network without a copy. Each data worker
    reads its own shards. Use `Source` for all other shards: it alone promises that a resumed run sees the samples that the
    uninterrupted run would have seen, that the order does not depend on the number of processes and workers, and that
    every sample occurs once in an epoch. A stream gives the same order again only for the same seed, processes and workers.

    Args:
        urls: Shards: a local location as of `Source`, the URL of a shard with one of `SCHEMES`, or ``pipe:COMMAND`` with a shell
            command that writes a tar. Braces are expanded, also those of a command, and several are joined by ``::``. Tars may
            be compressed.
        resampled: Whether each worker draws its shards with replacement, independently of the others. Otherwise the shards are
            permuted in each pass and dealt to the workers of all processes.
        shuffle: Encoded samples in the shuffle buffer of each worker. 0 keeps the order within a shard.
        shuffle_seed: Seed of the order. None follows the experiment's seed.
        label: Class number of a sample, see `Source`.
        epoch_samples: Samples that count as an epoch. None counts the whole run as one epoch.
        inexact_resume: Whether the run may be resumed although the stream then begins at a new place, so that samples may be
            repeated or skipped.
    """

    urls: str
    resampled: bool = False
    shuffle: int = setting(1000, least=0)
    shuffle_seed: int | None = setting(None, least=0)
    label: str | None = None
    epoch_samples: int | None = setting(None, least=1)
    inexact_resume: bool = False

    # of all sources: it is the only one of its run, and related samples may be in different workers
    weight: ClassVar[None] = None
    together: ClassVar[int] = 1

    @property
    def location(self) -> str:
        return self.urls

    def at(self, location: str) -> WebDatasetStream:
        """Return the same stream of other shards."""
        return replace(self, urls=location)

    @property
    def has_commands(self) -> bool:
        """Whether reading the stream runs shell commands."""
        return any(part.startswith(COMMAND) for part in self.urls.split("::"))

    @property
    def commands_to_name(self) -> list[str]:
        """Assignments that a command line needs if it reads the experiment from a JSON file, whose commands are not run."""
        return [f"data.train.0.urls={self.urls}"] if self.has_commands else []

    def open(self) -> list[str]:
        """Return the shards: absolute paths, URLs and commands. Nothing is read or run.

        Raises:
            UserError: if there is none, or a URL has another scheme.
        """
        return [shard for part in self.urls.split("::") for shard in _expand(part)]


def _expand(part: str) -> list[str]:
    is_command, scheme = part.startswith(COMMAND), SCHEME.match(part)
    if not is_command and not is_remote(part):
        return list_shards(part).shards
    if is_command and not part.removeprefix(COMMAND).strip():
        raise UserError("pipe: has no command; write pipe:COMMAND, a shell command that writes a tar")
    if scheme and scheme[1] not in SCHEMES:
        raise UserError(
            f"cannot stream {part}: {scheme[1]}:// is not one of {', '.join(SCHEMES)}; give a command that writes the shard, such "
            f"as pipe:aws s3 cp s3://BUCKET/SHARD.tar -"
        )
    try:
        return expand_braces(part, escape=False)
    except UnbalancedBracesError:  # of the shell's own
        return [part]


def shortened(url: str) -> str:
    """Return a shard's name for a message: the end of a long path or URL, the beginning of a long command."""
    if len(url) <= 120:
        return url
    return f"{url[:117]}..." if url.startswith(COMMAND) else f"...{url[-117:]}"


class StreamedSample(NamedTuple):
    """Members of one key that make a sample.

    Attributes:
        shard: Path, URL or command that writes the tar.
        key: Name within the shard.
        members: Extension to content, None for a member without content of its own.
        problem: Why there is no sample; "" if there is one.
    """

    shard: str
    key: str
    members: Mapping[str, bytes | None]
    problem: str = ""

    def parse(self, row: int, label: str | None) -> RawSample:
        """Return the sample.

        Raises:
            BadSample: if a member is not that of a sample.
        """
        if self.problem:
            raise BadSample(self.problem)
        return parse_sample(SamplePlace(self.key, 0, row, row), self.members, self._content, label)

    def _content(self, extension: str) -> bytes:
        content = self.members[extension]
        if content is None:
            raise BadSample(f"its {extension} is a link or a sparse file, which a stream cannot read")
        return content


def read_samples(shard: str) -> Iterator[StreamedSample]:
    """Yield the samples of a shard in its order.

    Raises:
        UserError: if the shard cannot be opened, its command fails, or it is damaged or truncated.
    """
    from webdataset.tariterators import group_by_keys

    members = ({"fname": name, "data": data, "__url__": shard} for name, data in read_members(shard))
    groups = group_by_keys(members)
    while True:
        try:
            group = next(groups, None)
        except ValueError as e:
            raise UserError(f"{shortened(shard)}: {e.args[0]}; write each member once") from None
        if group is None:
            return
        key = group.pop("__key__")
        found = {split_suffix(suffix): data for suffix, data in group.items() if suffix != "__url__"}
        samples, _ = samples_of(key, found)
        for name, chosen in samples:
            yield StreamedSample(shard, name, chosen)
        if not samples and not is_failed_download(found):
            yield StreamedSample(shard, key, {}, no_image_reason(found))


class _Header(tarfile.TarInfo):
    """Header that must be whole. At a damaged one tarfile would end as if the archive did."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.InvalidHeaderError:
            raise tarfile.ReadError("a header is damaged, or it is not a tar") from None
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise tarfile.ReadError("it is truncated") from None


def read_members(shard: str) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and content of the members of a tar, None for the content of members that are not read.

    Raises:
        UserError: see `read_samples`.
    """
    stream = _open(shard)
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # tarfile would keep all of them
                if not info.isdir():
                    yield info.name, _content(tar, info)
            _check_padding(tar)
    except GeneratorExit:
        _stop(stream)
        raise
    except Exception as e:  # damage makes tarfile and the decompressors raise anything from OSError to zlib.error
        failure = _close(stream)
        raise UserError(f"{shortened(shard)}: {failure or reason_of(e)}; repair it, or remove it from urls") from None
    if failure := _close(stream):
        raise UserError(f"{shortened(shard)}: {failure}; repair it, or remove it from urls")


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | None:
    _, extension = split_suffix(os.path.basename(info.name).partition(".")[2])
    if not info.isreg() or info.issparse() or extension not in IMAGES + TEXTS + CLASSES:
        return None
    if not 0 <= info.size <= LARGEST_MEMBER:
        raise tarfile.ReadError(f"{info.name[:80]!r} has {info.size:,} bytes, over the limit of {LARGEST_MEMBER:,}")
    return tar.extractfile(info).read()


def _check_padding(tar: tarfile.TarFile) -> None:
    """Check that only zeros follow the end of the archive: data after them would be lost."""
    padding = 0
    while chunk := tar.fileobj.read(CHUNK):
        padding += len(chunk)
        if padding > MOST_PADDING or chunk.strip(b"\0"):
            raise tarfile.ReadError("data follow the end of the archive")


def _open(shard: str) -> BinaryIO | Any:
    from webdataset.gopen import gopen

    try:
        return gopen(shard)
    except Exception as e:  # of a missing program, or of a client of its own
        raise UserError(f"cannot open {shortened(shard)}: {reason_of(e)}") from None


def _close(stream: BinaryIO | Any) -> str | None:
    """Close a stream. Return how the command that wrote it failed, or None."""
    from webdataset.gopen import Pipe

    if not isinstance(stream, Pipe):
        stream.close()
        return None
    stream.stream.close()
    try:
        code = stream.proc.wait(PATIENCE)
    except TimeoutExpired:  # it does not write, so that it does not notice
        _stop(stream)
        return None
    if code in (*stream.ignore_status, *BROKEN_PIPE):
        return None
    program = stream.args[0][0]
    name = "the command" if isinstance(program, str) else program[0]
    return f"{name} ended with exit code {code}"


def _stop(stream: BinaryIO | Any) -> None:
    """Close a stream whose rest is not needed, and end its command."""
    from webdataset.gopen import Pipe

    if not isinstance(stream, Pipe):
        stream.close()
        return
    stream.stream.close()
    stream.proc.kill()
    stream.proc.wait()
