"""Image-text retrieval by the embeddings of two towers: recall at k in both directions.

n images, m captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlp.config import Data
from vlp.data.reading.shards import ShardReader
from vlp.errors import UserError
from vlp.specs import fields as specs
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.details import RetrievalRanking
from vlp.tasks.embeddings import encode_pairs
from vlp.tasks.metrics import Interval, bootstrap, ranks, topk
from vlp.tasks.naming import protocol_name
from vlp.tasks.requirements import need_embeddings


@dataclass(frozen=True)
class Retrieval(Task):
    """Retrieve captions by image and images by caption, by cosine similarity of the embeddings.

    Any caption of an image counts as correct (any-positive recall). Metrics are ``i2t_r@k``, ``t2i_r@k`` and their mean
    ``mean_r@k`` for each k, and ``mean_recall`` over all k.

    Args:
        data: Shards. None uses ``data.val`` of the experiment.
        setting: Part of the protocol's name where the run does not tell it, see `vlp.tasks.naming.protocol_name`.
        batch_size: Images encoded at a time.
        ks: Ranks at which recalls are reported.
        resamples: Bootstrap resamples, over images.
        examples: Queries whose five best answers are kept for the report, of random ones and of the hardest ones.
    """

    name = "retrieval"
    headline = "mean_recall"

    data: str | None = None
    setting: Literal["zero-shot", "fine-tuned"] | None = specs.setting(None, changes_result=False)
    batch_size: int = specs.setting(64, least=1, changes_result=False)
    ks: tuple[int, ...] = specs.setting((1, 5, 10), least=1, least_items=1)
    resamples: int = specs.setting(1000, least=0, changes_result=False)
    examples: int = specs.setting(12, least=0, changes_result=False)

    @property
    def plotted(self) -> tuple[str, ...]:
        return tuple(f"mean_r@{k}" for k in self.ks)

    def metric_names(self) -> tuple[str, ...]:
        return recall_names(self.ks)

    def validate(self, data: Data) -> None:
        source = self.source(data)
        if len(ShardReader(source)) == 0:
            raise UserError(f"the shards at {source} have no sample with an image; give other data")

    def evaluated_images(self, data: Data) -> str:
        return self.source(data)

    def source(self, data: Data) -> str:
        """Return the location of the evaluated shards."""
        source = self.data or data.val
        if source is None:
            raise UserError(f"{self.name} has no data; give data=SHARDS, or set data.val in the config")
        return source

    def evaluate(self, model: EvalModel) -> Result:
        need_embeddings(model, self.name)
        source = self.source(model.data)
        pairs = encode_pairs(model, source, self.batch_size)
        if len(pairs.texts) == 0:
            raise UserError(f"{source} has no usable image-text pair; run `vlp data check` on it")
        i2t_rank = ranks(pairs.images, pairs.texts, pairs.image_ids, pairs.text_ids)
        t2i_rank = ranks(pairs.texts, pairs.images, pairs.text_ids, pairs.image_ids)
        position = {image_id: n for n, image_id in enumerate(pairs.image_ids.tolist())}
        ranking = RetrievalRanking(
            pairs.rows.tolist(),
            pairs.captions,
            torch.tensor([position[image_id] for image_id in pairs.text_ids.tolist()]),
            i2t_rank,
            t2i_rank,
            i2t_best=lambda queries: topk(pairs.images[queries], pairs.texts, 5)[1],
            t2i_best=lambda queries: topk(pairs.texts[queries], pairs.images, 5)[1],
        )
        by_direction = {"i2t": (i2t_rank, pairs.image_ids), "t2i": (t2i_rank, pairs.text_ids)}
        return Result(
            protocol="itc-any-positive: cosine similarity of embeddings over the whole source, ties count against",
            name=protocol_name(model, source, self.setting),
            data=source,
            n={"images": len(pairs.images), "captions": len(pairs.texts)},
            metrics=recalls(by_direction, self.ks, model.seed, self.resamples),
            details=ranking.examples(self.examples, model.seed),
            bad=pairs.bad,
            choices=len(pairs.images),
        )


def recall_names(ks: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the metrics of `recalls`."""
    return (*(f"{direction}_r@{k}" for direction in ("i2t", "t2i", "mean") for k in ks), "mean_recall")


def recalls(
    by_direction: dict[str, tuple[Tensor, Tensor]], ks: tuple[int, ...], seed: int, resamples: int
) -> dict[str, Interval]:
    """Compute ``DIRECTION_r@k`` and ``mean_r@k`` for each k, and ``mean_recall`` over all k.

    Args:
        by_direction: Direction -> (n,) rank of each query, 0 for the first, and (n,) id of the image that it belongs to.
        resamples: Bootstrap resamples, over images.
    """
    metrics = {
        f"{direction}_r@{k}": bootstrap((rank < k).numpy().astype(np.float64), image_ids.numpy(), seed, resamples)
        for direction, (rank, image_ids) in by_direction.items()
        for k in ks
    }
    metrics |= {f"mean_r@{k}": _mean(by_direction, (k,), seed, resamples) for k in ks}
    return metrics | {"mean_recall": _mean(by_direction, ks, seed, resamples)}


def _mean(by_direction: dict[str, tuple[Tensor, Tensor]], ks: tuple[int, ...], seed: int, resamples: int) -> Interval:
    """Average over both directions and ``ks``. An image and its captions are resampled together."""
    values, groups = [], []
    total = sum(len(rank) for rank, _ in by_direction.values())
    for rank, image_ids in by_direction.values():
        hits = np.mean([(rank < k).numpy() for k in ks], axis=0)
        # both directions have the same weight, although there are more captions than images
        values.append(hits * total / (len(by_direction) * len(rank)))
        groups.append(image_ids.numpy())
    return bootstrap(np.concatenate(values), np.concatenate(groups), seed, resamples)
