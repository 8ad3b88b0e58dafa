"""Image-text contrast: ALIGN's and CLIP's normalised softmax, SigLIP's pairwise sigmoid, ALBEF's momentum queues.

Each process takes its own rows against the keys of all processes, so that the mean over processes is the loss, and its
gradient, of one process with the whole batch - for the temperature too.

B rows of this process, M rows of all processes, K rows of a queue, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.distributed import gather
from vlp.errors import UserError
from vlp.forward import Among, Forward, Head
from vlp.losses.inputs import in_float32
from vlp.losses.sigmoid import sigmoid_loss
from vlp.losses.softmax import info_nce, soft_info_nce
from vlp.losses.tiled import tiled_info_nce, tiled_sigmoid_loss
from vlp.objectives.needs import need_contrast, need_momentum
from vlp.objectives.queues import Queue


@dataclass(frozen=True)
class ImageTextContrast:
    """Symmetric contrastive loss L_i2t + L_t2i (Jia et al. 2021, eq. 1-2; Radford et al. 2021, fig. 3).

    Args:
        label_smoothing: share of the target spread evenly over all keys (ALIGN 0.1, CLIP 0).
        reduction: "sum" of both directions (ALIGN's paper) or their "mean" (CLIP, transformers' AlignModel).
        tile_rows: rows of the similarity matrix held at a time, for large batches; None = all.
        head: of the model, by which embeddings and temperature are meant; VLMo has a second, "vl".
    """

    supports_grad_cache: ClassVar[bool] = True  # see vlp.training.grad_cache
    weight: float = 1.0
    label_smoothing: float = 0.0
    reduction: Literal["sum", "mean"] = "mean"
    tile_rows: int | None = None
    head: Head = "first"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_contrast(experiment, "ImageTextContrast", self.head)

    def __call__(self, f: Forward) -> Tensor:
        f = f.with_head(self.head)

        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            rest = (f.model.scale, f.batch.image_id, f.keys.image_id, self.label_smoothing)
            if self.tile_rows is None:
                return info_nce(queries, keys, *rest)
            return tiled_info_nce(queries, keys, *rest, tile_rows=self.tile_rows)

        total = loss(f.image.embed, f.keys.text) + loss(f.text.embed, f.keys.image)
        return total / 2 if self.reduction == "mean" else total


@dataclass(frozen=True)
class SigmoidContrast:
    """Every pair judged by itself: -1/B sum_ij log sigmoid(z_ij (t x_i.y_j + b)) (Zhai et al. 2023, eq. 1).

    Args:
        tile_rows: rows of the similarity matrix held at a time, for large batches; None = all.
    """

    supports_grad_cache: ClassVar[bool] = True  # see vlp.training.grad_cache
    weight: float = 1.0
    tile_rows: int | None = None

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_contrast(experiment, "SigmoidContrast")
        bias = getattr(experiment.model, "bias", None)
        if bias is None and getattr(experiment.model, "towers", None) is None:
            raise UserError("SigmoidContrast needs a model with a learned bias; set model.bias=-10 of a Dual")

    def __call__(self, f: Forward) -> Tensor:
        given = (f.image.embed, f.keys.text, f.model.scale, f.model.bias, f.batch.image_id, f.keys.image_id)
        if self.tile_rows is None:
            return sigmoid_loss(*given)
        return tiled_sigmoid_loss(*given, tile_rows=self.tile_rows)


@dataclass(frozen=True)
class MomentumContrast:
    """ALBEF's ITC: the momentum encoder's embeddings as keys, newer ones in queues, and as teacher (Li et al. 2021, eq. 1, 6).

    ``1/2B sum over both ways -sum_j y_ij log softmax_j(s_ij)``, ``s_ij = scale * q_i . k_j``, q of the model, k of the momentum
    encoder: those of the batch, then the queue. ``y = (1 - a) y_true + a softmax_j(scale * q'_i . k_j)``, q' of the momentum
    encoder. Gradient flows to q and the temperature; the teacher has the model's temperature, as published. Needs ``momentum``.

    Args:
        queue_size: K of images and of texts, of any length.
        random_start: queues full of random vectors at the start, as published; False = they start empty and grow.
        keys: the batch's keys that rows see: those of "all" processes, so that the gradient is that of one process with
            the whole batch, or of this "process", as published. The queue gets those of all.
        same_picture: keys of a row's own picture, several captions' or the queue's: "positive", in equal shares, or, as in
            the published pre-training, "negative" but for the row's own pair.
        distill: a; 0 = the momentum encoder does not teach.
        ramp_epochs: over which a grows linearly from 0; ALBEF's is 1, LAVIS's 2.
        head: of the model, by which embeddings and temperature are meant; VLMo has a second, "vl".
    """

    supports_grad_cache: ClassVar[bool] = True  # see vlp.training.grad_cache
    weight: float = 1.0
    queue_size: int = 65_536
    random_start: bool = False
    keys: Among = "all"
    same_picture: Literal["positive", "negative"] = "positive"
    distill: float = 0.4
    ramp_epochs: float = 1.0
    head: Head = "first"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_contrast(experiment, "MomentumContrast", self.head)
        need_momentum(experiment, "MomentumContrast")
        if self.queue_size < 1:
            raise UserError(f"MomentumContrast has queue_size={self.queue_size}; give at least 1 row")
        if not 0 <= self.distill <= 1:
            raise UserError(f"distill is {self.distill:g}; it is the teacher's share of the targets, from 0 to 1")

    def init_queue(self, model, samples: int, device: torch.device, generator: torch.Generator) -> Queue:
        columns = {"image": model.embed_size, "text": model.embed_size}
        return Queue(self.queue_size, columns, device, generator if self.random_start else None)

    def __call__(self, f: Forward) -> Tensor:
        f = f.with_head(self.head)
        distill = self.distill * f.context.ramp(self.ramp_epochs)
        logits = self.similarity(f)
        with torch.no_grad():
            targets = [self.targets(f)] * 2
            if distill:
                taught = [each.softmax(1) for each in self.similarity(f, f.momentum)]
                targets = [torch.lerp(true, soft, distill) for true, soft in zip(targets, taught)]
        return sum(soft_info_nce(each, target) for each, target in zip(logits, targets)) / 2

    def similarity(self, f: Forward, queries: Forward | None = None) -> tuple[Tensor, Tensor]:
        """Two (B, M + K), divided by the temperature: images by texts and texts by images.

        Args:
            queries: whose embeddings look for keys; None = those of ``f``.
        """
        queries, keys, queue = queries or f, f.momentum.keys_among(self.keys), f.context.queues[self]
        i2t = scaled_similarity(queries.image.embed, keys.text, queue["text"], f.model.scale)
        return i2t, scaled_similarity(queries.text.embed, keys.image, queue["image"], f.model.scale)

    def targets(self, f: Forward) -> Tensor:
        """(B, M + K) what is true, for both ways: rows sum to 1."""
        queue = f.context.queues[self].image_id
        index = torch.cat([f.momentum.keys_among(self.keys).image_id, queue])
        if self.same_picture == "negative":
            positive = f.rows(self.keys)[:, None] == torch.arange(len(index), device=index.device)
        else:
            positive = f.batch.image_id[:, None] == index
        return positive.to(f.image.embed.dtype) / positive.sum(1, keepdim=True)

    def enqueue(self, f: Forward) -> dict[str, Tensor]:
        f = f.with_head(self.head)
        columns = {"image_id": f.batch.image_id, "image": f.momentum.image.embed, "text": f.momentum.text.embed}
        return {name: gather(rows) for name, rows in columns.items()}


@in_float32
def scaled_similarity(queries: Tensor, keys: Tensor, queue: Tensor, scale: Tensor) -> Tensor:
    """(B, E), (M, E) and (K, E) of unit norm to (B, M + K) cosines times ``scale``."""
    queries = scale * queries
    return torch.cat([queries @ keys.T, queries @ queue.T.to(queries.dtype)], dim=1)
