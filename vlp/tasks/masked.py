"""How well are held-out texts' masked tokens told? Accuracy and perplexity with masks that are always the same.

n texts, L tokens of the longest, B texts of a batch, M masked tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Data
from vlp.data.preparing.formats import read_pairs
from vlp.data.reading.tables import Lines
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.files import local_path
from vlp.forward import Forward
from vlp.objectives.masking import TextMasking
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.metrics import Interval, bootstrap
from vlp.types import Batch


@dataclass(frozen=True)
class MaskedPrediction(Task):
    """Masked tokens of held-out texts, all at once: what is masked depends on the seed and the texts alone.

    Args:
        data: a .txt with a text a line, or annotations of pictures with captions, every caption a text.
        split: of the annotations; None = all.
        masking: as in training, so that kept and replaced tokens count too; ``mask_share=1`` with ``random_share=0`` for
            ``[MASK]`` alone.
        max_length: tokens of a text; None = data.max_length of the run. Longer ones are cut.
        batch_size: texts at a time.
        resamples: of the bootstraps, over texts.
    """

    name = "masked"
    headline = "accuracy"
    lower_is_better = ("perplexity",)

    data: str = ""
    split: str | None = None
    masking: TextMasking = TextMasking()
    max_length: int | None = setting(None, least=2)
    batch_size: int = setting(128, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where there are no texts, or the masking cannot be."""
        self.masking.validate("masking")
        self._read()

    def _read(self) -> list[str]:
        if not self.data:
            raise UserError("masked has no data: give data=FILE, a .txt or annotations with captions")
        path = local_path(self.data)
        if path.suffix == ".txt":
            if not path.is_file():
                raise UserError(f"no such file: {path}; give data=FILE")
            lines = Lines(path)
            texts = [lines[index].strip() for index in range(len(lines))]
        else:
            texts = [caption for pair in read_pairs(path, split=self.split) for caption in pair.captions]
        if not any(texts):
            raise UserError(f"{path} holds no text; give data=FILE with one a line, or annotations with captions")
        return [text for text in texts if text]

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``accuracy`` over masked tokens; ``perplexity``, exp of their mean cross-entropy, lower is better."""
        texts = self._read()
        if getattr(subject.model, "mlm", None) is None:
            raise UserError("masked needs a model with a head for masked tokens; train one with model.mlm=true")
        input_ids, mask, cut = subject.tokenizer(texts, self.max_length or subject.data.max_length)
        generator = torch.Generator().manual_seed(subject.seed)
        masked = self.masking(input_ids, mask, subject.tokenizer.vocabulary(), generator)
        if not len(masked.labels):
            raise UserError(f"no token of {self.data} was masked; give more texts, or a higher masking.probability")
        labels = torch.full_like(input_ids, -1).flatten().index_put((masked.positions,), masked.labels).view_as(mask)
        parts = gather_objects(self._predict(subject, masked.input_ids, mask, labels))
        rows, right, losses = (np.concatenate(each) for each in zip(*parts))
        order = np.argsort(rows, kind="stable")  # the same for any number of processes
        rows, right, losses = rows[order], right[order], losses[order]
        nats = bootstrap(losses, rows, subject.seed, self.resamples)
        perplexity = Interval(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high), percent=False)
        m = self.masking
        return Result(
            protocol=(
                f"{m.probability:.0%} of the tokens masked by {m.unit}, {m.mask_share:.0%} [MASK], "
                f"{m.random_share:.0%} another, all of a text at once, seed {subject.seed}"
            ),
            data=self.data,
            n={"texts": len(texts), "masked tokens": len(rows), "cut texts": cut},
            metrics={"accuracy": bootstrap(right, rows, subject.seed, self.resamples), "perplexity": perplexity},
        )

    def _predict(self, subject: EvalModel, input_ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[np.ndarray, ...]:
        """Of each masked token (labels >= 0) of this process's batches: its text, 1 where it was told, nats."""
        by_length = mask.sum(1).argsort(stable=True)  # little padding
        found = [(np.empty(0, np.int64), np.empty(0), np.empty(0))]
        with evaluating(subject.model):
            for rows in by_length.split(self.batch_size)[subject.rank :: world_size()]:
                longest = int(mask[rows].sum(1).max())
                ids, present, wanted = (each[rows, :longest].to(subject.device) for each in (input_ids, mask, labels))
                positions = (wanted >= 0).flatten().nonzero()[:, 0]
                batch = Batch(rows.to(subject.device), input_ids=ids, attention_mask=present)
                logits = subject.model.masked_text(Forward(subject.model, batch), ids, positions).float()
                answers = wanted.flatten()[positions]
                told, nats = logits.argmax(1) == answers, F.cross_entropy(logits, answers, reduction="none")
                text = rows.repeat_interleave((wanted >= 0).sum(1).cpu())
                found.append((text.numpy(), told.double().cpu().numpy(), nats.double().cpu().numpy()))
        return tuple(np.concatenate(each) for each in zip(*found))
