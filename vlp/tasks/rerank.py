"""Retrieval by ITC, and the best of it put in order by ITM (ALBEF, Li et al. 2021, sec. 4.1).

Pairs are grouped by picture: its keys and values are projected once for all captions that ask for it or that it asks for,
either way, and a pair that both ways ask for is scored once. Tokens of pictures are not kept, those of texts are: of 5,000
pictures at 384 px the former are 9 GB, the tokens of 25,000 captions 1 GB. So pictures are encoded twice.

n pictures, m captions, A distinct texts, L tokens of the longest, T tokens of all, D width, E embedding, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlp.data.stream import EvalDataset, evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, evaluating
from vlp.tasks.embeddings import merge
from vlp.tasks.examples import Found
from vlp.tasks.metrics import ranks
from vlp.tasks.naming import protocol_name
from vlp.tasks.requirements import need_both
from vlp.tasks.retrieval import Retrieval, recalls
from vlp.types import Encoded


@dataclass(frozen=True)
class Rerank(Retrieval):
    """As `Retrieval`, with the first k answers of each query in the order of their matching scores.

    A query that finds nothing of its own among the first k keeps its rank.

    Args:
        k: candidates of each query (published: 256 on COCO, 128 on Flickr30k).
        score: the logit of a match alone, as published, or the cosine added to it, as in LAVIS.
        text_batch: texts encoded, or matched with a picture, at a time.
    """

    name = "rerank"

    k: int = setting(128, least=1)
    score: Literal["itm", "itm+itc"] = "itm"
    text_batch: int = setting(256, least=1, changes_result=False)

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: as `Retrieval`'s; behind ``itc_`` the same without re-ranking."""
        if getattr(subject.model, "itm", None) is None:
            raise UserError("rerank needs a model with a head for image-text matching (model.itm); use retrieval")
        if not getattr(subject.model, "itc", True):
            raise UserError(
                "rerank needs embeddings to choose candidates by, and this model has none (model.itc=false)"
            )
        need_both(subject, "rerank")
        data, source = subject.data, self._source(subject.data)
        dataset = EvalDataset(source, data.resize, subject.preprocess, data.max_pixels)
        with evaluating(subject.model):
            pictures = encode_pictures(subject, dataset, self.batch_size)
            if not pictures.rows:
                raise UserError(f"{source} holds no usable image-text pair; run `vlp data check` on it")
            captions = [c for own in pictures.captions for c in own]
            number = {text: n for n, text in enumerate(dict.fromkeys(captions))}
            texts = encode_distinct(subject, list(number), self.text_batch)
            text_of = torch.tensor([number[c] for c in captions])
            shortlist = Shortlist(pictures.embeds, texts.embeds[text_of], self.k)
            pairs = self._match(subject, dataset, pictures.rows, shortlist, texts, text_of)
        metrics, found = self._metrics(pictures, shortlist, texts.embeds[text_of], subject.seed)
        return Result(
            protocol=f"{self.score}-of-itc-top-{self.k}: each query's {self.k} best by cosine similarity in the order of "
            f"{'the matching logit' if self.score == 'itm' else 'the matching logit + cosine'}, the others behind them; "
            "any caption of a picture counts, ties count against",
            name=protocol_name(subject, source, self.setting),
            data=source,
            n={"images": len(pictures.rows), "captions": len(captions), "pairs": pairs},
            metrics=metrics,
            details=found.examples(self.examples, subject.seed),
            bad=pictures.bad,
        )

    def _match(
        self,
        subject: EvalModel,
        dataset: EvalDataset,
        rows: list[int],
        shortlist: Shortlist,
        texts: Texts,
        text_of: Tensor,
    ) -> int:
        """Fills in the scores; returns how many pairs were scored."""
        model, place = subject.model, {row: n for n, row in enumerate(rows)}
        pairs = 0
        for samples, _ in evaluation_batches(
            dataset, self.batch_size, subject.data.workers, subject.rank, world_size()
        ):
            samples = [(image, place[raw.source_row]) for image, raw in samples if raw.source_row in place]
            if not samples:
                continue
            pixels = torch.stack([image for image, _ in samples]).to(subject.device)
            encoded = model.encode_image(subject.preprocess.normalise(pixels))
            for n, (_, picture) in enumerate(samples):
                asked, back = text_of[shortlist.captions_of(picture)].unique(return_inverse=True)
                shortlist.fill(picture, match(model, encoded[n : n + 1], texts, asked, self.text_batch)[back])
                pairs += len(asked)
        for scores in (shortlist.i2t_itm, shortlist.t2i_itm):
            if not merge(scores).isfinite().all():
                raise UserError("the model's matching scores are not finite; choose another checkpoint")
        return sum(gather_objects(pairs))

    def _metrics(self, pictures: Pictures, shortlist: Shortlist, texts: Tensor, seed: int) -> tuple[dict, Found]:
        image_ids = torch.tensor(pictures.ids)
        picture_of = torch.arange(len(pictures.rows)).repeat_interleave(
            torch.tensor([len(own) for own in pictures.captions])
        )
        text_ids = image_ids[picture_of]
        plus = 1.0 if self.score == "itm+itc" else 0.0
        itc, found, best_five = {}, {}, {}
        for way, queries, keys, query_ids, key_ids, itm, cosine, candidates in (
            ("i2t", pictures.embeds, texts, image_ids, text_ids, shortlist.i2t_itm, *shortlist.i2t),
            ("t2i", texts, pictures.embeds, text_ids, image_ids, shortlist.t2i_itm, *shortlist.t2i),
        ):
            before, scores = ranks(queries, keys, query_ids, key_ids), itm + plus * cosine
            positive = query_ids[:, None] == key_ids[candidates]
            itc[way], found[way] = (before, query_ids), (rerank(scores, positive, before), query_ids)
            best_five[way] = partial(_best_five, scores, candidates)
        without = recalls(itc, self.ks, seed, self.resamples)
        metrics = recalls(found, self.ks, seed, self.resamples) | {f"itc_{name}": i for name, i in without.items()}
        captions = [c for own in pictures.captions for c in own]
        of_ways = (found["i2t"][0], found["t2i"][0], best_five["i2t"], best_five["t2i"])
        return metrics, Found(pictures.rows, captions, picture_of, *of_ways)


