"""Training from a slow HTTP server that fails at random: share of waiting, bytes that a node downloads, size of its cache."""

from __future__ import annotations

import http.server
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

import vlp.data.reading.locations as locations
from benchmarks.common import main
from vlp.data.augment import Resize
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import Packing, pack
from vlp.data.preprocess import Preprocess
from vlp.data.reading.shards import Source
from vlp.data.stream import TrainDataset, training_loader

SIZES = {
    "shards": 64,
    "samples": 64,
    "nodes": 4,
    "readers": 4,
    "batch": 64,
    "step_seconds": 0.1,
    "latency": 0.2,
    "bytes_a_second": 1_000_000,
    "failures": 0.2,
    "cached_shards": 12,
}
SMALL = SIZES | {"shards": 8, "samples": 4, "nodes": 2, "readers": 2, "batch": 8, "step_seconds": 0.01, "latency": 0.0}


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serve files slowly. Some answers are errors, and some end before their content does."""

    def __init__(self, *arguments, latency: float, bytes_a_second: float, failures: float, sent: Counter, **named):
        self.latency, self.bytes_a_second, self.failures, self.sent = latency, bytes_a_second, failures, sent
        super().__init__(*arguments, **named)

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        time.sleep(self.latency)
        if random.random() < self.failures / 2:
            self.send_error(503)
            return
        super().do_GET()

    def copyfile(self, source, outputfile):
        data = source.read()
        if random.random() < self.failures / 2:
            data = data[: len(data) // 2]
        for start in range(0, len(data), 1 << 16):
            part = data[start : start + (1 << 16)]
            time.sleep(len(part) / self.bytes_a_second)
            outputfile.write(part)
            self.sent[os.path.basename(self.path)] += len(part)


@contextmanager
def serve(folder: Path, latency: float = 0.0, bytes_a_second: float = 1e9, failures: float = 0.0) -> Iterator:
    """Serve a folder. Yield its URL and the bytes that were sent of each file."""
    sent: Counter[str] = Counter()
    handler = partial(
        _Handler,
        directory=str(folder),
        latency=latency,
        bytes_a_second=bytes_a_second,
        failures=failures,
        sent=sent,
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def make_shards(folder: Path, shards: int, samples: int) -> int:
    """Pack shards of noise and return the bytes of all of them."""
    from PIL import Image

    rng, pairs = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    for n in range(shards * samples):
        path = folder / "images" / f"{n}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        pairs.append(Pair(str(path), (f"number {n}",), str(n)))
    manifest = pack(pairs, folder / "shards", Packing(samples))
    return sum(shard["size"] for shard in manifest["shards"])


def cached_bytes(folder: Path) -> int:
    """Return the bytes of all files of a cache that are there at this moment."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def measure(
    shards: int,
    samples: int,
    nodes: int,
    readers: int,
    batch: int,
    step_seconds: float,
    latency: float,
    bytes_a_second: float,
    failures: float,
    cached_shards: int,
) -> dict:
    """Run an epoch of the first node for several settings, in which a step is a pause of ``step_seconds``."""
    random.seed(0)
    locations.FIRST_WAIT = 0.1
    with tempfile.TemporaryDirectory() as name:
        total = make_shards(Path(name), shards, samples)
        local = str(Path(name) / "shards")
        results = {
            "local shards": _epoch(local, Path(name) / "none", shards * samples, batch, nodes, readers, 0, step_seconds)
        }
        budget = cached_shards * total // shards  # holds a shard a reader, those ahead, and a few more
        for ahead in (0, readers):
            with serve(Path(name) / "shards", latency, bytes_a_second, failures) as (url, sent):
                folder = Path(name) / f"cache-{ahead}"
                os.environ |= {"VLP_CACHE": str(folder), "VLP_CACHE_BYTES": str(budget)}
                found = _epoch(url, folder, shards * samples, batch, nodes, readers, ahead, step_seconds)
                found["downloaded_share"] = round(sum(sent.values()) / total, 3)
            results[f"prefetch_shards={ahead}"] = found
    return {
        "shards": shards,
        "bytes": total,
        "nodes": nodes,
        "failing_answers": failures,
        "budget": budget,
        "node_share": 1 / nodes,
    } | results


def _epoch(
    url: str, folder: Path, size: int, batch: int, nodes: int, readers: int, ahead: int, step_seconds: float
) -> dict:
    preprocess = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear")
    source = Source(url)
    dataset = TrainDataset([source], (Resize(mode="squash"),), preprocess, None, 1, 10_000, 0, readers=readers)
    for order in dataset.order.orders:
        order.group_samples = readers * max(order.shard_sizes)  # a shard after the other, as of larger data
    began, waited, largest, stop = time.monotonic(), 0.0, 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not stop.wait(0.02):
            largest = max(largest, cached_bytes(folder))

    watcher = threading.Thread(target=watch)
    loader = training_loader(dataset, 0, size // batch * batch, batch, 0, nodes, workers=1, prefetch_shards=ahead)
    started = time.monotonic()
    for number, _ in enumerate(loader):
        if number == 0:
            watcher.start()  # after the workers were forked
        else:
            waited += time.monotonic() - started
        time.sleep(step_seconds)
        started = time.monotonic()
    stop.set()
    watcher.join()
    return {
        "seconds": round(time.monotonic() - began, 1),
        "waiting": round(waited / (time.monotonic() - began), 3),
        "largest_cache": largest,
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
