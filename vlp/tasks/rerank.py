"""Retrieval by contrast, with the best candidates re-ranked by image-text matching (ALBEF, Li et al. 2021, sec. 4.1).

Pairs are scored image by image. The keys and values of an image are computed once for all its pairs, and a pair that both
directions need is scored once. Tokens of texts are kept in memory, tokens of images are not: 5,000 images at 384 px would take
9 GB, 25,000 captions take 1 GB. Images are therefore encoded twice.

n images, m captions, A distinct texts, L tokens of the longest, T tokens of all, D width, E embedding, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlp.data.stream import EvalDataset
from vlp.distributed import gather_objects
from vlp.errors import UserError
from vlp.models.base import Model
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result
from vlp.tasks.details import RetrievalRanking
from vlp.tasks.embeddings import captioned
from vlp.tasks.metrics import Interval, rank_of_positive, ranks, topk
from vlp.tasks.naming import protocol_name
from vlp.tasks.requirements import need_embeddings
from vlp.tasks.retrieval import Retrieval, recalls
from vlp.tasks.sharded import ShardedBatches, length_batches, sum_disjoint
from vlp.types import Encoded


@dataclass(frozen=True)
class Rerank(Retrieval):
    """Retrieve by cosine similarity, then order the k best candidates of each query by their matching scores.

    A query that has no own answer among its candidates keeps its rank. Metrics are those of `Retrieval`, and the same without
    re-ranking with the prefix ``itc_``.

    Args:
        k: Candidates of each query (published: 256 on COCO, 128 on Flickr30k).
        score: The matching logit only, as published, or the sum of the logit and the cosine, as in LAVIS.
        text_batch: Texts encoded, or matched with an image, at a time.
        blind: Whether to match a second time, with the image of another sample in the place of each candidate. Candidates stay
            those of the right image. Re-ranking that is as good without the right image does not read it. Doubles the cost.
    """

    name = "rerank"

    k: int = setting(128, least=1)
    score: Literal["itm", "itm+itc"] = "itm"
    text_batch: int = setting(256, least=1, changes_result=False)
    blind: bool = setting(True, changes_result=False)

    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names(), *self.baselines)

    @property
    def baselines(self) -> tuple[str, ...]:
        return tuple(f"itc_{name}" for name in super().metric_names())

    def evaluate(self, model: EvalModel) -> Result:
        if not model.model.can_match:
            raise UserError("rerank needs a model with a head for image-text matching (model.itm); use retrieval")
        need_embeddings(model, self.name)
        source = self.source(model.data)
        dataset = EvalDataset(source, model.data.resize, model.preprocess, model.data.max_pixels)
        images = encode_images(replace(model, is_blind=False), dataset, self.batch_size)
        if not images.rows:
            raise UserError(f"{source} has no usable image-text pair; run `vlp data check` on it")
        captions = [caption for own in images.captions for caption in own]
        number = {text: n for n, text in enumerate(dict.fromkeys(captions))}  # equal captions are encoded once
        texts = encode_distinct(model, list(number), self.text_batch)
        text_of = torch.tensor([number[caption] for caption in captions])  # (m,)
        shortlist = Shortlist(images.embeds, texts.embeds[text_of], self.k)
        pairs = self._match(model, dataset, images.rows, shortlist, texts, text_of)
        metrics, ranking = self._metrics(images, captions, shortlist, texts.embeds[text_of], model.seed)
        score = "the matching logit" if self.score == "itm" else "the matching logit + cosine"
        return Result(
            protocol=f"{self.score}-of-itc-top-{self.k}: each query's {self.k} best by cosine similarity in the order of "
            f"{score}, the others behind them; any caption of an image counts, ties count against",
            name=protocol_name(model, source, self.setting),
            data=source,
            n={"images": len(images.rows), "captions": len(captions), "pairs": pairs},
            metrics=metrics,
            details=ranking.examples(self.examples, model.seed),
            bad=images.bad,
        )

    def _match(
        self,
        model: EvalModel,
        dataset: EvalDataset,
        rows: list[int],
        shortlist: Shortlist,
        texts: Texts,
        text_of: Tensor,
    ) -> int:
        """Fill in the matching scores of the shortlist, and return how many pairs were scored."""
        position = {row: n for n, row in enumerate(rows)}
        pairs = 0
        for samples in ShardedBatches(model, dataset, self.batch_size):
            # a sample without a caption has no position
            samples = [(image, position[raw.source_row]) for image, raw in samples if raw.source_row in position]
            if not samples:
                continue
            encoded = model.encode_images([image for image, _ in samples])
            for n, (_, image) in enumerate(samples):
                asked, inverse = text_of[shortlist.captions_of(image)].unique(return_inverse=True)
                scores = match(model.model, encoded[n : n + 1], texts, asked, self.text_batch)  # (distinct texts,)
                shortlist.fill(image, scores[inverse])
                pairs += len(asked)
        for scores in (shortlist.i2t_itm, shortlist.t2i_itm):
            if not sum_disjoint(scores).isfinite().all():
                raise UserError("the model's matching scores are not finite; choose another checkpoint")
        return sum(gather_objects(pairs))

    def _metrics(
        self, images: EncodedImages, captions: list[str], shortlist: Shortlist, texts: Tensor, seed: int
    ) -> tuple[dict[str, Interval], RetrievalRanking]:
        image_ids = torch.tensor(images.ids)
        counts = torch.tensor([len(own) for own in images.captions])
        image_of = torch.arange(len(images.rows)).repeat_interleave(counts)  # (m,)
        text_ids = image_ids[image_of]
        cosine_weight = 1.0 if self.score == "itm+itc" else 0.0
        before, after, best = {}, {}, {}
        for direction, queries, keys, query_ids, key_ids, itm, cosines, candidates in (
            ("i2t", images.embeds, texts, image_ids, text_ids, shortlist.i2t_itm, *shortlist.i2t),
            ("t2i", texts, images.embeds, text_ids, image_ids, shortlist.t2i_itm, *shortlist.t2i),
        ):
            by_cosine, scores = ranks(queries, keys, query_ids, key_ids), itm + cosine_weight * cosines
            positive = query_ids[:, None] == key_ids[candidates]  # (queries, k)
            before[direction] = (by_cosine, query_ids)
            after[direction] = (rerank(scores, positive, by_cosine), query_ids)
            best[direction] = partial(_best_candidates, scores, candidates)
        metrics = recalls(after, self.ks, seed, self.resamples)
        metrics |= {f"itc_{name}": each for name, each in recalls(before, self.ks, seed, self.resamples).items()}
        ranking = RetrievalRanking(
            images.rows, captions, image_of, after["i2t"][0], after["t2i"][0], best["i2t"], best["t2i"]
        )
        return metrics, ranking


def _best_candidates(scores: Tensor, candidates: Tensor, queries: Tensor) -> Tensor:
    """Return the (q, 5) best candidates of (q,) queries."""
    return candidates[queries].gather(1, scores[queries].topk(min(5, scores.shape[1]), dim=1).indices)


def rerank(scores: Tensor, positive: Tensor, before: Tensor) -> Tensor:
    """Return the rank of each query's best positive after re-ranking, 0 for the first. Ties count against.

    Args:
        scores: (n, k) matching scores of each query's candidates.
        positive: (n, k) bool.
        before: (n,) rank among all keys. It is kept where it is k or more. A positive that ties with the last candidates then
            does not count as a candidate, whether or not the sort kept it.
    """
    return torch.where(before < scores.shape[1], rank_of_positive(scores, positive), before)


class Shortlist:
    """The k best keys of each query by cosine in both directions, and their matching scores, which are filled in by image.

    Args:
        images: (n, E).
        texts: (m, E).

    Attributes:
        i2t: (n, k) cosines and (n, k) captions.
        t2i: (m, k) cosines and (m, k) images.
        i2t_itm: (n, k) matching scores, zero where another process fills them in.
        t2i_itm: (m, k).
    """

    def __init__(self, images: Tensor, texts: Tensor, k: int):
        self.i2t, self.t2i = topk(images, texts, k), topk(texts, images, k)
        self.i2t_itm, self.t2i_itm = torch.zeros_like(self.i2t[0]), torch.zeros_like(self.t2i[0])
        asked = self.t2i[1].flatten()  # (m * k,) images
        # positions in (m * k) at which an image is a candidate, by image
        self._by_image = asked.argsort(stable=True).split(asked.bincount(minlength=len(images)).tolist())

    def captions_of(self, image: int) -> Tensor:
        """Return the captions to match with an image: its candidates, then those whose candidate it is."""
        return torch.cat([self.i2t[1][image], self._by_image[image] // self.t2i[1].shape[1]])

    def fill(self, image: int, scores: Tensor) -> None:
        """Store the scores of `captions_of`."""
        own = self.i2t[1].shape[1]
        self.i2t_itm[image] = scores[:own]
        self.t2i_itm.view(-1)[self._by_image[image]] = scores[own:]


@dataclass
class EncodedImages:
    """Images with captions in the order of the source: (n, E) on the CPU, and n rows, ids and captions."""

    embeds: Tensor
    rows: list[int]
    ids: list[int]
    captions: list[tuple[str, ...]]
    bad: list[dict]


def encode_images(model: EvalModel, dataset: EvalDataset, batch_size: int) -> EncodedImages:
    """Encode every image that has a caption."""
    batches = ShardedBatches(model, dataset, batch_size)
    own = []
    for samples in captioned(batches):
        embeds = model.encode_images([image for image, _ in samples]).embed.float().cpu()
        own += [(raw.source_row, raw.image_id, raw.captions, e) for e, (_, raw) in zip(embeds.numpy(), samples)]
    found, bad = batches.gather(own)
    if not found:
        return EncodedImages(torch.zeros(0, 0), [], [], [], bad)
    rows, ids, captions, embeds = map(list, zip(*found))
    return EncodedImages(torch.stack([torch.from_numpy(e) for e in embeds]), rows, ids, captions, bad)


@dataclass
class Texts:
    """Encoded texts without their padding, on the CPU.

    Args:
        tokens: (T, D) of all texts, `Encoded.fusible`.
        lengths: (A,) tokens of each text.
        embeds: (A, E).
    """

    tokens: Tensor
    lengths: Tensor
    embeds: Tensor

    def __post_init__(self):
        self.starts = self.lengths.cumsum(0) - self.lengths

    def positions(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (c, L) rows of ``tokens`` of (c,) texts, and the (c, L) mask of real tokens."""
        lengths = self.lengths[texts, None]  # (c, 1)
        offsets = torch.arange(int(lengths.max()))  # (L,)
        return self.starts[texts, None] + offsets.minimum(lengths - 1), offsets < lengths

    def padded(self, texts: Tensor, device: torch.device) -> Encoded:
        """Return (c,) texts, padded to the longest."""
        rows, mask = self.positions(texts)
        tokens = self.tokens[rows].to(device)  # (c, L, D)
        return Encoded(tokens, mask.to(device), self.embeds[texts].to(device), inputs=tokens)


