"""Image-text retrieval with two towers: recall at k, both ways, of every picture and every caption of a source."""

from __future__ import annotations

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
from vlp.tasks.embeddings import encode_pairs
from vlp.tasks.examples import Found
from vlp.tasks.metrics import Interval, bootstrap, ranks, top
from vlp.tasks.naming import protocol_name
from vlp.tasks.requirements import need_both


@dataclass(frozen=True)
class Retrieval(Task):
    """Cosine similarity of the embeddings; any caption of a picture counts (any-positive recall).

    Args:
        data: shards; None = ``data.val`` of the experiment.
        setting: of the protocol's name, where the run does not tell: see `vlp.tasks.base.protocol_name`.
        batch_size: pictures encoded at a time.
        ks: recalls are reported at these ranks.
        resamples: of the bootstrap, over pictures.
        examples: queries whose five best answers are kept for the report, of those drawn at random and of the hardest.
    """

    name = "retrieval"
    headline = "mean_recall"

    data: str | None = None
    setting: Literal["zero-shot", "fine-tuned"] | None = None
    batch_size: int = specs.setting(64, least=1, changes_result=False)
    ks: tuple[int, ...] = specs.setting((1, 5, 10), least=1, least_items=1)
    resamples: int = specs.setting(1000, least=0, changes_result=False)
    examples: int = specs.setting(12, least=0, changes_result=False)

    @property
    def plotted(self) -> tuple[str, ...]:
        return tuple(f"mean_r@{k}" for k in self.ks)

    def validate(self, data: Data) -> None:
        """Raises UserError where there is nothing to evaluate on."""
        source = self._source(data)
        if len(ShardReader(source)) == 0:
            raise UserError(f"the shards at {source} hold no sample with a picture")

    def _source(self, data: Data) -> str:
        source = self.data or data.val
        if source is None:
            raise UserError("retrieval has no data: give data=SHARDS, or set data.val in the config")
        return source

    def evaluated_images(self, data: Data) -> str:
        """The shards, see `vlp.tasks.contamination`."""
        return self._source(data)

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``i2t_r@k``, ``t2i_r@k`` and their mean ``mean_r@k`` for each k, and ``mean_recall`` over all of them."""
        need_both(subject, "retrieval")
        source = self._source(subject.data)
        pairs = encode_pairs(subject, source, self.batch_size)
        if len(pairs.texts) == 0:
            raise UserError(f"{source} holds no usable image-text pair; run `vlp data check` on it")
        found = {
            "i2t": (ranks(pairs.images, pairs.texts, pairs.image_ids, pairs.text_ids), pairs.image_ids),
            "t2i": (ranks(pairs.texts, pairs.images, pairs.text_ids, pairs.image_ids), pairs.text_ids),
        }
        place = {int(i): n for n, i in enumerate(pairs.image_ids)}
        details = Found(
            pairs.rows.tolist(),
            pairs.captions,
            torch.tensor([place[i] for i in pairs.text_ids.tolist()]),
            found["i2t"][0],
            found["t2i"][0],
            i2t_best=lambda queries: top(pairs.images[queries], pairs.texts, 5),
            t2i_best=lambda queries: top(pairs.texts[queries], pairs.images, 5),
        )
        return Result(
            protocol="itc-any-positive: cosine similarity of embeddings over the whole source, ties count against",
            name=protocol_name(subject, source, self.setting),
            data=source,
            n={"images": len(pairs.images), "captions": len(pairs.texts)},
            metrics=recalls(found, self.ks, subject.seed, self.resamples),
            details=details.examples(self.examples, subject.seed),
            bad=pairs.bad,
        )


def recalls(
    found: dict[str, tuple[Tensor, Tensor]], ks: tuple[int, ...], seed: int, resamples: int
) -> dict[str, Interval]:
    """``WAY_r@k`` and ``mean_r@k`` for each k, and ``mean_recall`` over all of them.

    Args:
        found: way -> (n,) rank of each query, 0 = first; (n,) id of the picture that it belongs to.
        resamples: of the bootstrap, over pictures.
    """
    metrics = {
        f"{way}_r@{k}": bootstrap((rank < k).numpy().astype(np.float64), ids.numpy(), seed, resamples)
        for way, (rank, ids) in found.items()
        for k in ks
    }
    metrics |= {f"mean_r@{k}": _mean(found, (k,), seed, resamples) for k in ks}
    return metrics | {"mean_recall": _mean(found, ks, seed, resamples)}


def _mean(found: dict[str, tuple[Tensor, Tensor]], ks: tuple[int, ...], seed: int, resamples: int) -> Interval:
    """Mean over both ways and ``ks``; pictures are resampled together with their captions.

    Each way weighs the same, whatever the number of captions.
    """
    values, groups = [], []
    total = sum(len(rank) for rank, _ in found.values())
    for rank, ids in found.values():
        hits = np.mean([(rank < k).numpy() for k in ks], axis=0)
        values.append(hits * total / (len(found) * len(rank)))
        groups.append(ids.numpy())
    return bootstrap(np.concatenate(values), np.concatenate(groups), seed, resamples)
