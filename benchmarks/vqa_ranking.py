"""VQA's ranking of a list of answers at ALBEF's size, k 128 of 3,128, against the published way: operations and scores.

``python -m benchmarks.vqa_ranking``. Operations of one question are counted by torch (multiply-add = 2), those of the picture and of
the question's own states left out, which are the same either way; weights and answers are random.

A answers, L tokens, D width.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlp.encoders.decoder import AnswerDecoder, Decoder
from vlp.encoders.generate import rank
from vlp.encoders.text import BertText

SIZES = {"model_type": "bert", "vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 12, "intermediate_size": 3072}
ANSWERS, K, QUESTION, CLS, SEP = 3128, 128, 12, 101, 102
LIMIT = 35  # GFLOP a question


def answers() -> tuple[Tensor, Tensor]:
    """(A, 6) ids and mask: 3.4 real tokens of 6 on average, [CLS] and [SEP] among them, as in the published list."""
    generator = torch.Generator().manual_seed(0)
    lengths = 3 + torch.multinomial(torch.tensor([0.7, 0.22, 0.06, 0.02]), ANSWERS, True, generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.randint(1000, 30_000, mask.shape, generator=generator)
    ids[:, 0], ids[torch.arange(ANSWERS), lengths - 1] = CLS, SEP
    return ids.masked_fill(~mask, 0), mask


def published(decoder: AnswerDecoder, tokens: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """First tokens of all questions; then every candidate whole, padding too, with its own copy of the question's states, of
    which it makes its own keys and values; the vocabulary head sees every position."""
    begin = ids[:1, :1].expand(len(tokens), 1)
    first = decoder.words(decoder.read(begin, torch.ones_like(begin).bool(), decoder.project(tokens)).states)
    chosen = first.log_softmax(1)[:, ids[:, 1]].topk(K, dim=1)
    copies = tokens.repeat_interleave(K, 0)
    rows, everywhere = chosen.indices.flatten(), torch.ones(len(copies), ids.shape[1], dtype=torch.bool)
    states = decoder.read(ids[rows], everywhere, decoder.project(copies)).states
    logits = decoder.words(states).view(len(rows), ids.shape[1], -1)[:, :-1]
    labels = ids[rows, 1:].masked_fill(~mask[rows, 1:], -100)
    scores = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    return chosen.indices, scores.view(len(tokens), K)


def flops(run, *given) -> float:
    """GFLOP."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(*given)
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    text = BertText(config=SIZES, dropout=0.0)
    decoder = Decoder(layers=6).resolved(text).build(text.build(), text.layer_sizes(), 768).eval()
    for layer in decoder.layers:  # the small random start would make all scores alike
        for part in (layer.self_attention, layer.cross_attention):
            torch.nn.init.normal_(part.value.weight, std=0.1)
    tokens = torch.randn(1, QUESTION, 768)
    ids, mask = answers()

    def ours() -> tuple[Tensor, Tensor]:
        found = rank(decoder, decoder.project(tokens), ids, mask, K)
        return found.answers, found.scores

    theirs = published(decoder, tokens, ids, mask)
    order = theirs[1].sort(dim=1, descending=True)
    found = ours()
    result = {
        "gflop": round(flops(ours), 1),
        "published_gflop": round(flops(published, decoder, tokens, ids, mask), 1),
        "same_answers": bool(torch.equal(found[0], theirs[0].gather(1, order.indices))),
        "largest_difference_of_scores": float((found[1] - order.values).abs().max()),
        "at_most_gflop": LIMIT,
    }
    assert result["gflop"] <= LIMIT and result["largest_difference_of_scores"] <= 1e-4, result
    print(json.dumps(result))


if __name__ == "__main__":
    main()
