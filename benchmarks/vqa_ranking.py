"""VQA's ranking of a list of answers at ALBEF's size, k 128 of 3,128, against the published way: operations and scores.

``python -m benchmarks.vqa_ranking``. Operations of one question are counted by torch (multiply-add = 2), those of the picture and of
the question's own states left out, which are the same either way; weights and answers are random.

A answers, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import main
from benchmarks.models import HALF_BERT, TINY_BERT
from vlp.encoders.decoder import AnswerDecoder, Decoder
from vlp.encoders.generate import rank
from vlp.encoders.text import BertText

QUESTION, CLS, SEP = 12, 101, 102
LIMIT = 35  # GFLOP a question
SIZES = {"bert": HALF_BERT, "layers": 6, "num_answers": 3128, "k": 128}
SMALL = {"bert": TINY_BERT, "layers": 2, "num_answers": 40, "k": 8}


def answers(count: int) -> tuple[Tensor, Tensor]:
    """(A, 6) ids and mask: 3.4 real tokens of 6 on average, [CLS] and [SEP] among them, as in the published list."""
    generator = torch.Generator().manual_seed(0)
    lengths = 3 + torch.multinomial(torch.tensor([0.7, 0.22, 0.06, 0.02]), count, True, generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.randint(1000, 30_000, mask.shape, generator=generator)
    ids[:, 0], ids[torch.arange(count), lengths - 1] = CLS, SEP
    return ids.masked_fill(~mask, 0), mask


def published(decoder: AnswerDecoder, tokens: Tensor, ids: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """First tokens of all questions; then every candidate whole, padding too, with its own copy of the question's states, of
    which it makes its own keys and values; the vocabulary head sees every position."""
    begin = ids[:1, :1].expand(len(tokens), 1)
    first = decoder.words(decoder.read(begin, torch.ones_like(begin).bool(), decoder.project(tokens)).states)
    chosen = first.log_softmax(1)[:, ids[:, 1]].topk(k, dim=1)
    copies = tokens.repeat_interleave(k, 0)
    rows, everywhere = (
        chosen.indices.flatten(),
        torch.ones(len(copies), ids.shape[1], dtype=torch.bool, device=ids.device),
    )
    states = decoder.read(ids[rows], everywhere, decoder.project(copies)).states
    logits = decoder.words(states).view(len(rows), ids.shape[1], -1)[:, :-1]
    labels = ids[rows, 1:].masked_fill(~mask[rows, 1:], -100)
    scores = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    return chosen.indices, scores.view(len(tokens), k)


def flops(run, *given) -> float:
    """GFLOP."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(*given)
    return counter.get_total_flops() / 1e9


def ours(decoder: AnswerDecoder, tokens: Tensor, ids: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = rank(decoder, decoder.project(tokens), ids, mask, k)
    return found.answers, found.scores


def prepared(bert: dict, layers: int, num_answers: int, k: int, device: str = "cpu") -> tuple:
    """What both ways take: decoder, one question's states, answers and their mask, k."""
    torch.manual_seed(0)
    text = BertText(config=bert, dropout=0.0)
    decoder = Decoder(layers=layers).resolved(text).build(text.build(), text.layer_sizes(), bert["hidden_size"]).eval()
    for layer in decoder.layers:  # the small random start would make all scores alike
        for part in (layer.self_attention, layer.cross_attention):
            torch.nn.init.normal_(part.value.weight, std=0.1)
    tokens = torch.randn(1, QUESTION, bert["hidden_size"])
    ids, mask = answers(num_answers)
    return decoder.to(device), tokens.to(device), ids.to(device), mask.to(device), k


@torch.no_grad()
def compared(given: tuple) -> dict:
    theirs, found = published(*given), ours(*given)
    order = theirs[1].sort(dim=1, descending=True)
    return {
        "same_answers": bool(torch.equal(found[0], theirs[0].gather(1, order.indices))),
        "largest_difference_of_scores": float((found[1] - order.values).abs().max()),
    }


def measure(bert: dict, layers: int, num_answers: int, k: int) -> dict:
    given = prepared(bert, layers, num_answers, k)
    result = {"gflop": round(flops(ours, *given), 1), "published_gflop": round(flops(published, *given), 1)}
    result |= compared(given) | {"at_most_gflop": LIMIT}
    assert result["gflop"] <= LIMIT and result["largest_difference_of_scores"] <= 1e-4, result
    return result


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
