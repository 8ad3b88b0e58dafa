"""Three ways in which a model answers questions about pictures that it has encoded already.

Each is made for one evaluation, and then called as ``say(image, input_ids, attention_mask, rows)`` with P encoded pictures, (Q, L)
ids and mask of questions, and the (Q,) picture of each; it returns Q answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from vlp.encoders.fusion import CrossAttentionCache
from vlp.encoders.generate import beam_search, rank
from vlp.forward import Forward
from vlp.tasks.base import EvalModel
from vlp.types import Batch, Encoded

Say = Callable[[Encoded, Tensor, Tensor, Tensor], list[str]]


def ranking(subject: EvalModel, known: Sequence[str], k: int, double_first: bool) -> Say:
    """By the likeliest of ``known``, see `vlp.encoders.generate.rank`."""
    ids, mask, _ = subject.tokenizer.targets(known, subject.data.max_length)
    ids, mask = ids.to(subject.device), mask.to(subject.device)

    def say(image: Encoded, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> list[str]:
        asked = _ask(subject.model, image, input_ids, attention_mask, rows)
        best = rank(subject.model.decoder, asked, ids, mask, k, double_first)
        return [known[answer] for answer in best.answers[:, 0].tolist()]

    return say


def writing(subject: EvalModel, beams: int, max_length: int) -> Say:
    """In words of its own, see `vlp.encoders.generate.beam_search`."""
    tokenizer = subject.tokenizer

    def say(image: Encoded, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> list[str]:
        asked = _ask(subject.model, image, input_ids, attention_mask, rows)
        found = beam_search(subject.model.decoder, asked, tokenizer.cls_id, tokenizer.sep_id, max_length, beams)
        return [tokenizer.text(ids) for ids in found]

    return say


def classifying(subject: EvalModel, known: Sequence[str]) -> Say:
    """By the class with the highest logit, ``known`` naming the classes."""

    def say(image: Encoded, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> list[str]:
        batch = Batch(rows, None, input_ids, attention_mask)
        # an image is encoded once for all of its questions
        f = Forward(subject.model, batch, encoded={"image": image[rows]})
        return [known[best] for best in subject.model.classify(f).argmax(1).tolist()]

    return say


def _ask(model, image: Encoded, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> CrossAttentionCache:
    return model.ask(model.project(image), model.encode_text(input_ids, attention_mask), rows)
