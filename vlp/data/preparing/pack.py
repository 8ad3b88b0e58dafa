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
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from vlp.data.image import FORMATS, decode
from vlp.data.preparing.formats import Pair
from vlp.data.reading.locations import locked
from vlp.data.reading.shards import ShardIndex, index_path, write_atomically
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

    def __post_init__(self):
        if self.shard_samples < 1 or (self.max_side is not None and self.max_side < 1):
            raise UserError(
                f"{self.shard_samples} samples a shard and a longest side of {self.max_side} pixels cannot be; "
                "give whole numbers from 1 on"
            )


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
    kind = Image.open(io.BytesIO(data), formats=FORMATS).format
    # MPO is what Pillow calls a JPEG with a second picture in it, as phones write them
    return {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}[kind], data


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
                    meta = {**pair.extra, "captions": captions, "index": number, "source": pair.source}
                    # half of a surrogate pair, which a json file can hold, is no text: "?"
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
    text = json.dumps([asdict(packing), [vars(p) for p in pairs]], sort_keys=True)
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
        UserError: if there is no pair, none is usable, the folder holds other shards, or it cannot be written (no
            permission, disk full).
    """
    pairs, packing = list(pairs), packing or Packing()
    if workers < 1:
        raise UserError(f"{workers} worker processes cannot pack; give at least 1")
    if not pairs:
        raise UserError("no pair to pack: the annotations name no picture (of this split); check the file and --split")
    chunks = [pairs[i : i + packing.shard_samples] for i in range(0, len(pairs), packing.shard_samples)]
    plans = {folder / f"shard-{n:06d}.tar": _plan(chunk, packing) for n, chunk in enumerate(chunks)}
    try:
        with locked(folder / ".pack.lock"):  # a second run waits for the first, and then finds its shards
            for shard in sorted(folder.glob("*.tar")):
                if shard not in plans or _read_plan(shard).get("plan") != plans[shard]:
                    raise UserError(f"{shard} holds other pairs than these; pack into another folder, or remove it")
            for left in folder.glob(".*shard-*.tmp"):  # by a run that was killed
                left.unlink()
            shards = _write_all(plans, chunks, packing, workers, progress)
            bad = [b for s in shards for b in s.bad]
            if len(bad) == len(pairs):
                for shard in plans:
                    for path in (shard, index_path(shard), _plan_path(shard)):
                        path.unlink(missing_ok=True)
                raise UserError(
                    f"none of the {len(pairs)} pairs is usable; the first: {bad[0]['image']}: {bad[0]['reason']}; "
                    "check the annotations and --image-root"
                )
            return _write_manifest(folder, pairs, packing, shards, bad)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run it again: it goes on" if full else "check the folder and its permissions"
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
    with ProcessPoolExecutor(max_workers=workers, initializer=_obey_parent) as pool:
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
                "a packing process was killed, perhaps for want of memory; run it again with fewer --workers: it goes on"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [shards[n] for n in range(len(chunks))]


def _obey_parent() -> None:
    """Ctrl-C is the parent's to act on, and a worker whose parent was killed ends at once instead of waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
