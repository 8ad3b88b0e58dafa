"""Accuracy on minimal pairs: a scene's caption against a caption of the same words in another order, on a synthetic world.

B scenes, n texts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from vlp.config import Data
from vlp.data.reading.shards import ShardReader
from vlp.data.stream import EvalDataset
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.metrics import bootstrap
from vlp.tasks.requirements import need_embeddings
from vlp.tasks.sharded import ShardedBatches


@dataclass(frozen=True)
class MinimalPairs(Task):
    """Share of scenes whose own caption scores higher than the caption of their minimal pair.

    Chance is 50 %, and a tie counts one half. Metrics are ``accuracy``, the same by the kind of difference
    (``accuracy_order``, ``_shape``, ``_colour``) and by the number of things in the scene (``accuracy_2_things``, ...).

    Args:
        data: Folder of a world made by `vlp data world`. None uses the one that ``data.val`` of the experiment belongs to.
        split: Split of the world. The captions of val are never swapped.
        score: "itm", the logit of image-text matching, or "itc", the cosine of the embeddings: what the two towers know
            without fusion. None takes "itm" where the model has a matching head.
        batch_size: Scenes at a time.
        resamples: Bootstrap resamples, over minimal pairs. The two scenes of a pair are drawn together.
        blind: Whether to evaluate a second time with the images of other samples. A metric that is as high without the right
            image says nothing about reading it. Doubles the cost.
    """

    name = "minimal-pairs"
    headline = "accuracy"

    data: str | None = None
    split: str = "val"
    score: Literal["itm", "itc"] | None = None
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)
    blind: bool = setting(True, changes_result=False)

    def validate(self, data: Data) -> None:
        reader = ShardReader(self._source(data))
        if len(reader) == 0 or "minimal_pair" not in reader.read(*reader.locate(0)).meta:
            raise UserError(f"{self._source(data)} has no scenes with a minimal pair; make some with vlp data world")

    def evaluated_images(self, data: Data) -> str:
        return self._source(data)

    def _source(self, data: Data) -> str:
        if not self.data and not data.val:
            raise UserError("minimal-pairs has no data; give data=FOLDER, made by vlp data world")
        # a Path would make one slash of the two of a URL
        return os.path.join(self.data or os.path.dirname(data.val.rstrip("/")), self.split)

    def evaluate(self, model: EvalModel) -> Result:
        score = self.score or ("itm" if model.model.can_match else "itc")
        if score == "itc":
            need_embeddings(model, self.name)
        elif not model.model.can_match:
            raise UserError("score=itm needs a model with a head for image-text matching (model.itm); set score=itc")
        data, source = model.data, self._source(model.data)
        dataset = EvalDataset(source, data.resize, model.preprocess, data.max_pixels)
        batches = ShardedBatches(model, dataset, self.batch_size)
        rows = []
        for samples in batches:
            scenes = [raw for _, raw in samples]
            texts = [raw.captions[0] for raw in scenes] + [raw.meta["minimal_pair"] for raw in scenes]
            own, other = score_texts(model, [image for image, _ in samples], texts, score).chunk(2)  # (B,) each
            hits = ((own > other).double() + (own == other) / 2).tolist()
            # scenes 2 p and 2 p + 1 are pair p
            rows += [
                (raw.source_row, raw.meta["number"] // 2, raw.meta["contrast"], len(raw.meta["things"]), hit)
                for raw, hit in zip(scenes, hits)
            ]
        rows, bad = batches.gather(rows)
        if not rows:
            raise UserError(f"{source} has no usable scene; run `vlp data check` on it")
        _, pairs, contrasts, counts, hits = map(np.array, zip(*rows))
        subsets = {"accuracy": np.ones(len(hits), bool)}
        subsets |= {f"accuracy_{contrast}": contrasts == contrast for contrast in sorted(set(contrasts.tolist()))}
        subsets |= {f"accuracy_{count}_things": counts == count for count in sorted(set(counts.tolist()))}
        by = "the matching logit" if score == "itm" else "cosine"
        return Result(
            protocol=f"own caption against the minimal pair's, by {by}, a tie is half a hit",
            data=source,
            n={"scenes": len(hits)},
            metrics={
                name: bootstrap(hits[subset], pairs[subset], model.seed, self.resamples)
                for name, subset in subsets.items()
            },
            bad=bad,
        )


def score_texts(model: EvalModel, images: list[Tensor], texts: list[str], score: Literal["itm", "itc"]) -> Tensor:
    """Score texts with images.

    Args:
        images: B resized (3, H, W) uint8 images.
        texts: n texts, a multiple of B. Text i belongs to image i modulo B.
        score: See `MinimalPairs`.

    Returns:
        (n,) scores on the CPU.

    Raises:
        UserError: if a score is not finite.
    """
    image, text = model.encode_images(images), model.encode_texts(texts)
    if score == "itm":
        scores = model.model.match(model.model.project(image), text)[:, 1]
    else:
        scores = (text.embed.unflatten(0, (-1, len(images))) * image.embed).sum(-1).flatten()  # (n / B, B, E) -> (n,)
    if not scores.isfinite().all():
        raise UserError("the model's scores are not finite; choose another checkpoint")
    return scores.float().cpu()
