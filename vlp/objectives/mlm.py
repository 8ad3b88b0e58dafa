"""Masked language modelling, for any model that predicts masked tokens (`Model.masked_text`).

A single tower reads the masked text. A fusion model also reads ``f.image``, which the step computes once. The momentum encoder's
bundle goes through the teacher's method, so that the teacher reads its own encoding of the image. The positions are an
argument, so a model runs its vocabulary head, and whatever of its last layer it can, only there.

B texts, L tokens, M predicted positions, V vocabulary, C word classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
from torch import Tensor

from vlp.config import Experiment
from vlp.encoders.ragged import upload
from vlp.errors import UserError
from vlp.forward import Bundle, Forward, Scope
from vlp.losses.masked import IGNORED, masked_cross_entropy
from vlp.objectives.distillation import DistilledObjective
from vlp.objectives.masking import TextMasking
from vlp.objectives.requirements import require_text
from vlp.types import MaskedIds, computing_on_host, on_host


@dataclass(frozen=True)
class MaskedText(DistilledObjective):
    """MLM (Devlin et al. 2019, sec. 3.1), optionally with momentum distillation (ALBEF, Li et al. 2021, eq. 7).

    ``1/M sum_i [(1 - a) CE(logits_i, token_i) + a CE(logits_i, softmax(teacher's logits_i))]``. Of several views, the first
    is masked. If no token of the batch is masked, the loss and its gradient are 0.

    The log has the ``accuracy`` of the predicted tokens, and that of the tokens of each word class, ``accuracy_CLASS``. Tokens that
    masking keeps or replaces count too. There is no tagger for parts of speech: a class is a list of words, e.g.
    `vlp.data.world.scenes.WORD_CLASSES`.

    Args:
        distill: a; the momentum encoder reads the same masked text.
        masking: Which tokens are masked, and what replaces them.
        mean_over: Tokens that the mean is over: of all processes ("global"), so that the gradient is that of one process
            with the whole batch, or of each process ("local"), as published.
        word_classes: Name -> words, e.g. ``{"colour": ("red", "green")}``. They change the log and not the loss.
    """

    supports_split_backward: ClassVar[bool] = True
    remedy: ClassVar[str] = "try a larger optim.lr, a longer warm-up, masking.probability=0.4 for short captions"

    masking: TextMasking = TextMasking()
    mean_over: Scope = "global"
    word_classes: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)  # objectives are keys of queues

    @property
    def measures(self) -> tuple[str, ...]:
        return ("accuracy", *(f"accuracy_{name}" for name in self.word_classes))

    def validate(self, experiment: Experiment) -> None:
        super().validate(experiment)
        require_text(experiment, "masked language modelling")
        if not experiment.model.mlm:
            raise UserError("masked language modelling needs a head for it; set model.mlm=true")
        self.masking.validate("masking")
        if empty := [name for name, words in self.word_classes.items() if not words]:
            raise UserError(f"word_classes.{empty[0]} has no word; give some, or remove it")

    def __call__(self, f: Forward) -> Tensor:
        masked = f.masked(self.masking)
        logits = f.model.masked_text(f, masked.input_ids, masked.positions)  # (M, V)
        teacher = None
        if self.distill:
            teacher = f.momentum.model.masked_text(f.momentum, masked.input_ids, masked.positions)
        self._measure(f, logits, masked)
        count = f.scope(self.mean_over).gather(self._num_predicted).float().mean()
        return masked_cross_entropy(logits, masked.labels, teacher, self.teacher_share(f), count)

    def target_classes(self, f: Forward) -> np.ndarray:
        labels = on_host(f.masked(self.masking).labels)
        return labels[labels != IGNORED]

    def _measure(self, f: Forward, logits: Tensor, masked: MaskedIds) -> None:
        correct, counted = logits.argmax(1) == masked.labels, masked.labels != IGNORED  # (M,)
        f.measure(self, "accuracy", correct, counted)
        vocabulary = f.context.vocabulary
        if not self.word_classes or vocabulary is None or vocabulary.pieces is None:
            return
        with computing_on_host():
            words = [_spell(vocabulary.pieces, name, self.word_classes[name]) for name in self.word_classes]
            input_ids, continues = on_host(f.batch.input_ids), on_host(vocabulary.continues)
            classes = np.stack([mark_words(input_ids, continues, each) for each in words])  # (C, B, L)
            predicted = classes.reshape(len(words), -1)[:, on_host(masked.positions)]  # (C, M)
            of_class = upload(predicted, logits.device)
        for name, own in zip(self.word_classes, of_class):
            f.measure(self, f"accuracy_{name}", correct, counted & own)

    def _num_predicted(self, f: Bundle) -> Tensor:
        return (f.masked(self.masking).labels != IGNORED).sum()[None]  # (1,)


@lru_cache
def _spell(pieces: Callable[[str], tuple[int, ...]], name: str, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the ids of each word of a class."""
    spelled = [pieces(word) for word in words]
    if () in spelled:
        missing = words[spelled.index(())]
        raise UserError(f"word_classes.{name}: the tokenizer cannot spell {missing!r}; remove it")
    return spelled


def mark_words(input_ids: np.ndarray, continues: np.ndarray, words: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the (B, L) bool mask of the tokens of some words.

    Args:
        input_ids: (B, L).
        continues: (V,) bool, see `vlp.types.Vocabulary`. "red" is not found in "redder".
        words: Ids of each word.
    """
    length = input_ids.shape[1]
    begins = np.pad(~continues[input_ids], ((0, 0), (0, 1)), constant_values=True)  # (B, L + 1)
    found = np.zeros(input_ids.shape, bool)
    for pieces in words:
        n = len(pieces)
        starts = max(length - n + 1, 0)
        whole = begins[:, :starts] & begins[:, n : n + starts]  # (B, starts)
        for k, piece in enumerate(pieces):
            whole &= input_ids[:, k : k + starts] == piece
        for k in range(n):
            found[:, k : k + starts] |= whole
    return found
