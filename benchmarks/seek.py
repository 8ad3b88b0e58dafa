"""From nothing to the sample at any position of 1,000 shards: open the source, find the position, read the bytes."""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import main
from vlp.data.order import MixtureOrder, SourceOrder
from vlp.data.reading.index import ShardIndex, index_path
from vlp.data.reading.shards import ShardReader

SIZES = {"shards": 1000, "samples": 1000}
SMALL = {"shards": 3, "samples": 4}


def measure(shards: int, samples: int) -> dict:
    """Milliseconds of a seek in a freshly built order, at 20 positions drawn over five epochs."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), shards, samples)
        began = time.perf_counter()
        reader = ShardReader(folder)
        opened = time.perf_counter() - began
        seeks = []
        for position in np.random.default_rng(0).integers(5 * shards * samples, size=20):
            fresh = ShardReader.__new__(ShardReader)  # no index open, no file open, no permutation made
            fresh.__setstate__(reader.__getstate__())
            began = time.perf_counter()
            order = MixtureOrder([SourceOrder(fresh.sizes, seed=0)], [None], seed=0)
            draw = order.locate(int(position))
            fresh.read(draw.shard, draw.row)
            seeks.append(1000 * (time.perf_counter() - began))
    return {
        "shards": shards,
        "samples": shards * samples,
        "seek_ms_median": round(statistics.median(seeks), 2),
        "seek_ms_max": round(max(seeks), 2),
        "goal_ms": 50,
        "open_ms": round(1000 * opened, 1),
    }


def write_shards(folder: Path, shards: int, samples: int) -> None:
    """One shard of tiny samples under 1,000 names: a seek costs the same whatever the pictures hold."""
    first = folder / "shard-000000.tar"
    with tarfile.open(first, "w") as tar:
        for n in range(samples):
            for name, data in (("jpg", b"x" * 100), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{n:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index = ShardIndex.scan(first)
    for n in range(shards):
        shard = folder / f"shard-{n:06d}.tar"
        if n:
            shard.hardlink_to(first)
        index.save(index_path(shard))


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
