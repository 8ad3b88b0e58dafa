"""From positions of the global order to batches, for training (endless, shuffled) and for evaluation (once, in order)."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlp.data.image import decode
from vlp.data.order import MixtureOrder, SampleRef, SourceOrder, stream
from vlp.data.shards import INDEX_BITS, RawSample, ShardReader
from vlp.errors import BadSample, UserError
from vlp.types import Answers, Batch


@dataclass
class Loaded:
    """What a worker hands over: a batch, and the samples that it had to leave out."""

    batch: Batch
    bad: list[dict] = field(default_factory=list)
    truncated_captions: int = 0


@dataclass
class Sample:
    """One sample before it is put into a batch.

    Args:
        images: its views, (3, h, w) uint8 each, those of a further picture behind those of the first; none where the
            model takes no pictures.
        texts: its views; none where the model takes no text.
        answers: (answer, weight) each.
        targets: (C,).
        rng: what is left of the sample's own randomness, for views that are made from token ids.
    """

    key: str
    index: int
    row: int
    label: int | None
    images: list[Tensor]
    texts: tuple[str, ...]
    answers: tuple[tuple[str, float], ...]
    targets: Tensor | None
    rng: np.random.Generator


class TrainDataset(Dataset):
    """Position of the endless stream -> sample with its caption drawn and its pictures augmented.

    A bad sample's place is taken by another one of the same source, drawn by (seed, position, try): batches keep their
    size on every process, and a resumed run substitutes the same.

    Args:
        sources: `vlp.data.shards.Source`, `vlp.data.annotated.Annotated` or `vlp.data.sentences.Sentences`.
        transforms: one for each view of a picture.
        preprocess: of the image tower; None = pictures are not read.
        tokenizer: None = texts are not read.
        text_views: how further views of a text are made from the first, see `vlp.data.text_views`.
    """

    TRIES = 100

    def __init__(self, sources, transforms, preprocess, tokenizer, max_length, max_pixels, seed, text_views=()):
        self.readers = [source.open() for source in sources]
        for source, reader in zip(sources, self.readers):
            if len(reader) == 0:
                raise UserError(f"{reader.location} holds no sample; give other data")
            if source.weight is not None and not 0 < source.weight < math.inf:
                raise UserError(f"the weight of {reader.location} is {source.weight}; give a positive number")
        orders = [SourceOrder(reader.sizes, seed) for reader in self.readers]
        self.order = MixtureOrder(orders, [source.weight for source in sources], seed)
        self.first_rows = [0, *accumulate(len(reader) for reader in self.readers)]
        self.transforms, self.preprocess = tuple(transforms), preprocess
        self.tokenizer, self.max_length, self.text_views = tokenizer, max_length, tuple(text_views)
        self.vocabulary = tokenizer.vocabulary() if self.text_views else None
        self.max_pixels, self.seed = max_pixels, seed

    def __len__(self) -> int:
        """Samples of one pass over all sources."""
        return self.order.size

    def _sample(self, draw: SampleRef) -> Sample:
        raw = self.readers[draw.source].read(draw.shard, draw.row)
        rng = stream(self.seed, 3, draw.source, draw.epoch, raw.number)
        texts, images = (), []
        if self.tokenizer:
            if not raw.captions:
                raise BadSample("no caption")
            texts = (raw.captions[rng.integers(len(raw.captions))], *raw.texts)
        if self.preprocess:
            if raw.image is None:
                raise BadSample("no picture")
            size, interpolation = self.preprocess.size, self.preprocess.interpolation
            # an answer may be what mirroring makes wrong, as a text may
            said = " ".join([*texts[:1], *(answer for answer, _ in raw.answers)])
            for pixels in (decode(image, self.max_pixels) for image in (raw.image, *raw.images)):
                images += [transform(pixels, size, interpolation, rng, said) for transform in self.transforms]
        # pictures of different sources never have the same index
        index, row = draw.source << INDEX_BITS | raw.index, self.first_rows[draw.source] + raw.number
        key = f"{draw.source}/{raw.number}/{raw.key}"
        return Sample(key, index, row, raw.label, images, texts, raw.answers, raw.targets, rng)

    def _sample_or_another(self, position: int, bad: list[dict]) -> Sample:
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
            samples = [self._sample_or_another(position, bad) for position in positions]
            batch, truncated = self._collate(samples)
        except UserError as e:  # returned, not raised: a worker's exception would arrive wrapped in a traceback
            return e
        return Loaded(batch, bad, truncated)

    def _collate(self, samples: list[Sample]) -> tuple[Batch, int]:
        """The batch with its further views, and how many texts were cut."""
        for what, kinds in {
            "numbers of texts a sample": {len(s.texts) for s in samples},
            "numbers of pictures a sample": {len(s.images) for s in samples},
            "kinds of annotation: only some have classes or answers": {
                (s.label is None, s.targets is None or len(s.targets), not s.answers) for s in samples
            },
        }.items():
            if len(kinds) > 1:
                raise UserError(f"the sources have different {what}; give each the same")
        index = torch.tensor([s.index for s in samples])
        images = [torch.stack(view) for view in zip(*(s.images for s in samples))]
        texts = [self.tokenizer.rows(view) for view in zip(*(s.texts for s in samples), strict=True)]
        for view in self.text_views:
            texts.append([view(row, s.rng, self.vocabulary) for row, s in zip(texts[0], samples)])
        padded = [self.tokenizer.pad(rows, self.max_length) for rows in texts]
        views = [Batch(index, image, *(text or (None, None, 0))[:2]) for image, text in zip_longest(images, padded)]
        labels = torch.tensor([s.label for s in samples]) if samples[0].label is not None else None
        targets = torch.stack([s.targets for s in samples]) if samples[0].targets is not None else None
        answers, cut = self._answers(samples) if self.tokenizer and samples[0].answers else (None, 0)
        row, keys = torch.tensor([s.row for s in samples]), [s.key for s in samples]
        first = replace(
            views[0],
            labels=labels,
            targets=targets,
            answers=answers,
            dataset_row=row,
            keys=keys,
            views=tuple(views[1:]),
        )
        return first, cut + sum(cut for _, _, cut in padded)

    def _answers(self, samples: list[Sample]) -> tuple[Answers, int]:
        """The answers of all samples, and how many were cut."""
        rows, weights, texts = zip(*((n, w, text) for n, s in enumerate(samples) for text, w in s.answers))
        ids, mask, cut = self.tokenizer.targets(texts, self.max_length)
        return Answers(ids, mask, torch.tensor(weights), torch.tensor(rows)), cut


class EvalDataset(Dataset):
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
        except UserError as e:  # returned, as in `TrainDataset`
            return e
        return samples, bad


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
    dataset: TrainDataset,
    start: int,
    stop: int,
    size: int,
    rank: int,
    world: int,
    workers: int,
    pin_memory: bool = False,
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
