"""Batches from positions of the global order: endless and shuffled for training, once and in order for evaluation.

B batch, C classes, h and w pixels of the model's images.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import accumulate, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlp.data.download import downloading_ahead, remote_shards
from vlp.data.image import decode
from vlp.data.order import MixtureOrder, SampleRef, SourceOrder, keyed_rng
from vlp.data.other_images import exchange
from vlp.data.reading.shards import RawSample, ShardReader
from vlp.data.workers import end_if_a_batch_cannot_be_sent, end_with_parent
from vlp.errors import BadSample, UserError
from vlp.types import Answers, Batch


@dataclass
class Loaded:
    """Result of a loader worker.

    Args:
        bad: Quarantine entries of the bad samples that were replaced.
        first_row: ``dataset_row`` of the first sample, on the host wherever the batch is.
    """

    batch: Batch
    bad: list[dict] = field(default_factory=list)
    truncated_captions: int = 0
    first_row: int = 0

    def pin_memory(self) -> Loaded:
        """Return the batch in pinned memory, which is copied to a GPU asynchronously. DataLoader calls it."""
        return replace(self, batch=self.batch.map(Tensor.pin_memory))


@dataclass
class Sample:
    """One sample before collation.

    Args:
        image_id: Equal for samples that show the same image.
        dataset_row: Row of the sample among all samples of all sources.
        images: Views, (3, h, w) uint8 each. Views of a second image follow those of the first. Empty for a model without
            images.
        texts: Views; empty for a model without text.
        answers: (answer, weight) each.
        targets: (C,) soft targets.
        rng: The sample's generator, for views that are computed from token ids.
    """

    key: str
    image_id: int
    dataset_row: int
    label: int | None
    images: list[Tensor]
    texts: tuple[str, ...]
    answers: tuple[tuple[str, float], ...]
    targets: Tensor | None
    rng: np.random.Generator


class TrainingData(Dataset):
    """Samples with a drawn caption and augmented images, and their batches. Subclasses decide the order.

    Args:
        transforms: One transform per view of an image.
        preprocess: Format of the image tower. None skips reading images.
        tokenizer: None skips reading texts.
        max_length: Tokens of a text, of which the rest is truncated.
        max_pixels: Images with more pixels are bad samples.
        seed: Seed of the order and of all random numbers.
        text_views: Further views of a text, computed from the first, see `vlp.data.text_views`.

    Attributes:
        readers: Readers of the sources whose content is known before it is read.
    """

    TRIES = 100  # bad samples in a row
    readers: Sequence[Any]

    def __init__(self, transforms, preprocess, tokenizer, max_length, max_pixels, seed, text_views=()):
        self.transforms, self.preprocess = tuple(transforms), preprocess
        self.tokenizer, self.max_length, self.text_views = tokenizer, max_length, tuple(text_views)
        self.vocabulary = tokenizer.vocabulary() if self.text_views else None
        self.max_pixels, self.seed = max_pixels, seed

    def prepare(self, raw: RawSample, rng: np.random.Generator, dataset_row: int, key: str) -> Sample:
        """Draw a caption, and decode and transform the images.

        Args:
            rng: The sample's own generator.
            key: Name for logs.

        Raises:
            BadSample: if the sample has no caption or image that the model needs, or its image cannot be decoded.
        """
        texts, images = (), []
        if self.tokenizer:
            if not raw.captions:
                raise BadSample("no caption")
            texts = (raw.captions[rng.integers(len(raw.captions))], *raw.texts)
        if self.preprocess:
            if raw.image is None:
                raise BadSample("no image")
            size, interpolation = self.preprocess.size, self.preprocess.interpolation
            # mirroring may make an answer wrong as well as a text
            said = " ".join([*texts[:1], *(answer for answer, _ in raw.answers)])
            for pixels in (decode(image, self.max_pixels) for image in (raw.image, *raw.images)):
                images += [transform(pixels, size, interpolation, rng, said) for transform in self.transforms]
        return Sample(key, raw.image_id, dataset_row, raw.label, images, texts, raw.answers, raw.targets, rng)

    def notes(self) -> list[str]:
        """Return lines for the user about what the data do not contain or promise."""
        raise NotImplementedError

    def loader(self, **part: Any) -> Iterator[Loaded]:
        """Yield a process's part of the micro-batches, see `training_loader` for the arguments."""
        raise NotImplementedError

    def collate(self, samples: list[Sample]) -> tuple[Batch, int]:
        """Return the batch with its further views, and the number of truncated texts."""
        for kind, values in {
            "numbers of texts per sample": {len(s.texts) for s in samples},
            "numbers of images per sample": {len(s.images) for s in samples},
            "kinds of annotation: only some have classes or answers": {
                (s.label is None, s.targets is None or len(s.targets), not s.answers) for s in samples
            },
        }.items():
            if len(values) > 1:
                raise UserError(f"the sources have different {kind}; give all sources the same")
        image_ids = torch.tensor([s.image_id for s in samples])  # (B,)
        images = [torch.stack(view) for view in zip(*(s.images for s in samples))]  # (B, 3, h, w) each
        texts = [self.tokenizer.rows(view) for view in zip(*(s.texts for s in samples), strict=True)]
        for view in self.text_views:
            texts.append([view(row, s.rng, self.vocabulary) for row, s in zip(texts[0], samples)])
        padded = [self.tokenizer.pad(rows, self.max_length) for rows in texts]  # (B, L) ids and mask each
        views = [Batch(image_ids, image, *(text or (None, None, 0))[:2]) for image, text in zip_longest(images, padded)]
        labels = torch.tensor([s.label for s in samples]) if samples[0].label is not None else None
        targets = torch.stack([s.targets for s in samples]) if samples[0].targets is not None else None
        answers, cut = self._answers(samples) if self.tokenizer and samples[0].answers else (None, 0)
        rows, keys = torch.tensor([s.dataset_row for s in samples]), [s.key for s in samples]
        first = replace(
            views[0],
            labels=labels,
            targets=targets,
            answers=answers,
            dataset_row=rows,
            keys=keys,
            views=tuple(views[1:]),
        )
        return first, cut + sum(cut for _, _, cut in padded)

    def _answers(self, samples: list[Sample]) -> tuple[Answers, int]:
        """Return the answers of all samples, and the number of truncated ones."""
        rows, weights, texts = zip(*((n, w, text) for n, s in enumerate(samples) for text, w in s.answers))
        ids, mask, cut = self.tokenizer.targets(texts, self.max_length)
        return Answers(ids, mask, torch.tensor(weights), torch.tensor(rows)), cut


