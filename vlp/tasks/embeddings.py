"""Embeddings of image-caption pairs and of texts, the same for any number of processes.

n images, m captions, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.data.reading.shards import RawSample
from vlp.data.stream import EvalDataset
from vlp.distributed import gather_objects
from vlp.errors import UserError
from vlp.tasks.base import EvalModel
from vlp.tasks.sharded import ShardedBatches, sum_disjoint


@dataclass
class EncodedPairs:
    """Embeddings of a source on the CPU, in the order of the source.

    Args:
        images: (n, E).
        texts: (m, E).
        image_ids: (n,) int64, equal for equal images.
        text_ids: (m,) int64 id of the image that a caption belongs to.
        rows: (n,) int64 position of the sample within the source.
        captions: m texts.
        bad: Records of skipped samples.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    rows: Tensor
    captions: list[str]
    bad: list[dict]


def encode_pairs(model: EvalModel, source: str, batch_size: int) -> EncodedPairs:
    """Encode every image and every caption of the shards at ``source`` once.

    Raises:
        UserError: if an embedding is not finite. It would be ranked first, since no score is greater than NaN.
    """
    dataset = EvalDataset(source, model.data.resize, model.preprocess, model.data.max_pixels)
    batches = ShardedBatches(model, dataset, batch_size)
    own: dict[int, tuple[Tensor, Tensor, RawSample]] = {}
    for samples in captioned(batches):
        images = model.encode_images([image for image, _ in samples]).embed.float().cpu()  # (B, E)
        texts = encode_texts(model, [caption for _, raw in samples for caption in raw.captions])
        of_image = texts.split([len(raw.captions) for _, raw in samples])  # B x (captions, E)
        own |= {raw.source_row: (image, texts, raw) for image, texts, (_, raw) in zip(images, of_image, samples)}
    return _assemble(own, len(dataset), batches.gather_skipped())


def captioned(batches: ShardedBatches) -> Iterator[list[tuple[Tensor, RawSample]]]:
    """Yield the samples of each batch that have a caption, and record the others as skipped."""
    reader = batches.dataset.reader
    for samples in batches:
        for _, raw in samples:
            if not raw.captions:
                batches.skip(reader.quarantine_entry(raw.shard, raw.row, "no caption"))
        if kept := [(image, raw) for image, raw in samples if raw.captions]:
            yield kept


def _assemble(own: dict[int, tuple[Tensor, Tensor, RawSample]], size: int, bad: list[dict]) -> EncodedPairs:
    """Put the embeddings of all processes in the order of the source."""
    width = max(gather_objects(max((image.shape[-1] for image, _, _ in own.values()), default=0)))
    counts, ids = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    images = torch.zeros(size, width)
    for n, (image, texts, raw) in own.items():
        counts[n], ids[n], images[n] = len(texts), raw.image_id, image
    counts, ids, images = sum_disjoint(counts), sum_disjoint(ids), sum_disjoint(images)
    # the captions of sample n are rows starts[n] to starts[n] + counts[n]
    texts, starts = torch.zeros(int(counts.sum()), width), counts.cumsum(0) - counts
    for n, (_, of_image, _) in own.items():
        texts[starts[n] : starts[n] + counts[n]] = of_image
    texts = sum_disjoint(texts)
    captions: dict[int, tuple[str, ...]] = {}
    for part in gather_objects({n: raw.captions for n, (_, _, raw) in own.items()}):
        captions |= part
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise UserError("the model's embeddings are not finite; evaluate an earlier checkpoint")
    rows = counts.nonzero()[:, 0]
    return EncodedPairs(
        images=images[rows],
        texts=texts,
        image_ids=ids[rows],
        text_ids=ids.repeat_interleave(counts),
        rows=rows,
        captions=[caption for n in rows.tolist() for caption in captions[n]],
        bad=bad,
    )


def encode_texts(model: EvalModel, texts: list[str]) -> Tensor:
    """Return (n, E) float32 unit-norm embeddings on the CPU."""
    return model.encode_texts(texts).embed.float().cpu()
