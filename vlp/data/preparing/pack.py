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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from vlp.data.image import FORMATS, decode
from vlp.data.preparing.formats import Pair
from vlp.data.reading.locations import locked
from vlp.data.reading.shards import ShardIndex, index_path
from vlp.data.workers import end_with_parent, most_workers
from vlp.errors import BadSample, UserError
from vlp.files import read_regular, why_not_local, write_atomically

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
    return {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}[kind], data


def _write_shard(path: Path, pairs: Sequence[Pair], first: int, plan: str, packing: Packing) -> PackedShard:
    """Write one shard and its index. ``first`` is the number of its first pair, from which the samples' ``index`` counts."""
    bad = []
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
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
        workers: Number of processes, of which no more are started than there are shards or `most_workers` allows.
        progress: Called with (packed pairs, pairs) after each shard.

    Raises:
        UserError: if there is no pair, none is usable, the folder contains other shards, or it cannot be written (no
            permission, disk full).
    """
    pairs, packing = list(pairs), packing or Packing()
    if workers < 1:
        raise UserError(f"{workers} worker processes cannot pack; give at least 1")
    if not pairs:
        raise UserError("no pair to pack: the annotations name no image (of this split); check the file and --split")
    chunks = [pairs[i : i + packing.shard_samples] for i in range(0, len(pairs), packing.shard_samples)]
    plans = {folder / f"shard-{n:06d}.tar": _plan(chunk, packing) for n, chunk in enumerate(chunks)}
    try:
        with locked(folder / ".pack.lock"):  # a second run waits for the first, and then keeps its shards
            for shard in sorted(folder.glob("*.tar")):
                if shard not in plans or _read_plan(shard).get("plan") != plans[shard]:
                    raise UserError(f"{shard} contains other pairs than these; pack into another folder, or remove it")
            for left in folder.glob(".*shard-*.tmp"):  # of a run that was killed
                left.unlink()
            shards = _write_all(plans, chunks, packing, workers, progress)
            bad = [b for s in shards for b in s.bad]
            if len(bad) == len(pairs):
                for shard in plans:
                    for path in (shard, index_path(shard), _plan_path(shard)):
                        path.unlink(missing_ok=True)
                raise UserError(
                    f"none of the {len(pairs)} pairs is usable; the first: {bad[0]['image']!r}: {bad[0]['reason']}; "
                    "check the annotations and --image-root"
                )
            return _write_manifest(folder, pairs, packing, shards, bad)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run it again: it continues" if full else "check the folder and its permissions"
        raise UserError(f"cannot write {folder}: {e.strerror or e}; {advice}") from None


def _write_manifest(
    folder: Path, pairs: list[Pair], packing: Packing, shards: list[PackedShard], bad: list[dict]
) -> dict:
    left_out = {b["key"] for b in bad}
    write_atomically(folder / "quarantine.jsonl", b"".join(json.dumps(b).encode() + b"\n" for b in bad))
    manifest = {
        "format": "webdataset",
        "samples": sum(s.samples for s in shards),
        "captions": sum(1 for p in pairs if p.key not in left_out for c in p.captions if c.strip()),
        "left_out": len(bad),
        "packing": asdict(packing),
        "shards": [{k: v for k, v in asdict(s).items() if k != "bad"} for s in shards],
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _write_all(
    plans: dict[Path, str],
    chunks: list[list[Pair]],
    packing: Packing,
    workers: int,
    progress: Callable[[int, int], None],
) -> list[PackedShard]:
    shards = {n: done for n, (path, plan) in enumerate(plans.items()) if (done := _finished(path, plan))}
    packed, total = sum(len(chunks[n]) for n in shards), sum(map(len, chunks))
    progress(packed, total)
    with ProcessPoolExecutor(most_workers(workers, len(plans) - len(shards)), initializer=end_with_parent) as pool:
        waiting = {
            pool.submit(_write_shard, path, chunks[n], n * packing.shard_samples, plan, packing): n
            for n, (path, plan) in enumerate(plans.items())
            if n not in shards
        }
        try:
            for future in as_completed(waiting):
                n = waiting[future]
                shards[n] = future.result()
                packed += len(chunks[n])
                progress(packed, total)
        except BrokenProcessPool:
            raise UserError(
                "a packing process was killed, perhaps because memory ran out; run it again with fewer --workers: it continues"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [shards[n] for n in range(len(chunks))]