class TrainDataset(TrainingData):
    """Maps positions of the endless stream to samples.

    A bad sample is replaced by another one of the same source, drawn by (seed, position, attempt). Batches keep their size
    on every process, and a resumed run draws the same replacements.

    Args:
        sources: `vlp.data.reading.shards.Source`, `vlp.data.reading.annotated.Annotated` or
            `vlp.data.reading.sentences.Sentences`.
        readers: Number of canonical readers, see `vlp.data.order`.

    The other arguments are those of `TrainingData`.
    """

    def __init__(
        self, sources, transforms, preprocess, tokenizer, max_length, max_pixels, seed, text_views=(), readers=1
    ):
        super().__init__(transforms, preprocess, tokenizer, max_length, max_pixels, seed, text_views)
        self.readers = [source.open() for source in sources]
        for source, reader in zip(sources, self.readers):
            if len(reader) == 0:
                raise UserError(f"{reader.location} contains no usable sample; run `vlp data check` on it")
            if source.weight is not None and not 0 < source.weight < math.inf:
                raise UserError(f"the weight of {reader.location} is {source.weight}; give a positive number")
            if len(reader) % source.together:
                raise UserError(
                    f"together={source.together} of {reader.location} does not divide its {len(reader):,} samples; pack them "
                    f"in whole groups, or set together=1"
                )
        orders = [
            SourceOrder(reader.sizes, seed, readers, together=source.together)
            for source, reader in zip(sources, self.readers)
        ]
        self.order = MixtureOrder(orders, [source.weight for source in sources], seed)
        self.first_rows = [0, *accumulate(len(reader) for reader in self.readers)]

    def __len__(self) -> int:
        """Return the number of samples of all sources together."""
        return self.order.size

    def notes(self) -> list[str]:
        """Return one line for each kind of input at the sources' locations that is not read."""
        return [line for reader in self.readers if isinstance(reader, ShardReader) for line in reader.notes()]

    def _sample(self, ref: SampleRef) -> Sample:
        raw = self.readers[ref.source].read(ref.shard, ref.row)
        rng = keyed_rng(self.seed, 3, ref.source, ref.epoch, raw.source_row)
        dataset_row = self.first_rows[ref.source] + raw.source_row
        return self.prepare(raw, rng, dataset_row, f"{ref.source}/{raw.source_row}/{raw.key}")

    def _sample_or_replacement(self, position: int, bad: list[dict]) -> Sample:
        ref = self.order.locate(position)
        for attempt in range(self.TRIES):
            try:
                return self._sample(ref)
            except BadSample as e:
                bad.append(self.readers[ref.source].quarantine_entry(ref.shard, ref.row, str(e)))
                ref = self.order.replacement(position, attempt)
        raise UserError(
            f"{self.TRIES} samples in a row of {self.readers[ref.source].location} are bad, the last: "
            f"{bad[-1]['shard']}/{bad[-1]['key']}: {bad[-1]['reason']}; run `vlp data check` on it"
        )

    def __getitems__(self, positions: Sequence[int]) -> Loaded | UserError:
        bad: list[dict] = []
        try:
            samples = [self._sample_or_replacement(position, bad) for position in positions]
            batch, truncated = self.collate(samples)
        except UserError as e:  # returned, not raised: a worker's exception would arrive wrapped in a traceback
            return e
        return Loaded(batch, bad, truncated, samples[0].dataset_row)

    def loader(self, **part: Any) -> Iterator[Loaded]:
        return training_loader(self, **part)


