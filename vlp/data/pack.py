"""Image-text pairs -> webdataset tar shards, each with an index, and one manifest.json for all.

Every shard is a pure function of its pairs: written to a temporary file, synced and renamed, so that a second run after
an interruption finds the finished shards and goes on with the rest. The manifest comes last: a folder that has one is
complete.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from vlp.data.formats import Pair
from vlp.data.image import decode
from vlp.data.shards import ShardIndex, index_path, write_atomically
from vlp.errors import BadSample, UserError


@dataclass(frozen=True)
class Packing:
    """How pairs become shards.

    Args:
        shard_samples: pairs a shard.
        max_side: pixels; a picture with a longer side is scaled down and stored as JPEG (quality 95). None = bytes as they are.
        max_pixels: a picture with more is left out.
    """

    shard_samples: int = 1000
    max_side: int | None = None
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class PackedShard:
    """A line of manifest.json, and what was left out of the shard."""

    shard: str
    samples: int
    size: int
    sha256: str
    bad: tuple[dict, ...] = ()


def _encode(pair: Pair, packing: Packing) -> tuple[str, bytes]:
    """(extension, bytes) of the picture. Raises BadSample where it cannot be used later either."""
    try:
        data = Path(pair.image).read_bytes()
    except OSError as e:
        raise BadSample(f"cannot be read ({e.strerror})") from None
    pixels = decode(data, packing.max_pixels)
    if packing.max_side and max(pixels.shape[:2]) > packing.max_side:
        image = Image.fromarray(pixels)
        image.thumbnail((packing.max_side, packing.max_side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        return "jpg", buffer.getvalue()
    kind = Image.open(io.BytesIO(data)).format
    return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], data


def _write_shard(path: Path, pairs: Sequence[Pair], first: int, plan: str, packing: Packing) -> PackedShard:
    """Writes one shard and its index. ``first`` numbers the first pair among all, which is the samples' ``index``."""
    bad = []
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            with tarfile.open(fileobj=f, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for number, pair in enumerate(pairs, first):
                    captions = [c.strip() for c in pair.captions if c.strip()]
                    try:
                        if not captions:
                            raise BadSample("no caption")
                        extension, image = _encode(pair, packing)
                    except BadSample as e:
                        bad.append({"shard": path.name, "key": pair.key, "image": pair.image, "reason": str(e)})
                        continue
                    meta = {"captions": captions, "index": number, "source": pair.source, **pair.extra}
                    for name, data in ((extension, image), ("json", json.dumps(meta, ensure_ascii=False).encode())):
                        info = tarfile.TarInfo(f"{pair.key}.{name}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            f.flush()
            os.fsync(f.fileno())
        index = ShardIndex.scan(temporary)
        done = PackedShard(path.name, len(index), index.size, index.sha256, tuple(bad))
        index.save(index_path(path))
        write_atomically(_plan_path(path), json.dumps({"plan": plan, "done": asdict(done)}).encode())
        os.replace(temporary, path)  # last: a tar is always one whose plan is known
        return done
    finally:
        temporary.unlink(missing_ok=True)


def _plan_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.plan.json")


def _read_plan(shard: Path) -> dict:
    """What an earlier run says of the shard: its fingerprint and what it wrote; {} where it says nothing."""
    try:
        return json.loads(_plan_path(shard).read_bytes())
    except (OSError, ValueError):
        return {}


def _finished(shard: Path, plan: str) -> PackedShard | None:
    """What an earlier run wrote for this very plan, if it is still there whole."""
    read = _read_plan(shard)
    if read.get("plan") != plan or not shard.exists() or not index_path(shard).exists():
        return None
    done = PackedShard(**{**read["done"], "bad": tuple(read["done"]["bad"])})
    return done if shard.stat().st_size == done.size else None


def _plan(pairs: Sequence[Pair], packing: Packing) -> str:
    """Fingerprint of what a shard is to hold."""
    text = json.dumps([asdict(packing), [asdict(p) for p in pairs]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def pack(
    pairs: Iterable[Pair],
    folder: Path,
    packing: Packing | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Packs the pairs in their order and returns the manifest.

    Pictures that cannot be read or decoded and pairs without a caption are left out and listed in ``quarantine.jsonl``.

    Args:
        workers: processes.
        progress: called with (pairs packed, pairs) after each shard.

    Raises:
        UserError: if there is no pair, none is usable, or the folder cannot be written (no permission, disk full).
    """
    pairs, packing = list(pairs), packing or Packing()
    if not pairs:
        raise UserError("no pair to pack: the annotations name no picture (of this split); check the file and --split")
    chunks = [pairs[i : i + packing.shard_samples] for i in range(0, len(pairs), packing.shard_samples)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        planned = {folder / f"shard-{n:06d}.tar": _plan(chunk, packing) for n, chunk in enumerate(chunks)}
        for shard in sorted(folder.glob("*.tar")):
            if _read_plan(shard).get("plan") != planned.get(shard):
                raise UserError(f"{shard} holds other pairs than these; pack into another folder, or remove it")
        shards = _write_all(list(planned), list(planned.values()), chunks, packing, workers, progress)
        bad = [b for s in shards for b in s.bad]
        if len(bad) == len(pairs):
            raise UserError(
                f"none of the {len(pairs)} pairs is usable; the first: {bad[0]['image']}: {bad[0]['reason']}"
            )
        left_out = {b["key"] for b in bad}
        write_atomically(folder / "quarantine.jsonl", b"".join(json.dumps(b).encode() + b"\n" for b in bad))
        manifest = {
            "format": "webdataset",
            "samples": sum(s.samples for s in shards),
            "captions": sum(len(p.captions) for p in pairs if p.key not in left_out),
            "left_out": len(bad),
            "packing": asdict(packing),
            "shards": [{k: v for k, v in asdict(s).items() if k != "bad"} for s in shards],
        }
        write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    except OSError as e:
        advice = "free some space and run it again: it goes on" if e.errno == errno.ENOSPC else "check the folder"
        raise UserError(f"cannot write {folder}: {e.strerror or e}; {advice}") from None
    return manifest


def _write_all(
    paths: list[Path],
    plans: list[str],
    chunks: list[list[Pair]],
    packing: Packing,
    workers: int,
    progress: Callable[[int, int], None],
) -> list[PackedShard]:
    total = sum(map(len, chunks))
    shards = {n: done for n, (path, plan) in enumerate(zip(paths, plans)) if (done := _finished(path, plan))}
    with ProcessPoolExecutor(max_workers=workers) as pool:
        waiting = {
            pool.submit(_write_shard, paths[n], chunks[n], n * packing.shard_samples, plans[n], packing): n
            for n in range(len(chunks))
            if n not in shards
        }
        progress(sum(len(chunks[n]) for n in shards), total)
        try:
            for future in as_completed(waiting):
                shards[waiting[future]] = future.result()
                progress(sum(len(chunks[n]) for n in shards), total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [shards[n] for n in range(len(chunks))]
