"""What a decoder says: the best of a list of answers, or text of its own by beam search. Without gradient.

Q sources, A answers of the list, k candidates or beams, L tokens, V vocabulary.
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
        answers: (Q, k) int64 places in the list.
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
    """The likeliest answers among the k whose first token is likeliest (ALBEF, Li et al. 2021, sec. 4.3).

    The question's keys and values are the ``source``, and ``[CLS]`` is read once a question; after it only tokens that a real
    one follows are.

    Args:
        source: Q questions, see `AnswerDecoder.project`.
        input_ids: (A, L) int64 of the list, ``[CLS] answer [SEP]`` each, padded on the right.
        mask: (A, L) bool.
        k: published with 128; at most A are taken.
        double_first: count the first token twice, as the published code does; LAVIS's does not.

    Raises:
        ValueError: if the list's answers do not begin alike, with ``[CLS]``.
    """
    if not (len(input_ids) and (input_ids[:, 0] == input_ids[0, 0]).all() and mask[:, :2].all()):
        raise ValueError("answers begin with [CLS] and have at least one more token")
    questions, k = len(source), min(k, len(input_ids))
    begin = input_ids[:1, :1].expand(questions, 1)
    written = decoder.read(begin, torch.ones_like(begin, dtype=torch.bool), source)
    first = decoder.words(written.states).float().softmax(1)[:, input_ids[:, 1]]  # (Q, A)
    probabilities, chosen = first.topk(k, dim=1)
    scores = probabilities.log()
    if double_first:
        scores = scores * 2
    # the j-th candidates of all questions, then the next ones: each round reads the questions' keys where they are
    rows = chosen.T.flatten()
    going_on = mask[rows, 2:].any(1)
    if going_on.any():
        texts, real = input_ids[rows, 1:], mask[rows, 1:]
        predicted = decoder.predict(
            texts, real, source, past=written.past[torch.arange(len(rows), device=rows.device) % questions]
        )
        of_token = -F.cross_entropy(predicted.logits.float(), predicted.labels, reduction="none")
        of_text = of_token.new_zeros(len(rows)).index_add(0, predicted.text, of_token)
        scores = scores + of_text.view(k, questions).T
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Ranked(chosen.gather(1, order), scores)


@dataclass(frozen=True)
class Beams:
    """Unfinished texts: the j-th of source q in row j * Q + q.

    Args:
        ids: (k * Q, l) int64.
        scores: (k, Q) sums of log-probabilities.
        past: of all tokens but the last.
    """

    ids: Tensor
    scores: Tensor
    past: KVCache


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
    """The text with the highest ``log p / tokens ** length_penalty`` that the beams meet, for each of Q sources.

    Args:
        max_length: tokens between ``[CLS]`` and ``[SEP]``; a text that is not finished by then is cut there.
        beams: k; 1 = the likeliest token each time.
        min_length: tokens before which no text ends.
        length_penalty: 0 = by probability alone; captions are often chosen with 1.

    Returns:
        Q rows of ids, without ``[CLS]`` and ``[SEP]``.
    """
    questions, device = len(source), source.keys[0].device
    begin = torch.full((questions, 1), cls_id, device=device)
    best: list[tuple[float, list[int]]] = [(-torch.inf, [])] * questions
    now = Beams(begin, torch.zeros(1, questions, device=device), KVCache())
    for length in range(max_length + 1):
        written = decoder.read(
            now.ids[:, -1:], torch.ones(len(now.ids), 1, dtype=torch.bool, device=device), source, past=now.past
        )
        following = decoder.words(written.states).float().log_softmax(1)  # (k * Q, V)
        ended = now.scores + following[:, sep_id].view(-1, questions)
        if length >= min_length or length == max_length:
            # a text that has to stop here is not charged for the [SEP] that it did not write
            whole = now.scores if length == max_length else ended
            _keep_best(best, now.ids, whole / max(length + (length < max_length), 1) ** length_penalty)
        if length == max_length or _none_can_win(best, now.scores, length, max_length, length_penalty):
            break
        following[:, sep_id] = -torch.inf
        now = _go_on(now, following, written.past, beams)
    return [ids for _, ids in best]


def _keep_best(best: list[tuple[float, list[int]]], ids: Tensor, scores: Tensor) -> None:
    """Puts in the place of the best whole texts those of (k * Q, l) ids that have higher (k, Q) scores."""
    highest, beam = scores.max(0)
    for question, (score, j) in enumerate(zip(highest.tolist(), beam.tolist())):
        if score > best[question][0]:
            best[question] = (score, ids[j * len(best) + question, 1:].tolist())


def _none_can_win(best: list[tuple[float, list[int]]], scores: Tensor, length: int, most: int, penalty: float) -> bool:
    """Whether no unfinished text can get above the best whole one: log-probabilities only fall, and at best stay as they are
    to the length at which they weigh least."""
    found = torch.tensor([score for score, _ in best])
    reachable = scores.max(0).values.cpu() / max(most if penalty > 0 else length + 1, 1) ** penalty
    return bool((found >= reachable).all())


def _go_on(now: Beams, following: Tensor, past: KVCache, beams: int) -> Beams:
    """The ``beams`` likeliest of all texts that are one token longer."""
    width, questions = now.scores.shape
    vocabulary = following.shape[1]
    scores = now.scores[:, :, None] + following.view(width, questions, vocabulary)
    flat = scores.transpose(0, 1).flatten(1)  # (Q, k * V)
    kept, place = flat.topk(min(beams, flat.shape[1]), dim=1)
    parent, token = place // vocabulary, place % vocabulary  # (Q, k) each
    rows = (parent * questions + torch.arange(questions, device=place.device)[:, None]).T.flatten()
    return Beams(torch.cat([now.ids[rows], token.T.reshape(-1, 1)], 1), kept.T, past[rows])
