"""Image-text matching: does this text belong to this image? On any model that can fuse the two.

The model has ``project(image) -> K`` and ``match(K, text, texts, images) -> (n, 2)``, see `vlp.models.albef`.

B rows of this process, M rows among which negatives are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Experiment
from vlp.distributed import world_size
from vlp.errors import UserError
from vlp.forward import Among, Forward
from vlp.losses.inputs import check_finite, in_float32
from vlp.objectives.hard_negatives import sample_hard_negatives, take
from vlp.objectives.needs import need_image, need_momentum, need_text


@dataclass(frozen=True)
class ImageTextMatching:
    """ITM with hard negatives (Li et al. 2021, sec. 3.2): cross-entropy of B pairs, B images with another text, and B texts
    with another image; mean over all 3B.

    The other is drawn in proportion to ``softmax(similarity)``, of the model's embedding to the keys. A row that every
    candidate shares its picture with, as in a batch of one, has no negatives, and the mean is over the others.

    Args:
        negatives: "hard", or "uniform" = any other row (the ablation of the paper's table 1).
        keys: whose embeddings the similarity is to: the "momentum" encoder's, as published, or the model's own.
        candidates: rows of this "process", as published: pairs, other texts and other images are one pass over keys and
            values that are there; or of "all", whose gradient is that of one process with the whole batch: over several
            processes tokens are sent, the drawn images are projected again, and texts are read in a second pass.
        same_picture: rows of the same picture are "left_out" of the candidates, or, as in the published pre-training,
            are a "negative" but for the row itself.
        epsilon: added to the candidates' probabilities (BLIP's is 1e-4).
    """

    supports_grad_cache: ClassVar[bool] = True  # see vlp.training.grad_cache
    supports_split_backward: ClassVar[bool] = True  # see vlp.training.split_backward
    weight: float = 1.0
    negatives: Literal["hard", "uniform"] = "hard"
    keys: Literal["momentum", "student"] = "momentum"
    candidates: Among = "process"
    same_picture: Literal["left_out", "negative"] = "left_out"
    epsilon: float = 0.0

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_image(experiment, "ImageTextMatching")
        need_text(experiment, "ImageTextMatching")
        if not getattr(experiment.model, "itm", False):
            raise UserError("ImageTextMatching needs a model that fuses, and a head for it; set model.itm=true")
        if self.epsilon < 0:
            raise UserError(f"epsilon is {self.epsilon:g}; it is added to probabilities, so use 0 or more")
        if self.negatives == "uniform":
            return
        if not getattr(experiment.model, "itc", True):
            raise UserError("hard negatives need embeddings; set model.itc=true, or negatives=uniform")
        if self.keys == "momentum":
            need_momentum(experiment, "keys='momentum' of ImageTextMatching")

    def __call__(self, f: Forward) -> Tensor:
        index = f.gathered(lambda micro_batch: micro_batch.batch.image_id, self.candidates)
        candidates = self._candidates(f, index)
        logits = self.logits(f, *self.draw(f, candidates))
        found, pair = candidates.any(1), torch.ones_like(f.batch.image_id, dtype=torch.bool)
        # of a micro-batch, on average over all of them and all processes
        pairs = f.gathered(
            lambda micro_batch: len(micro_batch.batch) + 2 * self._candidates(micro_batch, index).any(1).sum()[None]
        )
        labels = torch.cat([pair, ~pair, ~pair]).long()
        return matching_loss(logits, labels, torch.cat([pair, found, found]), pairs.float().mean())

    def _candidates(self, f: Forward, index: Tensor) -> Tensor:
        """(B, M) bool: which of the rows with these (M,) indices are no match of which of ours."""
        if self.same_picture == "left_out":
            return f.batch.image_id[:, None] != index
        return f.rows(self.candidates)[:, None] != torch.arange(len(index), device=index.device)

    def draw(self, f: Forward, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) another text for each image, and (B,) another image for each text, as `Forward.gathered` numbers them."""
        similarity = torch.zeros(2 * len(candidates), candidates.shape[1], device=candidates.device)
        if self.negatives == "hard":
            keys = (f.momentum if self.keys == "momentum" else f).keys_among(self.candidates)
            similarity = torch.cat([_cosines(f.image.embed, keys.text), _cosines(f.text.embed, keys.image)])
            similarity = f.model.scale.detach() * similarity
        texts, images = sample_hard_negatives(similarity, candidates.repeat(2, 1), self.epsilon).chunk(2)
        return texts, images

    def logits(self, f: Forward, texts: Tensor, images: Tensor) -> Tensor:
        """(3B, 2): pairs, images with the (B,) ``texts``, texts with the (B,) ``images``."""
        if len(f.micro_batches) == 1 and (self.candidates == "process" or world_size() == 1):
            own = torch.arange(len(texts), device=texts.device)
            return f.model.match(f.projected, f.text, torch.cat([own, texts, own]), images)
        other_texts = take(f, lambda micro_batch: micro_batch.text, texts, self.candidates)
        other_images = take(f, lambda micro_batch: micro_batch.image, images, self.candidates)
        pairs = (f.model.match(f.projected, text) for text in (f.text, other_texts))
        return torch.cat([*pairs, f.model.match(f.model.project(other_images), f.text)])


@in_float32
def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return a.detach() @ b.detach().T


@in_float32
def matching_loss(logits: Tensor, labels: Tensor, counted: Tensor, count: Tensor) -> Tensor:
    """``1/count sum_i counted_i CE(logits_i, labels_i)``, computed in float32.

    Args:
        logits: (n, 2).
        labels: (n,) int64, 1 for a pair.
        counted: (n,) bool.
        count: (); over several processes the mean of their numbers.

    Returns:
        () in nats.

    Raises:
        ValueError: naming the row, if logits are not finite.
    """
    rows = F.cross_entropy(logits, labels, reduction="none").masked_fill(~counted, 0)
    return check_finite(rows.sum() / count, logits=logits)
