"""Embeddings of a source of image-text pairs, the same for any number of processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vlp.data.reading.shards import RawSample
from vlp.data.stream import EvalDataset, evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.tasks.base import EvalModel, evaluating


def merge(rows: Tensor) -> Tensor:
    """Adds up what the processes filled in; each row was filled by one of them, so the sum is exact."""
    if world_size() > 1:
        dist.all_reduce(rows)
    return rows


@dataclass
class EncodedPairs:
    """Embeddings of a source, on the CPU, in the source's order.

    Args:
        images: (n, E).
        texts: (m, E).
        image_ids: (n,) equal id = same picture.
        text_ids: (m,) id of the picture that the caption belongs to.
        rows: (n,) number of the sample within the source.
        captions: m texts.
        bad: samples left out.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    rows: Tensor
    captions: list[str]
    bad: list[dict]


def encode_pairs(subject: EvalModel, source: str, batch_size: int) -> EncodedPairs:
    """Encodes every picture and every caption of ``source`` once.

    The batches are the same for any number of processes, which share them out; so are the results, to the bit.
    """
    data, model = subject.data, subject.model
    dataset = EvalDataset(source, data.resize, subject.preprocess, data.max_pixels)
    own: dict[int, tuple[Tensor, Tensor, RawSample]] = {}
    bad: list[dict] = []
    with evaluating(model):
        for samples, unusable in evaluation_batches(dataset, batch_size, data.workers, subject.rank, world_size()):
            bad += unusable + [
                dataset.reader.quarantine_entry(raw.shard, raw.row, "no caption")
                for _, raw in samples
                if not raw.captions
            ]
            samples = [(image, raw) for image, raw in samples if raw.captions]
            if not samples:
                continue
            pixels = torch.stack([image for image, _ in samples]).to(subject.device)
            embeds = model.encode_image(subject.preprocess.normalise(pixels)).embed.float().cpu()
            texts = encode_texts(subject, [c for _, raw in samples for c in raw.captions])
            texts = texts.split([len(raw.captions) for _, raw in samples])
            own |= {raw.source_row: (e, t, raw) for e, t, (_, raw) in zip(embeds, texts, samples)}
    return _assemble(own, len(dataset), bad)


def _assemble(own: dict[int, tuple[Tensor, Tensor, RawSample]], size: int, bad: list[dict]) -> EncodedPairs:
    """Puts what each process encoded in the source's order."""
    width = max(gather_objects(max((e.shape[-1] for e, _, _ in own.values()), default=0)))
    counts, ids, images = (
        torch.zeros(size, dtype=torch.int64),
        torch.zeros(size, dtype=torch.int64),
        torch.zeros(size, width),
    )
    for n, (embed, texts, raw) in own.items():
        counts[n], ids[n], images[n] = len(texts), raw.image_id, embed
    counts, ids, images = merge(counts), merge(ids), merge(images)
    texts, starts = torch.zeros(int(counts.sum()), width), counts.cumsum(0) - counts
    for n, (_, embeds, _) in own.items():
        texts[starts[n] : starts[n] + counts[n]] = embeds
    captions = {
        n: c for part in gather_objects({n: raw.captions for n, (_, _, raw) in own.items()}) for n, c in part.items()
    }
    rows = counts.nonzero()[:, 0]
    texts = merge(texts)
    if not (images.isfinite().all() and texts.isfinite().all()):  # they would rank first, as no score is above theirs
        raise UserError("the model's embeddings are not finite; evaluate an earlier checkpoint")
    return EncodedPairs(
        images=images[rows],
        texts=texts,
        image_ids=ids[rows],
        text_ids=ids.repeat_interleave(counts),
        rows=rows,
        captions=[c for n in rows.tolist() for c in captions[n]],
        bad=[b for part in gather_objects(bad) for b in part],
    )


def encode_texts(subject: EvalModel, texts: list[str]) -> Tensor:
    """(n, E) float32 unit-norm embeddings on the CPU."""
    input_ids, attention_mask, _ = subject.tokenizer(texts, subject.data.max_length)
    encoded = subject.model.encode_text(input_ids.to(subject.device), attention_mask.to(subject.device))
    return encoded.embed.float().cpu()
