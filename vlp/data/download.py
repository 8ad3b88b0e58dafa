"""Download of remote shards before the training stream needs them, by a process next to the data workers."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ctypes import c_int64

from vlp.data.order import MixtureOrder
from vlp.data.reading.cache import fetch
from vlp.data.reading.locations import Listed, is_remote
from vlp.data.reading.shards import ShardReader
from vlp.data.workers import end_with_parent
from vlp.errors import UserError

CONNECTIONS = 4  # downloads at a time of one process
POLL = 0.05  # seconds between looks at how far the training is

RemoteShards = dict[tuple[int, int], tuple[str, Listed | None]]  # (source, shard) -> its URL and entry in manifest.json


def remote_shards(readers: Sequence[object]) -> RemoteShards:
    """Return the remote shards of the readers of sources."""
    return {
        (source, number): (shard, listed)
        for source, reader in enumerate(readers)
        if isinstance(reader, ShardReader)
        for number, (shard, listed) in enumerate(zip(reader.shards, reader.listed))
        if is_remote(shard)
    }


@contextmanager
def downloading_ahead(
    shards: RemoteShards, order: MixtureOrder, batches: Iterable[Sequence[int]], ahead: int
) -> Iterator[c_int64]:
    """Run a process that downloads the shards of the batches in the order in which they are needed.

    A download that fails is left to the data worker that needs the shard, which reports the error.

    Args:
        batches: Positions of the batches of this process.
        ahead: Most shards that are downloaded and that only later batches than the current one need.

    Yields:
        The number of batches that were taken, which the caller must keep up to date.
    """
    taken = multiprocessing.Value(c_int64, 0, lock=False)
    process = multiprocessing.Process(target=_download, args=(shards, order, batches, ahead, taken), daemon=True)
    process.start()
    try:
        yield taken
    finally:
        process.kill()  # SIGTERM may have the handler of the training
        process.join()


def _download(
    shards: RemoteShards, order: MixtureOrder, batches: Iterable[Sequence[int]], ahead: int, taken: c_int64
) -> None:
    end_with_parent((signal.SIGINT, signal.SIGTERM))
    needed: deque[int] = deque()  # first batch that needs each of the latest shards
    seen: set[tuple[int, int, int]] = set()  # (source, epoch, shard)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for number, positions in enumerate(batches):
            for position in positions:
                ref = order.locate(position)
                key = (ref.source, ref.epoch, ref.shard)
                if key in seen or (ref.source, ref.shard) not in shards:
                    continue
                seen.add(key)
                while len(needed) >= ahead:
                    if needed[0] < taken.value:
                        needed.popleft()
                    else:
                        time.sleep(POLL)
                needed.append(number)
                pool.submit(_fetch, *shards[ref.source, ref.shard])


def _fetch(shard: str, listed: Listed | None) -> None:
    with suppress(UserError):
        fetch(shard, listed)
