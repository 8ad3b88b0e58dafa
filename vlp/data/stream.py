"""From positions of the global order to batches, for training (endless, shuffled) and for evaluation (once, in order)."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlp.data.image import decode
from vlp.data.order import Draw, MixtureOrder, SourceOrder, stream
from vlp.data.shards import INDEX_BITS, RawSample, ShardReader
from vlp.errors import BadSample, UserError
from vlp.types import Batch


@dataclass(frozen=True)
class Source:
    """One folder, glob or URL of shards.

    Args:
        shards: what `list_shards` takes.
        weight: share of the stream relative to the other sources' weights; None = number of samples.
    """

    shards: str
    weight: float | None = None


@dataclass
class Loaded:
    """What a worker hands over: a batch, and the samples that it had to leave out."""

    batch: Batch
    bad: list[dict] = field(default_factory=list)
    truncated_captions: int = 0


class Shuffled(Dataset):
    """Position of the endless stream -> sample with its caption drawn and its picture augmented.

    A bad sample's place is taken by another one of the same source, drawn by (seed, position, try): batches keep their
    size on every process, and a resumed run substitutes the same.
    """

    TRIES = 100

    def __init__(self, sources: Sequence[Source], transform, preprocess, tokenizer, max_length, max_pixels, seed):
        self.readers = [ShardReader(source.shards) for source in sources]
        for source, reader in zip(sources, self.readers):
            if len(reader) == 0:
                raise UserError(f"the shards at {reader.location} hold no sample with a picture; give other ones")
            if source.weight is not None and not 0 < source.weight < math.inf:
                raise UserError(f"the weight of {source.shards} is {source.weight}; give a positive number")
        orders = [SourceOrder(reader.sizes, seed) for reader in self.readers]
        self.order = MixtureOrder(orders, [source.weight for source in sources], seed)
        self.transform, self.preprocess, self.tokenizer = transform, preprocess, tokenizer
        self.max_length, self.max_pixels, self.seed = max_length, max_pixels, seed

    def __len__(self) -> int:
        """Samples of one pass over all sources."""
        return self.order.size

    def _sample(self, draw: Draw) -> tuple[Tensor, str, int, str]:
        raw = self.readers[draw.source].read(draw.shard, draw.row)
        if not raw.captions:
            raise BadSample("no caption")
        rng = stream(self.seed, 3, draw.source, draw.epoch, raw.number)
        caption = raw.captions[rng.integers(len(raw.captions))]
        pixels = decode(raw.image, self.max_pixels)
        image = self.transform(pixels, self.preprocess.size, self.preprocess.interpolation, rng, caption)
        # pictures of different sources never have the same index
        return image, caption, draw.source << INDEX_BITS | raw.index, f"{draw.source}/{raw.number}/{raw.key}"

    def _sample_or_another(self, position: int, bad: list[dict]) -> tuple[Tensor, str, int, str]:
        draw = self.order.locate(position)
        for attempt in range(self.TRIES):
            try:
                return self._sample(draw)
            except BadSample as e:
                bad.append(self.readers[draw.source].complaint(draw.shard, draw.row, str(e)))
                draw = self.order.another(position, attempt)
        raise UserError(
            f"{self.TRIES} samples in a row of {self.readers[draw.source].location} are bad, the last: "
            f"{bad[-1]['shard']}/{bad[-1]['key']}: {bad[-1]['reason']}; run `vlp data check` on it"
        )

    def __getitems__(self, positions: Sequence[int]) -> Loaded | UserError:
        bad: list[dict] = []
        try:
            rows = [self._sample_or_another(position, bad) for position in positions]
        except UserError as e:  # returned, not raised: a worker's exception would arrive wrapped in a traceback
            return e
        return _collate(rows, self.tokenizer, self.max_length, bad)


class InOrder(Dataset):
    """Every sample of one source once, all captions of each, for evaluation; bad samples are left out."""

    def __init__(self, source: str, transform, preprocess, max_pixels):
        self.reader = ShardReader(source)
        self.transform, self.preprocess, self.max_pixels = transform, preprocess, max_pixels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[list[tuple[Tensor, RawSample]], list[dict]] | UserError:
        samples, bad = [], []
        try:
            for shard, row in map(self.reader.place, numbers):
                try:
                    raw = self.reader.read(shard, row)
                    pixels = decode(raw.image, self.max_pixels)
                    samples.append((self.transform(pixels, self.preprocess.size, self.preprocess.interpolation), raw))
                except BadSample as e:
                    bad.append(self.reader.complaint(shard, row, str(e)))
        except UserError as e:  # returned, as in `Shuffled`
            return e
        return samples, bad


def _collate(rows: list[tuple[Tensor, str, int, str]], tokenizer, max_length: int, bad: list[dict]) -> Loaded:
    images, captions, indices, keys = zip(*rows)
    input_ids, attention_mask, truncated = tokenizer(list(captions), max_length)
    batch = Batch(torch.stack(images), input_ids, attention_mask, torch.tensor(indices, dtype=torch.int64), keys)
    return Loaded(batch, bad, truncated)


class Positions:
    """Batch sampler of one process: its part of every global micro-batch from ``start`` on.

    Global micro-batch n covers positions [n * size, (n + 1) * size); process r of W takes the r-th of W equal parts.
    """

    def __init__(self, start: int, stop: int, size: int, rank: int, world: int):
        self.start, self.stop, self.size, self.rank, self.world = start, stop, size, rank, world

    def __len__(self) -> int:
        return (self.stop - self.start) // self.size

    def __iter__(self) -> Iterator[list[int]]:
        part = self.size // self.world
        for begin in range(self.start + self.rank * part, self.stop, self.size):
            yield list(range(begin, begin + part))


def training_loader(
    dataset: Shuffled, start: int, stop: int, size: int, rank: int, world: int, workers: int, pin_memory: bool = False
) -> Iterator[Loaded]:
    """Micro-batches of ``size`` samples over all processes, from position ``start`` to ``stop``.

    Never prepared by Accelerate: the positions are already this process's own.

    Raises:
        UserError: what a worker met that no retry can mend.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=Positions(start, stop, size, rank, world),
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    return _raise_errors(loader)


def evaluation_batches(dataset: Dataset, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> Iterator:
    """Every ``world``-th batch from ``rank`` on: the batches are the same for any number of processes."""
    numbers = list(range(rank, -(-len(dataset) // batch_size), world))
    batches = [list(range(n * batch_size, min((n + 1) * batch_size, len(dataset)))) for n in numbers]
    return _raise_errors(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_parent,
        )
    )


def _raise_errors(items: Iterable) -> Iterator:
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a run, and the training process wants to finish its step:
    the workers go on until it ends them, or has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(item):
    return item
