"""Packing of image-caption pairs into webdataset tar shards, each with an index, and one manifest.json for all.

Every shard is a pure function of its pairs. It is written to a temporary file, synced and renamed, so that a second run
after an interruption keeps the finished shards and continues with the rest. The manifest is written last: a folder with a
manifest is complete.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path

from PIL import Image

from vlp.data.image import FORMATS, decode
from vlp.data.preparing.formats import Pair
from vlp.data.reading.index import ShardIndex, index_path
from vlp.data.reading.locations import locked
from vlp.data.workers import end_with_parent, most_workers
from vlp.errors import BadSample, UserError
from vlp.files import read_regular, why_not_local, write_atomically, writing_atomically

PLAN_BYTES = 1 << 28


@dataclass(frozen=True)
class Packing:
    """Settings of packing.

    Args:
        shard_samples: Pairs per shard.
        max_side: Longest side in pixels. A larger image is scaled down and stored as JPEG (quality 95). None stores all
            bytes unchanged.
        max_pixels: Limit of H * W; an image with more is left out.
    """

    shard_samples: int = 1000
    max_side: int | None = None
    max_pixels: int = 64_000_000

    def __post_init__(self):
        if self.shard_samples < 1 or (self.max_side is not None and self.max_side < 1):
            raise UserError(
                f"{self.shard_samples} samples per shard and a longest side of {self.max_side} pixels are not possible; "
                "give whole numbers from 1 on"
            )


@dataclass(frozen=True)
class PackedShard:
    """Entry of manifest.json, and the quarantine entries of the shard."""

    shard: str
    samples: int
    size: int
    sha256: str
    bad: tuple[dict, ...] = ()


def _encode(pair: Pair, packing: Packing) -> tuple[str, bytes]:
    """Return extension and bytes of the image. Raise BadSample if it could not be used for training."""
    try:
        data = read_regular(pair.image)
    except OSError as e:
        raise BadSample(f"cannot be read ({e.strerror}{why_not_local(pair.listed, '--image-root')})") from None
    pixels = decode(data, packing.max_pixels)
    if packing.max_side and max(pixels.shape[:2]) > packing.max_side:
        image = Image.fromarray(pixels)
        image.thumbnail((packing.max_side, packing.max_side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        return "jpg", buffer.getvalue()
    kind = Image.open(io.BytesIO(data), formats=FORMATS).format
    # MPO is Pillow's name for a JPEG with a second image in it, which phones write
    return {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "PPM": "ppm", "TIFF": "tiff"}[kind], data


def _write_shard(path: Path, pairs: Sequence[Pair], first: int, plan: str, packing: Packing) -> PackedShard:
    """Write one shard and its index. ``first`` is the number of its first pair, from which the samples' ``index`` counts."""
    bad = []
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            # webdataset.TarWriter imports torch: each worker would peak at 542 MB and start in 1.1 s, not 44 MB and 0.2 s
            with tarfile.open(fileobj=f, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for number, pair in enumerate(pairs, first):
                    captions = [c.strip() for c in pair.captions if c.strip()]
                    try:
                        if pair.problem or not captions:
                            raise BadSample(pair.problem or "no caption")
                        extension, image = _encode(pair, packing)
                    except BadSample as e:
                        name = pair.image or pair.source  # a row without an image is named by its line
                        bad.append({"shard": path.name, "key": pair.key, "image": name, "reason": str(e)})
                        continue
                    meta = {**pair.extra, "captions": captions, "index": number, "source": pair.source}
                    # half of a surrogate pair, which JSON can express, becomes "?"
                    text = json.dumps(meta, ensure_ascii=False).encode(errors="replace")
                    for name, data in ((extension, image), ("json", text)):
                        info = tarfile.TarInfo(f"{pair.key}.{name}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            f.flush()
            os.fsync(f.fileno())
        index = ShardIndex.scan(temporary)
        done = PackedShard(path.name, len(index), index.size, index.sha256, tuple(bad))
        index.save(index_path(path))
        write_atomically(_plan_path(path), json.dumps({"plan": plan, "done": asdict(done)}).encode())
        os.replace(temporary, path)  # last, so that every tar has a plan
        return done
    finally:
        temporary.unlink(missing_ok=True)


def _plan_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.plan.json")


def _read_plan(shard: Path) -> dict:
    """Return the fingerprint and the result of a shard that an earlier run wrote, or {} if there is none."""
    try:
        plan = json.loads(read_regular(_plan_path(shard), PLAN_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _finished(shard: Path, plan: str) -> PackedShard | None:
    """Return the result of an earlier run with this plan, if its shard is complete."""
    read = _read_plan(shard)
    if read.get("plan") != plan or not shard.exists() or not index_path(shard).exists():
        return None
    try:
        done = PackedShard(**{**read["done"], "bad": tuple(read["done"]["bad"])})
    except (KeyError, TypeError):
        return None
    return done if shard.stat().st_size == done.size else None


def _plan(pairs: Sequence[Pair], packing: Packing) -> str:
    """Return the fingerprint of a shard's pairs and settings."""
    text = json.dumps([asdict(packing), [_planned(pair) for pair in pairs]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _planned(pair: Pair) -> dict:
    """Return the fields of a pair that its sample depends on, a problem only if it has one: plans of before have no such field."""
    return {k: v for k, v in vars(pair).items() if k != "listed" and (k != "problem" or v)}


def pack(
    pairs: Iterable[Pair],
    folder: Path,
    packing: Packing | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Pack the pairs in their order and return the manifest.

    Images that cannot be read or decoded, pairs without a caption, and rows with a problem are left out and listed in
    ``quarantine.jsonl``.

    Args:
        pairs: Pairs that can be iterated over more than once, as `vlp.data.preparing.formats.read_pairs` returns them, are
            not kept in memory. Others become a list.
        workers: Number of processes, of which no more are started than there are shards or `most_workers` allows.
        progress: Called with (packed pairs, pairs) after each shard.

    Raises:
        UserError: if there is no pair, none is usable, the folder contains other shards, or it cannot be written (no
            permission, disk full).
    """
    pairs, packing = pairs if isinstance(pairs, Sized) else list(pairs), packing or Packing()
    if workers < 1:
        raise UserError(f"{workers} worker processes cannot pack; give at least 1")
    if not len(pairs):
        raise UserError("no pair to pack: the annotations name no image (of this split); check the file and --split")
    try:
        with locked(folder / ".pack.lock"):  # a second run waits for the first, and then keeps its shards
            _check_shards(folder, pairs, packing)
            for left in folder.glob(".*shard-*.tmp"):  # of a run that was killed
                left.unlink()
            shards, captions = _write_all(folder, pairs, packing, workers, progress)
            if not any(shard.samples for shard in shards):
                first = next(_bad(folder, shards))
                for path in (folder / shard.shard for shard in shards):
                    for written in (path, index_path(path), _plan_path(path)):
                        written.unlink(missing_ok=True)
                raise UserError(
                    f"none of the {len(pairs)} pairs is usable; the first: {first['image']!r}: {first['reason']}; "
                    "check the annotations and --image-root"
                )
            return _write_manifest(folder, packing, shards, captions)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run it again: it continues" if full else "check the folder and its permissions"
        raise UserError(f"cannot write {folder}: {e.strerror or e}; {advice}") from None


def _chunks(folder: Path, pairs: Iterable[Pair], packing: Packing) -> Iterator[tuple[Path, int, list[Pair]]]:
    """Yield the path of each shard, the number of its first pair, and its pairs."""
    iterator = iter(pairs)
    for number in count():
        if not (chunk := list(islice(iterator, packing.shard_samples))):
            return
        yield folder / f"shard-{number:06d}.tar", number * packing.shard_samples, chunk


def _check_shards(folder: Path, pairs: Iterable[Pair], packing: Packing) -> None:
    """Raise UserError if the folder contains shards of other pairs."""
    others = set(folder.glob("*.tar"))
    if others:
        for shard, _, chunk in _chunks(folder, pairs, packing):
            if shard in others and _read_plan(shard).get("plan") == _plan(chunk, packing):
                others.remove(shard)
    if others:
        raise UserError(f"{min(others)} contains other pairs than these; pack into another folder, or remove it")


def _bad(folder: Path, shards: Iterable[PackedShard]) -> Iterator[dict]:
    """Yield the quarantine entries of all shards, which are stored with their plans."""
    return (entry for shard in shards for entry in _read_plan(folder / shard.shard)["done"]["bad"])


def _write_manifest(folder: Path, packing: Packing, shards: list[PackedShard], captions: int) -> dict:
    left_out = 0
    with writing_atomically(folder / "quarantine.jsonl") as file:
        for entry in _bad(folder, shards):
            file.write(json.dumps(entry).encode() + b"\n")
            left_out += 1
    manifest = {
        "format": "webdataset",
        "samples": sum(s.samples for s in shards),
        "captions": captions,
        "left_out": left_out,
        "packing": asdict(packing),
        "shards": [{k: v for k, v in asdict(s).items() if k != "bad"} for s in shards],
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _write_all(
    folder: Path,
    pairs: Collection[Pair],
    packing: Packing,
    workers: int,
    progress: Callable[[int, int], None],
) -> tuple[list[PackedShard], int]:
    """Write the shards that are not there yet.

    Returns:
        All shards, without their quarantine entries, and the number of captions in them.
    """
    shards: dict[str, PackedShard] = {}
    packed, captions, total = 0, 0, len(pairs)

    def finish(done: PackedShard, chunk: list[Pair]) -> None:
        nonlocal packed, captions
        left_out = {bad["key"] for bad in done.bad}
        captions += sum(1 for p in chunk if p.key not in left_out for caption in p.captions if caption.strip())
        shards[done.shard] = replace(done, bad=())
        packed += len(chunk)

    waiting: dict[Future[PackedShard], list[Pair]] = {}

    def await_one() -> None:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            finish(future.result(), waiting.pop(future))
            progress(packed, total)

    most = most_workers(workers, -(-total // packing.shard_samples))
    with ProcessPoolExecutor(most, initializer=end_with_parent) as pool:
        try:
            progress(0, total)
            for path, first, chunk in _chunks(folder, pairs, packing):
                plan = _plan(chunk, packing)
                if done := _finished(path, plan):
                    finish(done, chunk)
                    progress(packed, total)
                    continue
                if len(waiting) == 2 * most:
                    await_one()
                waiting[pool.submit(_write_shard, path, chunk, first, plan, packing)] = chunk
            while waiting:
                await_one()
        except BrokenProcessPool:
            raise UserError(
                "a packing process was killed, perhaps because memory ran out; run it again with fewer --workers: it continues"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [shards[name] for name in sorted(shards, key=lambda name: (len(name), name))], captions