def encode_distinct(model: EvalModel, texts: list[str], batch_size: int) -> Texts:
    """Encode each text once, in one of the processes."""
    input_ids, mask, _ = model.tokenizer(texts, model.data.max_length)
    lengths, own, widths = mask.sum(1), [], (0, 0)
    for batch in length_batches(lengths, batch_size):
        longest = int(lengths[batch].max())
        ids, real = input_ids[batch, :longest].to(model.device), mask[batch, :longest].to(model.device)
        encoded = model.model.encode_text(ids, real)
        tokens, embeds = encoded.fusible[real].float().cpu(), encoded.embed.float().cpu()  # (tokens of the batch, D)
        own.append((batch, tokens, embeds))
        widths = (tokens.shape[1], embeds.shape[1])
    widths = max(gather_objects(widths))  # a process may have no batch
    found = Texts(torch.zeros(int(lengths.sum()), widths[0]), lengths, torch.zeros(len(lengths), widths[1]))
    for batch, tokens, embeds in own:
        rows, real = found.positions(batch)
        found.tokens[rows[real]], found.embeds[batch] = tokens, embeds
    for filled in (found.tokens, found.embeds):
        sum_disjoint(filled)
    return found


def match(model: Model, image: Encoded, texts: Texts, asked: Tensor, batch_size: int) -> Tensor:
    """Return the (c,) matching logits of one image with the (c,) texts ``asked``, on the CPU."""
    projected = model.project(image)
    padded = (texts.padded(part, image.tokens.device) for part in asked.split(batch_size))
    return torch.cat([model.match(projected, text)[:, 1].float().cpu() for text in padded])
