"""Cutoff: a classifier that must predict the same when a part of its input is missing (Shen et al. 2020).

B texts, L text tokens, W width of the embeddings, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Experiment
from vlp.encoders.ragged import bound_lengths, text_lengths
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.divergence import jensen_shannon
from vlp.objectives.base import Objective
from vlp.objectives.requirements import require_labels
from vlp.specs.fields import setting


@dataclass(frozen=True)
class Cutoff(Objective):
    """``CE(x) + a sum_n CE(x_n) + b JS(x, x_1, .., x_N)`` over N copies with a part cut out (Shen et al. 2020, sec. 3).

    Rows or columns of the L x W matrix of word embeddings are cut out. Positions are drawn without replacement, and the first
    token, which the classifier reads, always stays. The published code draws with replacement and may cut the first token. Its
    divergence is KL(mean || p) instead of Jensen-Shannon, and its token variant lacks CE(x). Here both are as in the paper.

    Args:
        cut: "token" cuts random tokens, "feature" random columns, the same for all tokens of a text, "span" neighbouring
            tokens, which attention does not see either.
        ratio: Share of the tokens of a text, or of the W columns, rounded down.
        copies: N; 0 is plain fine-tuning.
        augmented: a.
        consistency: b.
    """

    cut: Literal["token", "feature", "span"] = "span"
    ratio: float = setting(0.1, least=0, below=1)
    copies: int = setting(1, least=0)
    augmented: float = setting(1.0, least=0)
    consistency: float = setting(1.0, least=0)

    def validate(self, experiment: Experiment) -> None:
        if experiment.model.text is None or experiment.model.classes is None:
            raise UserError("Cutoff needs a text tower with a classifier: model=Single(text=..., classes=C)")
        require_labels(experiment, "Cutoff")

    def __call__(self, f: Forward) -> Tensor:
        batch, tower, classifier = f.batch, f.model.text, f.model.classifier
        logits = [classifier(f.text.tokens[:, 0])]  # (B, C)
        for _ in range(self.copies):
            keep, mask = self.restrict(batch.attention_mask, tower.get_input_embeddings().embedding_dim)
            logits.append(classifier(tower.forward_cutoff(batch.input_ids, mask, keep)[:, 0]))
        whole, *restricted = (F.cross_entropy(each.float(), batch.labels) for each in logits)
        return whole + self.augmented * sum(restricted) + self.consistency * jensen_shannon(*logits)

    def restrict(self, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Draw what a copy keeps.

        Returns:
            (B, L, 1) or (B, 1, W) bool, True for embeddings that stay, and the (B, L) attention mask of the copy.
        """
        if self.cut == "feature":
            columns = torch.rand(len(mask), width, device=mask.device).argsort(1)  # (B, W)
            return (columns >= int(self.ratio * width))[:, None], mask
        kept = (keep_tokens if self.cut == "token" else keep_outside_span)(mask, self.ratio)  # (B, L)
        if self.cut == "token":
            return kept[:, :, None], mask
        return kept[:, :, None], bound_lengths(mask & kept, text_lengths(mask))


def keep_tokens(mask: Tensor, ratio: float) -> Tensor:
    """Draw int(ratio * length) random tokens per text, never the first, and return the (B, L) mask of the others."""
    draw = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2.0)
    draw[:, 0] = 2.0
    return draw.argsort(1).argsort(1) >= _count(mask, ratio)


def keep_outside_span(mask: Tensor, ratio: float) -> Tensor:
    """Draw int(ratio * length) adjacent tokens per text, never the first, and return the (B, L) mask of the others."""
    count, lengths = _count(mask, ratio), mask.sum(1, keepdim=True)
    room = (lengths - count).clamp(min=1)  # positions where the span can begin
    begin = 1 + (torch.rand(room.shape, device=mask.device) * room).long().minimum(room - 1)
    position = torch.arange(mask.shape[1], device=mask.device)
    return (position < begin) | (position >= begin + count)


def _count(mask: Tensor, ratio: float) -> Tensor:
    """Return the (B, 1) number of tokens to cut; in float64, like Python's int(ratio * length)."""
    return (mask.sum(1, keepdim=True).double() * ratio).long()
