"""Image-text contrast: ALIGN's and CLIP's normalised softmax, SigLIP's pairwise sigmoid, ALBEF's momentum queues.

Each process compares its own rows with the keys of all processes. The mean over processes is then the loss, and the gradient,
of one process with the whole batch, for the temperature too.

B rows of a bundle, M rows of all processes and micro-batches, K rows of a queue, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Bundle, Forward, Head, Scope
from vlp.losses.inputs import in_float32
from vlp.losses.sigmoid import sigmoid_loss
from vlp.losses.softmax import info_nce, soft_info_nce
from vlp.losses.tiled import tiled_info_nce, tiled_sigmoid_loss
from vlp.models.base import Model
from vlp.objectives.base import Objective
from vlp.objectives.distillation import DistilledObjective
from vlp.objectives.queues import Queue
from vlp.objectives.requirements import require_contrast, require_momentum
from vlp.specs.fields import setting

REMEDY = "try another optim.lr, a longer warm-up, another temperature, a larger batch, pre-trained towers"


@dataclass(frozen=True)
class ImageTextContrast(Objective):
    """Symmetric contrastive loss L_i2t + L_t2i (Jia et al. 2021, eq. 1-2; Radford et al. 2021, fig. 3).

    Args:
        label_smoothing: Share of the target spread evenly over all keys (ALIGN 0.1, CLIP 0).
        reduction: "sum" of both directions (ALIGN's paper) or their "mean" (CLIP, transformers' AlignModel).
        tile_rows: Rows of the similarity matrix computed at a time, for large batches; None computes all at once.
        head: Contrastive head that gives embeddings and temperature; VLMo has a second, "vl".
    """

    min_rows: ClassVar[int] = 2
    remedy: ClassVar[str] = REMEDY

    label_smoothing: float = setting(0.0, least=0, most=1)
    reduction: Literal["sum", "mean"] = "mean"
    tile_rows: int | None = setting(None, least=1)
    head: Head = "first"

    def validate(self, experiment: Experiment) -> None:
        require_contrast(experiment, "ImageTextContrast", self.head)

    def __call__(self, f: Forward) -> Tensor:
        f = f.with_head(self.head)
        image, text, all_image, all_text = f.image.embed, f.text.embed, f.all.image, f.all.text  # (B, E), (M, E)
        total = self._loss(f, image, all_text) + self._loss(f, text, all_image)
        return total / 2 if self.reduction == "mean" else total

    def chance(self, f: Forward) -> float:
        level = math.log(f.all.num_rows)  # equal similarities, whatever the targets are
        return level if self.reduction == "mean" else 2 * level

    def _loss(self, f: Forward, queries: Tensor, keys: Tensor) -> Tensor:
        rest = (f.scale, f.batch.image_id, f.all.image_id, self.label_smoothing)
        if self.tile_rows is None:
            return info_nce(queries, keys, *rest)
        return tiled_info_nce(queries, keys, *rest, tile_rows=self.tile_rows)


@dataclass(frozen=True)
class SigmoidContrast(Objective):
    """Sigmoid loss over all pairs: ``-1/B sum_ij log sigmoid(z_ij (t x_i.y_j + b))`` (Zhai et al. 2023, eq. 1).

    Args:
        tile_rows: Rows of the similarity matrix computed at a time, for large batches; None computes all at once.
    """

    min_rows: ClassVar[int] = 2

    tile_rows: int | None = setting(None, least=1)

    def validate(self, experiment: Experiment) -> None:
        require_contrast(experiment, "SigmoidContrast")
        if experiment.model.bias is None:
            raise UserError("SigmoidContrast needs a model with a learned bias; set model.bias=-10 of a Dual")

    def __call__(self, f: Forward) -> Tensor:
        assert f.model.bias is not None  # validate has checked it
        inputs = (f.image.embed, f.all.text, f.scale, f.model.bias, f.batch.image_id, f.all.image_id)
        if self.tile_rows is None:
            return sigmoid_loss(*inputs)
        return tiled_sigmoid_loss(*inputs, tile_rows=self.tile_rows)


@dataclass(frozen=True)
class MomentumContrast(DistilledObjective):
    """ALBEF's ITC: the momentum encoder gives keys, queued keys of earlier steps, and soft targets (Li et al. 2021, eq. 1, 6).

    ``1/2B sum over both directions -sum_j y_ij log softmax_j(s_ij)``, ``s_ij = scale * q_i . k_j``, q of the model, k of the
    momentum encoder: those of the batch, then the queue. ``y = (1 - a) y_true + a softmax_j(scale * q'_i . k_j)``, q' of the
    momentum encoder. Gradient flows to q and the temperature. The teacher uses the model's temperature, as published. Needs
    ``momentum``.

    Args:
        distill: a.
        ramp_epochs: Epochs over which a grows linearly from 0; ALBEF's is 1, LAVIS's 2.
        queue_size: K of images and of texts, any length.
        random_start: Fill the queues with random vectors at the start, as published. Otherwise they start empty and grow.
        keys: Keys of the batch: those of all processes ("global"), so that the gradient is that of one process with the
            whole batch, or of this process ("local"), as published. The queue gets those of all.
        duplicates: Keys that show a row's own image, several captions' or the queue's: "positive" makes them positives in
            equal shares, "negative" makes all but the row's own pair negatives, as in the published pre-training.
        head: Contrastive head that gives embeddings and temperature; VLMo has a second, "vl".
    """

    remedy: ClassVar[str] = REMEDY

    distill: float = setting(0.4, least=0, most=1)
    ramp_epochs: float = setting(1.0, least=0)
    queue_size: int = setting(65_536, least=1)
    random_start: bool = False
    keys: Scope = "global"
    duplicates: Literal["positive", "negative"] = "positive"
    head: Head = "first"

    def validate(self, experiment: Experiment) -> None:
        super().validate(experiment)
        require_contrast(experiment, "MomentumContrast", self.head)
        require_momentum(experiment, "MomentumContrast")

    def init_queue(self, model: Model, num_samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        columns = {"image": model.embed_size, "text": model.embed_size}
        return Queue(self.queue_size, columns, device, generator if self.random_start else None)

    def __call__(self, f: Forward) -> Tensor:
        f = f.with_head(self.head)
        share = self.teacher_share(f)
        logits = self.similarity(f, f)
        with torch.no_grad():
            targets = [self.targets(f)] * 2
            if share:
                soft = [each.softmax(1) for each in self.similarity(f, f.momentum)]
                targets = [torch.lerp(true, taught, share) for true, taught in zip(targets, soft)]
        i2t, t2i = (soft_info_nce(each, target) for each, target in zip(logits, targets))
        return (i2t + t2i) / 2

    def chance(self, f: Forward) -> float:
        return math.log(f.scope(self.keys).num_rows + len(f.context.queues[self]))

    def similarity(self, f: Forward, queries: Bundle) -> tuple[Tensor, Tensor]:
        """Return two (B, M + K) similarities, divided by the temperature: images to texts and texts to images.

        Args:
            queries: The bundle whose embeddings are compared with the keys: ``f`` or its momentum encoder's.
        """
        keys, queue = f.scope(self.keys).momentum, f.context.queues[self]
        i2t = scaled_similarity(queries.image.embed, keys.text, queue["text"], f.scale)
        return i2t, scaled_similarity(queries.text.embed, keys.image, queue["image"], f.scale)

    def targets(self, f: Forward) -> Tensor:
        """Return the (B, M + K) true distribution of both directions; rows sum to 1."""
        keys = f.scope(self.keys)
        ids = torch.cat([keys.image_id, f.context.queues[self].image_id])  # (M + K,)
        if self.duplicates == "negative":
            positive = keys.rows[:, None] == torch.arange(len(ids), device=ids.device)
        else:
            positive = f.batch.image_id[:, None] == ids
        return positive.to(f.image.embed.dtype) / positive.sum(1, keepdim=True)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        keys = f.with_head(self.head).all
        return {"image_id": keys.image_id, "image": keys.momentum.image, "text": keys.momentum.text}


@in_float32
def scaled_similarity(queries: Tensor, keys: Tensor, queue: Tensor, scale: Tensor) -> Tensor:
    """Multiply cosines by ``scale``: (B, E), (M, E) and (K, E) of unit norm to (B, M + K)."""
    queries = scale * queries
    return torch.cat([queries @ keys.T, queries @ queue.T.to(queries.dtype)], dim=1)
