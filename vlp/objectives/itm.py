"""Image-text matching: does this text belong to this image? For any model that fuses the two (`Model.match`).

B rows of a bundle, M rows among which negatives are sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Experiment
from vlp.distributed import gather
from vlp.encoders.ragged import bound_lengths, text_lengths
from vlp.errors import UserError
from vlp.forward import Forward, Gathered, Scope
from vlp.losses.inputs import check_finite, in_float32
from vlp.objectives.base import Objective
from vlp.objectives.hard_negatives import detached_cosines, draw_hard, gather_encodings, sample_hard_negatives
from vlp.objectives.requirements import require_image, require_momentum, require_text
from vlp.specs.fields import setting


@dataclass(frozen=True)
class ImageTextMatching(Objective):
    """ITM with hard negatives: cross-entropy of B pairs, B images with another text and B texts with another image (Li et al.
    2021, sec. 3.2). Mean over all 3B.

    Negatives are sampled with probability softmax(similarity) of the model's embedding to the keys. If all candidates show
    the same image, as in a batch of one, there are no negatives, and the mean is over the B pairs.

    With hard negatives only, a small model that starts from random weights can stay at the loss of guessing. Lower
    ``hard_share``, or let it grow from 0 by ``hard_ramp_epochs``. Samples that differ in one detail hardly ever meet in a
    batch unless their source keeps them ``together``, see `vlp.data.reading.shards.Source`. They are then in the same
    micro-batch of the same process, so "local" candidates include them.

    The log has the accuracy on pairs, ``accuracy_positive``, on uniform negatives, ``accuracy_random``, and on negatives sampled
    by similarity, ``accuracy_hard``. A measure without a pair in the step is absent.

    Args:
        negatives: "hard", or "uniform" over the candidates (the ablation of the paper's table 1).
        keys: Embeddings that the similarity is to: the "momentum" encoder's, as published, or the model's own ("student").
        candidates: Rows that can be negatives. "local": those of this process, as published; all 3B pairs are one pass over
            keys and values that exist already. "global": those of all processes, whose gradient is that of one process with
            the whole batch. With several processes, tokens are sent, the sampled images are projected again, and texts are
            fused in a second pass.
        duplicates: Candidates that show the row's own image: "mask" excludes them, "negative" keeps all but the row itself,
            as in the published pre-training.
        epsilon: Added to the probabilities of the candidates (BLIP's is 1e-4).
        hard_share: Share of the negatives that are sampled by similarity. The rest is uniform over the candidates. 1 is as
            published.
        hard_ramp_epochs: Epochs over which that share grows linearly from 0. At 0 it is constant.
    """

    min_rows: ClassVar[int] = 2
    supports_split_backward: ClassVar[bool] = True
    remedy: ClassVar[str] = (
        "try hard_share=0.5, a larger optim.lr, init='width' of a narrow model, a pre-trained image tower"
    )

    negatives: Literal["hard", "uniform"] = "hard"
    keys: Literal["momentum", "student"] = "momentum"
    candidates: Scope = "local"
    duplicates: Literal["mask", "negative"] = "mask"
    epsilon: float = setting(0.0, least=0)
    hard_share: float = setting(1.0, least=0, most=1)
    hard_ramp_epochs: float = setting(0.0, least=0)

    @property
    def row_scope(self) -> Scope:
        return self.candidates

    @property
    def measures(self) -> tuple[str, ...]:
        return ("accuracy_positive", "accuracy_random", "accuracy_hard")

    def validate(self, experiment: Experiment) -> None:
        require_image(experiment, "ImageTextMatching")
        require_text(experiment, "ImageTextMatching")
        if not experiment.model.itm:
            raise UserError("ImageTextMatching needs a model that fuses, and a head for it; set model.itm=true")
        if self.negatives == "uniform":
            if self.hard_share != 1 or self.hard_ramp_epochs:
                raise UserError("hard_share and hard_ramp_epochs are of negatives=hard; remove them, or set that")
            return
        if not experiment.model.itc:
            raise UserError("hard negatives need embeddings; set model.itc=true, or negatives=uniform")
        if self.keys == "momentum":
            require_momentum(experiment, "keys='momentum' of ImageTextMatching")

    def __call__(self, f: Forward) -> Tensor:
        candidates = f.scope(self.candidates)
        allowed = self.allowed(f, candidates)  # (B, M)
        texts, images, is_hard = self.sample(f, candidates, allowed)
        logits = self.logits(f, candidates, texts, images)  # (3B, 2)
        found, pair = allowed.any(1), torch.ones_like(f.batch.image_id, dtype=torch.bool)
        # Processes may differ in whether they have negatives. Either all rows of a process have one, or none has.
        count = gather((len(f.batch) + 2 * found.sum())[None]).float().mean()
        labels = torch.cat([pair, ~pair, ~pair]).long()
        correct, has_negative = logits.argmax(1) == labels, found.repeat(2)
        f.measure(self, "accuracy_positive", correct[: len(pair)], pair)
        f.measure(self, "accuracy_random", correct[len(pair) :], has_negative & ~is_hard)
        f.measure(self, "accuracy_hard", correct[len(pair) :], has_negative & is_hard)
        return matching_loss(logits, labels, torch.cat([pair, found, found]), count)

    def chance(self, f: Forward) -> float:
        return math.log(3) - 2 / 3 * math.log(2)  # the entropy of one pair and two negatives

    def allowed(self, f: Forward, candidates: Gathered) -> Tensor:
        """Return the (B, M) bool mask of the candidates that can be a negative of each row."""
        ids = candidates.image_id
        if self.duplicates == "mask":
            return f.batch.image_id[:, None] != ids
        return candidates.rows[:, None] != torch.arange(len(ids), device=ids.device)

    def sample(self, f: Forward, candidates: Gathered, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample a text for each image and an image for each text.

        Returns:
            (B,) texts and (B,) images as positions among the candidates, and (2B,) bool, whether a text, or then an image, was
            sampled by similarity.
        """
        similarity = torch.zeros(2 * len(allowed), allowed.shape[1], device=allowed.device)
        is_hard = torch.zeros(2 * len(allowed), dtype=torch.bool, device=allowed.device)
        if self.negatives == "hard":
            keys = candidates.momentum if self.keys == "momentum" else candidates
            similarity = torch.cat(
                [detached_cosines(f.image.embed, keys.text), detached_cosines(f.text.embed, keys.image)]
            )  # (2B, M)
            is_hard = draw_hard(similarity, self.hard_share * f.context.ramp(self.hard_ramp_epochs))  # (2B,)
            similarity = (f.scale.detach() * similarity).masked_fill(~is_hard[:, None], 0)  # equal scores are uniform
        texts, images = sample_hard_negatives(similarity, allowed.repeat(2, 1), self.epsilon).chunk(2)
        return texts, images, is_hard

    def logits(self, f: Forward, candidates: Gathered, texts: Tensor, images: Tensor) -> Tensor:
        """Score pairs, then images with the (B,) ``texts``, then texts with the (B,) ``images``: (3B, 2)."""
        if candidates.is_own_rows:
            own = torch.arange(len(texts), device=texts.device)
            lengths = text_lengths(f.batch.attention_mask)
            longest = np.full(len(lengths), lengths.max())  # only the device knows which texts were sampled
            bounds = np.concatenate([lengths, longest, lengths]).clip(1)
            text_of = bound_lengths(torch.cat([own, texts, own]), bounds)  # (3B,)
            return f.model.match(f.projected, f.text, text_of, images)
        other_texts = gather_encodings(candidates, lambda bundle: bundle.text, texts, f.context.max_text_length)
        patches = f.image.fusible.shape[1]
        other_images = gather_encodings(candidates, lambda bundle: bundle.image, images, patches)
        pairs = (f.model.match(f.projected, text) for text in (f.text, other_texts))
        return torch.cat([*pairs, f.model.match(f.model.project(other_images), f.text)])


@in_float32
def matching_loss(logits: Tensor, labels: Tensor, counted: Tensor, count: Tensor) -> Tensor:
    """Compute ``1/count sum_i counted_i CE(logits_i, labels_i)`` in float32.

    Args:
        logits: (n, 2).
        labels: (n,) int64, 1 for a pair.
        counted: (n,) bool.
        count: () number of counted rows; over several processes the mean of their numbers.

    Returns:
        () in nats.

    Raises:
        ValueError: naming the row, if logits are not finite.
    """
    rows = F.cross_entropy(logits, labels, reduction="none").masked_fill(~counted, 0)  # (n,)
    return check_finite(rows.sum() / count, logits=logits)
