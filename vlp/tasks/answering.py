"""Three ways to answer questions about encoded images: rank a list, write by beam search, or classify.

P images, Q questions, L tokens of a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from vlp.encoders.fusion import CrossAttentionCache
from vlp.encoders.generate import beam_search, rank
from vlp.forward import Forward
from vlp.tasks.base import EvalModel
from vlp.types import Batch, Encoded

# (P images, (Q, L) ids, (Q, L) mask, (Q,) image of each question) -> Q answers
Answerer = Callable[[Encoded, Tensor, Tensor, Tensor], list[str]]


def ranking(model: EvalModel, candidates: Sequence[str], k: int, double_first: bool) -> Answerer:
    """Answer with the most likely of ``candidates``, see `vlp.encoders.generate.rank`."""
    ids, mask, _ = model.tokenizer.targets(candidates, model.data.max_length)
    ids, mask = ids.to(model.device), mask.to(model.device)  # (candidates, L)

    def answer(image: Encoded, input_ids: Tensor, attention_mask: Tensor, images: Tensor) -> list[str]:
        asked = _ask(model, image, input_ids, attention_mask, images)
        best = rank(model.model.decoder, asked, ids, mask, k, double_first)
        return [candidates[n] for n in best.answers[:, 0].tolist()]

    return answer


def writing(model: EvalModel, beams: int, max_length: int) -> Answerer:
    """Write answers freely, see `vlp.encoders.generate.beam_search`."""
    tokenizer = model.tokenizer

    def answer(image: Encoded, input_ids: Tensor, attention_mask: Tensor, images: Tensor) -> list[str]:
        asked = _ask(model, image, input_ids, attention_mask, images)
        found = beam_search(model.model.decoder, asked, tokenizer.cls_id, tokenizer.sep_id, max_length, beams)
        return [tokenizer.text(ids) for ids in found]

    return answer


def classifying(model: EvalModel, classes: Sequence[str]) -> Answerer:
    """Answer with the class that has the highest logit."""

    def answer(image: Encoded, input_ids: Tensor, attention_mask: Tensor, images: Tensor) -> list[str]:
        # Each image was encoded once for all its questions.
        encoded = {"image": image[images]}
        f = Forward(model.model, Batch(images, None, input_ids, attention_mask), encoded=encoded)
        return [classes[best] for best in model.model.classify(f).argmax(1).tolist()]

    return answer


def _ask(
    model: EvalModel, image: Encoded, input_ids: Tensor, attention_mask: Tensor, images: Tensor
) -> CrossAttentionCache:
    """Return what the decoder reads of Q questions."""
    network = model.model
    return network.ask(network.project(image), network.encode_text(input_ids, attention_mask), images)
