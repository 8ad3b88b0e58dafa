"""Masked language modelling of held-out texts: accuracy and perplexity of masked tokens, with the same masks every time.

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
from vlp.data.reading.tables import read_lines
from vlp.distributed import gather_objects
from vlp.errors import UserError
from vlp.files import resolve
from vlp.forward import Forward
from vlp.objectives.masking import TextMasking
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.metrics import Interval, bootstrap
from vlp.tasks.requirements import need_length, need_tokenizer
from vlp.tasks.sharded import length_batches
from vlp.types import Batch


@dataclass(frozen=True)
class MaskedPrediction(Task):
    """Predict the masked tokens of held-out texts, all tokens of a text at once.

    The masks depend only on the seed and the texts. Metrics are ``accuracy`` over masked tokens and ``perplexity``, the
    exponential of their mean cross-entropy, of which lower is better.

    Args:
        data: A .txt with a text a line, or annotations of images with captions, of which every caption is a text.
        split: Split of the annotations. None uses all.
        masking: Masking of the training, of which kept and replaced tokens count too. ``mask_share=1`` with ``random_share=0``
            uses only ``[MASK]``.
        max_length: Tokens of a text. None uses ``data.max_length`` of the run. Longer texts are truncated.
        batch_size: Texts at a time.
        resamples: Bootstrap resamples, over texts.
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

    def metric_names(self) -> tuple[str, ...]:
        return ("accuracy", "perplexity")

    def validate(self, data: Data) -> None:
        self.masking.validate("masking")
        self._read()
        need_tokenizer(data, self.name)

    def _read(self) -> list[str]:
        if not self.data:
            raise UserError("masked has no data; give data=FILE, a .txt or annotations with captions")
        path = resolve(self.data)
        if path.suffix == ".txt":
            texts = read_lines(path)
        else:
            texts = [caption for pair in read_pairs(path, split=self.split) for caption in pair.captions]
        if not any(texts):
            raise UserError(f"{path} has no text; give data=FILE with one a line, or annotations with captions")
        return [text for text in texts if text]

    def evaluate(self, model: EvalModel) -> Result:
        texts = self._read()
        if not model.model.can_predict_tokens:
            raise UserError("masked needs a model with a head for masked tokens; train one with model.mlm=true")
        max_length = self.max_length or model.data.max_length
        need_length(model, max_length)
        input_ids, mask, truncated = model.tokenizer(texts, max_length)  # (n, L)
        generator = torch.Generator().manual_seed(model.seed)
        masked = self.masking(input_ids, mask, model.tokenizer.vocabulary(), generator)
        if not len(masked.labels):
            raise UserError(f"no token of {self.data} was masked; give more texts, or a higher masking.probability")
        # (n, L), -1 where no token is masked
        labels = torch.full_like(input_ids, -1).flatten().index_put((masked.positions,), masked.labels).view_as(mask)
        parts = gather_objects(self._predict(model, masked.input_ids, mask, labels))
        rows, correct, nats = (np.concatenate(each) for each in zip(*parts))  # (M,) each
        order = np.argsort(rows, kind="stable")  # the same for any number of processes
        rows, correct, nats = rows[order], correct[order], nats[order]
        mean = bootstrap(nats, rows, model.seed, self.resamples)
        perplexity = Interval(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), percent=False)
        m = self.masking
        return Result(
            protocol=(
                f"{m.probability:.0%} of the tokens masked by {m.unit}, {m.mask_share:.0%} [MASK], "
                f"{m.random_share:.0%} another, all of a text at once, seed {model.seed}"
            ),
            data=self.data,
            split=self.split or "",
            n={"texts": len(texts), "masked tokens": len(rows), "truncated texts": truncated},
            metrics={"accuracy": bootstrap(correct, rows, model.seed, self.resamples), "perplexity": perplexity},
        )

    def _predict(self, model: EvalModel, input_ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[np.ndarray, ...]:
        """Predict the masked tokens of this process's batches.

        Returns:
            Of each masked token its text, 1 where the prediction is correct, and the cross-entropy in nats.
        """
        found = [(np.empty(0, np.int64), np.empty(0), np.empty(0))]
        for rows in length_batches(mask.sum(1), self.batch_size):
            longest = int(mask[rows].sum(1).max())
            ids, present, targets = (each[rows, :longest].to(model.device) for each in (input_ids, mask, labels))
            positions = (targets >= 0).flatten().nonzero()[:, 0]  # in the flattened (B * longest)
            batch = Batch(rows.to(model.device), input_ids=ids, attention_mask=present)
            logits = model.model.masked_text(Forward(model.model, batch), ids, positions).float()
            answers = targets.flatten()[positions]
            correct, nats = logits.argmax(1) == answers, F.cross_entropy(logits, answers, reduction="none")
            text = rows.repeat_interleave((targets >= 0).sum(1).cpu())
            found.append((text.numpy(), correct.double().cpu().numpy(), nats.double().cpu().numpy()))
        return tuple(np.concatenate(each) for each in zip(*found))
