"""Inference with a text decoder: rank a list of answers, or generate text by beam search. Without gradient.

Q sources, A answers in the list, k candidates or beams, l tokens so far, L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.encoders.decoder import AnswerDecoder, KVCache
from vlp.encoders.fusion import CrossAttentionCache


@dataclass(frozen=True)
class Ranked:
    """Answers of a list by question, the best first.

    Args:
        answers: (Q, k) int64 positions in the list.
        scores: (Q, k) float32 log-probabilities.
    """

    answers: Tensor
    scores: Tensor


@torch.no_grad()
def rank(
    decoder: AnswerDecoder,
    source: CrossAttentionCache,
    input_ids: Tensor,
    mask: Tensor,
    k: int,
    double_first: bool = False,
) -> Ranked:
    """Rank the k answers whose first token is most probable by their probability (ALBEF, Li et al. 2021, sec. 4.3).

    ``[CLS]`` is processed once per question. After it, only tokens that a real token follows are processed.

    Args:
        decoder: The decoder.
        source: Q questions, see `AnswerDecoder.project`.
        input_ids: (A, L) int64 of the list, ``[CLS] answer [SEP]`` each, padded on the right.
        mask: (A, L) bool.
        k: Number of candidates, at most A. Published with 128.
        double_first: Count the first token twice, as the published code does and LAVIS does not.

    Raises:
        ValueError: if an answer does not begin with ``[CLS]`` and at least one more token.
    """
    if not (len(input_ids) and (input_ids[:, 0] == input_ids[0, 0]).all() and mask[:, :2].all()):
        raise ValueError("answers begin with [CLS] and have at least one more token")
    questions, k = len(source), min(k, len(input_ids))
    begin = input_ids[:1, :1].expand(questions, 1)
    decoded = decoder.read(begin, torch.ones_like(begin, dtype=torch.bool), source)
    first = decoder.words(decoded.states).float().softmax(1)[:, input_ids[:, 1]]  # (Q, A)
    probabilities, chosen = first.topk(k, dim=1)  # (Q, k)
    scores = probabilities.log()
    if double_first:
        scores = scores * 2
    # the j-th candidates of all questions, then the next ones: each round reads the questions' keys in place
    rows = chosen.T.flatten()  # (k * Q,)
    if mask[rows, 2:].any():
        texts, is_real = input_ids[rows, 1:], mask[rows, 1:]
        cache = decoded.cache[torch.arange(len(rows), device=rows.device) % questions]
        predicted = decoder.predict(texts, is_real, source, cache=cache)
        of_token = -F.cross_entropy(predicted.logits.float(), predicted.labels, reduction="none")
        of_text = of_token.new_zeros(len(rows)).index_add(0, predicted.text, of_token)  # (k * Q,)
        scores = scores + of_text.view(k, questions).T
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Ranked(chosen.gather(1, order), scores)


@dataclass(frozen=True)
class Beams:
    """Unfinished texts. The j-th of source q is in row j * Q + q.

    Args:
        ids: (k * Q, l) int64.
        scores: (k, Q) sums of log-probabilities.
        cache: Keys and values of all tokens but the last.
    """

    ids: Tensor
    scores: Tensor
    cache: KVCache


@torch.no_grad()
def beam_search(
    decoder: AnswerDecoder,
    source: CrossAttentionCache,
    cls_id: int,
    sep_id: int,
    max_length: int,
    beams: int = 1,
    min_length: int = 0,
    length_penalty: float = 0.0,
) -> list[list[int]]:
    """Return the text with the highest ``log p / tokens ** length_penalty`` that beam search finds, for each of Q sources.

    Args:
        decoder: The decoder.
        source: Q sources, see `AnswerDecoder.project`.
        cls_id: Id of ``[CLS]``.
        sep_id: Id of ``[SEP]``.
        max_length: Tokens between ``[CLS]`` and ``[SEP]``. An unfinished text ends there.
        beams: k. With 1 the search is greedy.
        min_length: Tokens before a text may end.
        length_penalty: 0 ranks by probability. Captions are often ranked with 1.

    Returns:
        Q rows of ids, without ``[CLS]`` and ``[SEP]``.
    """
    questions, device = len(source), source.keys[0].device
    begin = torch.full((questions, 1), cls_id, device=device)
    best: list[tuple[float, list[int]]] = [(-torch.inf, [])] * questions
    now = Beams(begin, torch.zeros(1, questions, device=device), KVCache())
    for length in range(max_length + 1):
        everything = torch.ones(len(now.ids), 1, dtype=torch.bool, device=device)
        decoded = decoder.read(now.ids[:, -1:], everything, source, cache=now.cache)
        following = decoder.words(decoded.states).float().log_softmax(1)  # (k * Q, V)
        ended = now.scores + following[:, sep_id].view(-1, questions)  # (k, Q)
        if length >= min_length or length == max_length:
            # a text that ends at max_length has no [SEP], so its probability is not counted
            finished = now.scores if length == max_length else ended
            _keep_best(best, now.ids, finished / max(length + (length < max_length), 1) ** length_penalty)
        if length == max_length or _none_can_win(best, now.scores, length, max_length, length_penalty):
            break
        following[:, sep_id] = -torch.inf
        now = _extend(now, following, decoded.cache, beams)
    return [ids for _, ids in best]


def _keep_best(best: list[tuple[float, list[int]]], ids: Tensor, scores: Tensor) -> None:
    """Replace each source's best finished text where one of the (k * Q, l) ids has a higher (k, Q) score."""
    highest, beam = scores.max(0)
    for question, (score, j) in enumerate(zip(highest.tolist(), beam.tolist())):
        if score > best[question][0]:
            best[question] = (score, ids[j * len(best) + question, 1:].tolist())


def _none_can_win(best: list[tuple[float, list[int]]], scores: Tensor, length: int, most: int, penalty: float) -> bool:
    """Return whether no unfinished text can exceed its source's best finished one.

    A sum of log-probabilities can only fall. So a text's upper bound is its score now, divided by the length penalty of the
    length at which that weighs least.
    """
    found = torch.tensor([score for score, _ in best])
    reachable = scores.max(0).values.cpu() / max(most if penalty > 0 else length + 1, 1) ** penalty
    return bool((found >= reachable).all())


def _extend(now: Beams, following: Tensor, cache: KVCache, beams: int) -> Beams:
    """Return the ``beams`` most probable texts that are one token longer, for each source."""
    width, questions = now.scores.shape
    vocabulary = following.shape[1]
    scores = now.scores[:, :, None] + following.view(width, questions, vocabulary)  # (k, Q, V)
    flat = scores.transpose(0, 1).flatten(1)  # (Q, k * V)
    kept, position = flat.topk(min(beams, flat.shape[1]), dim=1)  # (Q, k')
    parent, token = position // vocabulary, position % vocabulary
    rows = (parent * questions + torch.arange(questions, device=position.device)[:, None]).T.flatten()  # (k' * Q,)
    return Beams(torch.cat([now.ids[rows], token.T.reshape(-1, 1)], 1), kept.T, cache[rows])
