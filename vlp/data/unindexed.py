"""Training samples of a `vlp.data.reading.tar_streams.WebDatasetStream`."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from ctypes import c_bool
from itertools import count, islice

import torch
from torch.utils.data import DataLoader, IterableDataset

from vlp.data.order import keyed_rng
from vlp.data.reading.tar_streams import StreamedSample, WebDatasetStream, read_samples, shortened
from vlp.data.stream import Loaded, Sample, TrainingData, loader_options, raise_errors
from vlp.data.workers import end_when
from vlp.errors import BadSample, UserError


class StreamDataset(TrainingData):
    """Samples of a stream. Every data worker of every process reads its own shards and makes whole batches of them.

    Args:
        source: The stream.
        epoch_samples: Samples that count as an epoch.
        settings: Further arguments of `TrainingData`.
    """

    readers = ()  # nothing of a stream is known before it is read

    def __init__(self, source: WebDatasetStream, epoch_samples: int, *settings):
        super().__init__(*settings)
        self.source, self.epoch_samples, self.shards = source, epoch_samples, source.open()

    def __len__(self) -> int:
        return self.epoch_samples

    def notes(self) -> list[str]:
        return [
            f"{shortened(self.source.urls)} is a stream of {len(self.shards):,} shards: a resumed run begins it at a new place"
        ]

    def loader(
        self,
        start: int,
        stop: int,
        size: int,
        rank: int,
        world: int,
        workers: int,
        pin_memory: bool = False,
        prefetch_shards: int = 0,
    ) -> Iterator[Loaded]:
        """Yield this process's part of the micro-batches.

        Args:
            start: Position at which the run starts or is resumed. The stream begins at another place for another position.
            prefetch_shards: Not used, as a worker reads its shards itself.
        """
        batches = _Batches(self, start, size // world, rank, world)
        loader = DataLoader(batches, batch_size=None, **loader_options(workers, pin_memory))
        items = islice(raise_errors(loader), (stop - start) // size)
        try:
            yield from items
        finally:
            batches.closed.value = True  # before ``items`` is freed, which waits for the workers

    def samples(self, start: int, consumer: int, consumers: int) -> Iterator[StreamedSample]:
        """Yield the samples of one of the workers of all processes, in their order, without end.

        Raises:
            UserError: if a shard cannot be read, or none has a sample.
        """
        import webdataset

        seed = self.seed if self.source.shuffle_seed is None else self.source.shuffle_seed
        samples = self._read(self._order(seed, start, consumer, consumers))
        if not self.source.shuffle:
            return samples
        rng = random.Random(int(keyed_rng(seed, 6, start, consumer).integers(1 << 62)))
        return webdataset.shuffle(self.source.shuffle, rng=rng)(samples)

    def _order(self, seed: int, start: int, consumer: int, consumers: int) -> Iterator[str]:
        """Yield the shards of one worker, without end."""
        import webdataset

        if self.source.resampled:
            drawn = int(keyed_rng(seed, 7, start, consumer).integers(1 << 31))
            shards = webdataset.ResampledShards(self.shards, worker_seed=lambda: drawn, deterministic=True)
            return (shard["url"] for shard in shards)
        passes = (number for n in count() for number in keyed_rng(seed, 8, start, n).permutation(len(self.shards)))
        # dealt across passes, so that all workers read equally many
        return (self.shards[number] for number in islice(passes, consumer, None, consumers))

    def _read(self, shards: Iterator[str]) -> Iterator[StreamedSample]:
        empty = 0
        for shard in shards:
            found = False
            for sample in read_samples(shard):
                found = True
                yield sample
            empty = 0 if found else empty + 1
            if empty >= len(self.shards):
                raise UserError(f"no shard of {shortened(self.source.urls)} has an image that can be read")

    def sample_or_next(self, samples: Iterator[tuple[int, StreamedSample]], start: int, bad: list[dict]) -> Sample:
        """Return the next sample that can be used.

        Args:
            samples: (row, sample) each.
            start: See `loader`.
            bad: Receives the quarantine entries of the samples before it.

        Raises:
            UserError: if `TRIES` samples in a row are bad.
        """
        for row, streamed in islice(samples, self.TRIES):
            try:
                raw = streamed.parse(row, self.source.label)
                return self.prepare(raw, keyed_rng(self.seed, 9, start, row), row, f"0/{row}/{raw.key}")
            except BadSample as e:
                shard = shortened(streamed.shard)
                bad.append({"source": self.source.urls, "shard": shard, "key": streamed.key, "reason": str(e)})
        raise UserError(
            f"{self.TRIES} samples in a row of {shortened(self.source.urls)} are bad, the last: "
            f"{bad[-1]['shard']}/{bad[-1]['key']}: {bad[-1]['reason']}"
        )


class _Batches(IterableDataset):
    """Batches of ``rows`` samples of one process, or of one of its data workers.

    Attributes:
        closed: Whether no further batch is needed, in shared memory.
    """

    def __init__(self, data: StreamDataset, start: int, rows: int, rank: int, world: int):
        self.data, self.start, self.rows, self.rank, self.world = data, start, rows, rank, world
        self.closed = multiprocessing.Value(c_bool, False, lock=False)

    def __iter__(self) -> Iterator[Loaded | UserError]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            end_when(self.closed)  # it may wait for a command that no longer writes
        consumer, consumers = self.rank * workers + worker, self.world * workers
        samples = self.data.samples(self.start, consumer, consumers)
        # every worker has its own rows, from which the random numbers of augmentations are derived
        numbered = zip(count(consumer, consumers), samples)
        try:
            while True:
                bad: list[dict] = []
                chosen = [self.data.sample_or_next(numbered, self.start, bad) for _ in range(self.rows)]
                batch, truncated = self.data.collate(chosen)
                yield Loaded(batch, bad, truncated, chosen[0].dataset_row)
        except UserError as e:  # yielded, not raised: a worker's exception would arrive wrapped in a traceback
            yield e
