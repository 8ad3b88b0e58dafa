"""The training stream at ALIGN's scale, simulated: 1.8 billion pairs, batches of 16,384, 128 nodes.

Everything is computed by the order function of training. Only the shards do not exist: their sizes come from a manifest.json
of the usual form. Times are CPU times, which do not depend on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import in_fresh_process, main, resident_mib
from vlp.data.order import MixtureOrder, SourceOrder
from vlp.data.reading.locations import read_manifest
from vlp.data.stream import Positions

SIZES = {
    "pairs": 1_800_000_000,
    "shard_samples": 10_000,
    "pair_bytes": 20_000,  # assumed: an image of about 300 pixels as JPEG, with its caption
    "batch": 16_384,
    "nodes": 128,
    "readers": 128,
    "steps": 400,
}
SMALL = {
    "pairs": 4_000,
    "shard_samples": 10,
    "pair_bytes": 20_000,
    "batch": 64,
    "nodes": 4,
    "readers": 8,
    "steps": 5,
}


def measure(pairs: int, shard_samples: int, pair_bytes: int, batch: int, nodes: int, readers: int, steps: int) -> dict:
    """Measure the start and a seek in a process of its own, and follow the first node for some steps."""
    with tempfile.TemporaryDirectory() as name:
        write_manifest(Path(name), pairs, shard_samples, pair_bytes)
        found = in_fresh_process(_of_process, name, batch, nodes, readers, steps)
    epoch_steps = pairs / batch
    touched, without = found.pop("shards_touched"), found.pop("shards_without_readers")
    return {
        "pairs": pairs,
        "shards": pairs // shard_samples,
        "batch": batch,
        "nodes": nodes,
        "readers": readers,
        "steps_of_an_epoch": round(epoch_steps),
        **found,
        "node_reads_gb_an_epoch": round(pairs / nodes * pair_bytes / 1e9),
        "node_reads_mb_a_step": round(batch / nodes * pair_bytes / 1e6, 1),
        "node_touches_shards": f"{touched} in {steps} steps",
        "with_one_reader_it_touches": f"{without} in {steps} steps",
    }


def write_manifest(folder: Path, pairs: int, shard_samples: int, pair_bytes: int) -> None:
    """Write the manifest.json that `vlp data pack` would have written."""
    size = shard_samples * pair_bytes
    shards = [
        {"shard": f"shard-{n:06d}.tar", "samples": shard_samples, "size": size, "sha256": f"{n:064x}"}
        for n in range(pairs // shard_samples)
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": "webdataset", "shards": shards}))


def _of_process(folder: str, batch: int, nodes: int, readers: int, steps: int) -> dict:
    before = resident_mib("VmRSS")
    began = time.process_time()
    sizes = np.array([line.samples for line in read_manifest(folder).shards.values()])
    read = time.process_time()
    listing = resident_mib("VmRSS")
    order = MixtureOrder([SourceOrder(sizes, 0, readers)], [None], 0)
    for position in next(iter(Positions(0, batch, batch, 0, nodes, readers))):
        order.locate(position)
    first = time.process_time()
    seeks = []
    for step in np.random.default_rng(0).integers(5 * order.size // batch, size=20).tolist():
        fresh = MixtureOrder([SourceOrder(sizes, 0, readers)], [None], 0)
        positions = next(iter(Positions(step * batch, (step + 1) * batch, batch, 0, nodes, readers)))
        start = time.process_time()
        for position in positions:
            fresh.locate(position)
        seeks.append(1000 * (time.process_time() - start))
    start = time.process_time()
    batches = [
        [order.locate(position).shard for position in positions]
        for positions in Positions(0, steps * batch, batch, 0, nodes, readers)
    ]
    located = time.process_time() - start
    memory = resident_mib("VmRSS") - listing
    single = MixtureOrder([SourceOrder(sizes, 0)], [None], 0)
    without = {
        single.locate(position).shard
        for positions in Positions(0, steps * batch, batch, 0, nodes, 1)
        for position in positions
    }
    return {
        "read_manifest_cpu_s": round(read - began, 2),
        "manifest_mb": round(listing - before, 1),
        "order_and_first_batch_cpu_s": round(first - read, 3),
        "order_mb": round(memory, 1),
        "seek_to_a_batch_cpu_ms_median": round(statistics.median(seeks), 1),
        "seek_to_a_batch_cpu_ms_max": round(max(seeks), 1),
        "cpu_microseconds_a_sample": round(1e6 * located / sum(map(len, batches)), 1),
        "shards_open_at_once": max(len(set(shards)) for shards in batches),
        "shards_touched": len(set().union(*batches)),
        "shards_without_readers": len(without),
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