def _best_five(scores: Tensor, candidates: Tensor, queries: Tensor) -> Tensor:
    """(q, 5) candidates of (q,) queries, the best first."""
    return candidates[queries].gather(1, scores[queries].topk(min(5, scores.shape[1]), dim=1).indices)


def rerank(scores: Tensor, positive: Tensor, before: Tensor) -> Tensor:
    """Rank of the best-placed positive of each query, 0 = first; a negative that ties with it counts as ahead of it.

    Args:
        scores: (n, k) of each query's candidates.
        positive: (n, k) bool.
        before: (n,) rank among all keys; it stays where it is k or more. A positive that ties with the last candidates is
            then none of them, whatever the sort made of it.
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    return torch.where(before < scores.shape[1], ((scores >= best) & ~positive).sum(1), before)


class Shortlist:
    """The k best keys of each query by cosine, both ways, and room for their matching scores, by picture.

    Args:
        images: (n, E).
        texts: (m, E).

    Attributes:
        i2t: (n, k) cosines and (n, k) captions; t2i: (m, k) and pictures.
        i2t_itm, t2i_itm: (n, k) and (m, k) matching scores; zero where another process fills them in.
    """

    def __init__(self, images: Tensor, texts: Tensor, k: int):
        self.i2t, self.t2i = best(images, texts, k), best(texts, images, k)
        self.i2t_itm, self.t2i_itm = torch.zeros_like(self.i2t[0]), torch.zeros_like(self.t2i[0])
        asked = self.t2i[1].flatten()
        self._by_picture = asked.argsort(stable=True).split(asked.bincount(minlength=len(images)).tolist())

    def captions_of(self, picture: int) -> Tensor:
        """The captions to match with a picture: those that it asks for, then those that ask for it."""
        return torch.cat([self.i2t[1][picture], self._by_picture[picture] // self.t2i[1].shape[1]])

    def fill(self, picture: int, scores: Tensor) -> None:
        """Scores of `captions_of`."""
        own = self.i2t[1].shape[1]
        self.i2t_itm[picture] = scores[:own]
        self.t2i_itm.view(-1)[self._by_picture[picture]] = scores[own:]


def best(queries: Tensor, keys: Tensor, k: int, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """(n, k) cosines and (n, k) numbers of the k most similar keys, the best first; chunk * m scores are held."""
    found = [(part @ keys.T).topk(min(k, len(keys)), dim=1) for part in queries.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


@dataclass
class Pictures:
    """Pictures with captions, in the source's order: (n, E) on the CPU, and n numbers of samples, ids, captions."""

    embeds: Tensor
    rows: list[int]
    ids: list[int]
    captions: list[tuple[str, ...]]
    bad: list[dict]