class EvalDataset(Dataset):
    """Every sample of one source once, with all its captions, for evaluation. Bad samples are reported and skipped.

    Samples come without their encoded image, which would stay in memory until the end of an evaluation.
    """

    def __init__(self, source: str, transform, preprocess, max_pixels):
        self.reader = ShardReader(source)
        self.transform, self.preprocess, self.max_pixels = transform, preprocess, max_pixels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[list[tuple[Tensor, RawSample]], list[dict]] | UserError:
        samples, bad = [], []
        try:
            for shard, row in map(self.reader.locate, numbers):
                try:
                    raw = self.reader.read(shard, row)
                    pixels = decode(raw.image, self.max_pixels)
                    image = self.transform(pixels, self.preprocess.size, self.preprocess.interpolation)
                    samples.append((image, replace(raw, image=None)))
                except BadSample as e:
                    bad.append(self.reader.quarantine_entry(shard, row, str(e)))
        except UserError as e:  # returned, as in `TrainDataset`
            return e
        return samples, bad

    def with_image_of(
        self, sample: tuple[Tensor, RawSample], other: tuple[Tensor, RawSample] | None
    ) -> tuple[Tensor, RawSample]:
        """Return a sample with the image of another one, a black one for None."""
        return exchange(sample[0], other and other[0]), sample[1]


class Positions:
    """Batch sampler of one process: its part of every global micro-batch from ``start`` on.

    Global micro-batch n covers positions [n * size, (n + 1) * size). Its positions are sorted by reader (turn t of ``together``
    positions belongs to reader t mod R), and process r of W takes the r-th of W equal parts. If W divides R and R * together
    divides the size, a process reads the turns of the same R / W readers in every micro-batch, and no unit of related
    samples is divided between processes or micro-batches.
    """

    def __init__(self, start: int, stop: int, size: int, rank: int, world: int, readers: int = 1, together: int = 1):
        self.start, self.stop, self.size = start, stop, size
        self.rank, self.world, self.readers, self.together = rank, world, readers, together

    def __len__(self) -> int:
        return (self.stop - self.start) // self.size

    def __iter__(self) -> Iterator[list[int]]:
        part = self.size // self.world
        for begin in range(self.start, self.stop - self.size + 1, self.size):
            positions = np.arange(begin, begin + self.size)
            by_reader = positions[np.argsort(positions // self.together % self.readers, kind="stable")]
            yield by_reader[self.rank * part : (self.rank + 1) * part].tolist()


def training_loader(
    dataset: TrainDataset,
    start: int,
    stop: int,
    size: int,
    rank: int,
    world: int,
    workers: int,
    pin_memory: bool = False,
    prefetch_shards: int = 0,
) -> Iterator[Loaded]:
    """Yield this process's part of the micro-batches of ``size`` samples from position ``start`` to ``stop``.

    The loader must not be prepared by Accelerate: the positions are already those of this process.

    Args:
        prefetch_shards: Remote shards to download before they are needed, see `vlp.data.download`.

    Raises:
        UserError: for an error in a worker that no replacement can avoid.
    """
    positions = Positions(start, stop, size, rank, world, dataset.order.readers, dataset.order.together)
    loader = DataLoader(dataset, batch_sampler=positions, **loader_options(workers, pin_memory))
    remote = remote_shards(dataset.readers) if prefetch_shards else {}
    if not remote:
        return raise_errors(loader)
    return _with_downloads(loader, downloading_ahead(remote, dataset.order, positions, prefetch_shards))


def loader_options(workers: int, pin_memory: bool) -> dict[str, Any]:
    """Return the options of a DataLoader for training."""
    return {
        "num_workers": workers,
        "worker_init_fn": _init_worker,
        "collate_fn": _identity,
        "pin_memory": pin_memory,
        "prefetch_factor": 4 if workers else None,
    }


def _with_downloads(loader: Iterable[Loaded | UserError], downloads: AbstractContextManager) -> Iterator[Loaded]:
    with downloads as taken:
        for item in raise_errors(loader):
            yield item
            taken.value += 1


def evaluation_batches(dataset: Dataset, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> Iterator:
    """Yield every ``world``-th batch from ``rank`` on. The batches are the same for any number of processes."""
    numbers = list(range(rank, -(-len(dataset) // batch_size), world))
    batches = [list(range(n * batch_size, min((n + 1) * batch_size, len(dataset)))) for n in numbers]
    return raise_errors(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=_init_worker,
        )
    )


def raise_errors(items: Iterable) -> Iterator:
    """Yield the items, and raise the first that is a UserError."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def _init_worker(worker: int) -> None:
    """Leave Ctrl-C and a scheduler's SIGTERM to the training process, which finishes its step with these workers."""
    end_with_parent((signal.SIGINT, signal.SIGTERM))
    end_if_a_batch_cannot_be_sent()


def _identity(item):
    return item