def encode_pictures(subject: EvalModel, dataset: EvalDataset, batch_size: int) -> Pictures:
    """The batches are the same for any number of processes, which share them out."""
    own, bad = [], []
    for samples, unusable in evaluation_batches(dataset, batch_size, subject.data.workers, subject.rank, world_size()):
        bad += unusable + [
            dataset.reader.quarantine_entry(raw.shard, raw.row, "no caption") for _, raw in samples if not raw.captions
        ]
        samples = [(image, raw) for image, raw in samples if raw.captions]
        if samples:
            pixels = torch.stack([image for image, _ in samples]).to(subject.device)
            embeds = subject.model.encode_image(subject.preprocess.normalise(pixels)).embed.float().cpu()
            own += [(raw.source_row, raw.image_id, raw.captions, e) for e, (_, raw) in zip(embeds.numpy(), samples)]
    found = sorted((row for part in gather_objects(own) for row in part), key=lambda row: row[0])
    rows, ids, captions, embeds = map(list, zip(*found)) if found else ([], [], [], [])
    return Pictures(
        torch.stack([torch.from_numpy(e) for e in embeds]) if found else torch.zeros(0, 0),
        rows,
        ids,
        captions,
        [b for part in gather_objects(bad) for b in part],
    )


@dataclass
class Texts:
    """Encoded texts without their padding, on the CPU.

    Args:
        tokens: (T, D) of all texts, `Encoded.fusible`.
        lengths: (A,) tokens of each.
        embeds: (A, E).
    """

    tokens: Tensor
    lengths: Tensor
    embeds: Tensor

    def __post_init__(self):
        self.starts = self.lengths.cumsum(0) - self.lengths

    def positions(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """(c, L) rows of ``tokens`` for (c,) texts, and (c, L) whether there is a token."""
        lengths = self.lengths[texts, None]
        offsets = torch.arange(int(lengths.max()))
        return self.starts[texts, None] + offsets.minimum(lengths - 1), offsets < lengths

    def take(self, texts: Tensor, device: torch.device) -> Encoded:
        """(c,) texts, padded."""
        rows, mask = self.positions(texts)
        tokens = self.tokens[rows].to(device)
        return Encoded(tokens, mask.to(device), self.embeds[texts].to(device), inputs=tokens)


def encode_distinct(subject: EvalModel, texts: list[str], batch_size: int) -> Texts:
    """Each text once, by one of the processes, in batches of similar length that do not depend on their number."""
    input_ids, mask, _ = subject.tokenizer(texts, subject.data.max_length)
    lengths, own, widths = mask.sum(1), [], (0, 0)
    for batch in lengths.argsort(stable=True).split(batch_size)[subject.rank :: world_size()]:
        width = int(lengths[batch].max())
        given = input_ids[batch, :width].to(subject.device), mask[batch, :width].to(subject.device)
        encoded = subject.model.encode_text(*given)
        tokens, embeds = encoded.fusible[given[1]].float().cpu(), encoded.embed.float().cpu()
        own.append((batch, tokens, embeds))
        widths = (tokens.shape[1], embeds.shape[1])
    widths = max(gather_objects(widths))
    found = Texts(torch.zeros(int(lengths.sum()), widths[0]), lengths, torch.zeros(len(lengths), widths[1]))
    for batch, tokens, embeds in own:
        rows, real = found.positions(batch)
        found.tokens[rows[real]], found.embeds[batch] = tokens, embeds
    for filled in (found.tokens, found.embeds):
        merge(filled)
    return found


def match(model, image: Encoded, texts: Texts, asked: Tensor, batch_size: int) -> Tensor:
    """(c,) logits of a match, on the CPU, of one picture with the (c,) texts that are asked for."""
    projected = model.project(image)
    given = (texts.take(part, image.tokens.device) for part in asked.split(batch_size))
    return torch.cat([model.match(projected, text)[:, 1].float().cpu() for text in given])
