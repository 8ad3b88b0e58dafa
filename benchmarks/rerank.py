"""Retrieval and re-ranking with ViT-B/16 at 384 px and BERT-base, 577 tokens a picture, on Flickr8k's captions, one thread.

``python -m benchmarks.rerank``. The models are random. "Pair by pair" is what the published code does with a pair: a copy of
the picture's tokens for each caption, texts padded to 30, attention written out; costs.md has 11.48 GFLOP for it, fusion alone.
Operations are torch's count (multiply-add = 2), of real tensors.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.albef_reference import plain
from vlp.data.text import load_tokenizer
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef, AlbefModel
from vlp.tasks.metrics import ranks
from vlp.tasks.rerank import Texts, encode_distinct, match
from vlp.types import Encoded

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZES = {"model_type": "bert", "vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 12, "intermediate_size": 3072}
K, PAIRS, PADDED, ROUNDS = 128, 16, 30, 3  # pairs that the slow way is timed on
PICTURES, CAPTIONS = 1_000, 5_000


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.process_time()
    found = run()
    return found, time.process_time() - began


def counted(run: Callable[[], object]) -> float:
    """GFLOP."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


class Setting:
    """One model twice: ours, and with everything that saves work taken out."""

    @torch.no_grad()
    def __init__(self):
        torch.manual_seed(0)
        spec = Albef(
            TimmImage("vit_base_patch16_224", image_size=384),
            BertText(config=SIZES, dropout=0.0),
            Fusion(layers=6, dropout=0.0),
            mlm=False,
        )
        self.model: AlbefModel = spec.build().eval()
        self.plain = plain(copy.deepcopy(self.model))
        tokenizer = load_tokenizer(str(SHARED / "text" / "bert_base_uncased_vocab.txt"), sep=False, clean=True)
        rows = [json.loads(line) for line in (SHARED / "flickr8k" / "captions.jsonl").read_text().splitlines()]
        captions = [row["captions"][0] for row in rows[:: len(rows) // K][:K]]
        self.ids, self.mask, _ = tokenizer(captions, PADDED)
        self.ids = torch.nn.functional.pad(self.ids, (0, PADDED - self.ids.shape[1]))
        self.mask = torch.nn.functional.pad(self.mask, (0, PADDED - self.mask.shape[1]))
        self.subject = SimpleNamespace(
            model=self.model,
            tokenizer=lambda *_: (self.ids, self.mask, 0),
            data=SimpleNamespace(max_length=PADDED),
            device=torch.device("cpu"),
            rank=0,
        )
        self.pixels = torch.randn(2, 3, 384, 384)
        self.image = self.model.encode_image(self.pixels[:1])
        self.texts: Texts = encode_distinct(self.subject, captions, K)

    def ours(self) -> Tensor:
        """(K,) scores of one picture with its candidates, its keys and values projected on the way."""
        return match(self.model, self.image, self.texts, torch.arange(K), K)

    def pair_by_pair(self, text: Encoded) -> Tensor:
        """(n,) scores of (n, L, D) encoded texts, each with a copy of the picture, of which nothing is shared."""
        copies = Encoded(*(each.expand(len(text.tokens), *each.shape[1:]) for each in vars(self.image).values()))
        return self.plain.itm(self.plain.fuse(self.plain.project(copies), text)[:, 0])[:, 1]


@torch.no_grad()
def reranking(setting: Setting) -> dict:
    """One picture with its 128 candidates, against pairs one like the other; in turns, medians."""
    text = setting.plain.encode_text(setting.ids[:PAIRS], setting.mask[:PAIRS])
    ways = {"ours": (setting.ours, K), "pair_by_pair": (lambda: setting.pair_by_pair(text), PAIRS)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for turn in range(ROUNDS + 1):  # the first is for warming up
        for name, (run, pairs) in ways.items():
            scores[name], taken = timed(run)
            if turn:
                seconds[name].append(taken / pairs)
    each = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "candidates": K,
        "gflop_a_pair": round(counted(setting.ours) / K, 3),
        "gflop_a_pair_one_by_one": round(counted(ways["pair_by_pair"][0]) / PAIRS, 3),
        "real_tokens_a_caption": round(float(setting.mask.sum(1).float().mean()), 2),
        "cpu_ms_a_pair": {name: round(value * 1e3, 2) for name, value in each.items()},
        "times_faster": round(each["pair_by_pair"] / each["ours"], 1),
        "largest_difference_of_scores": float((scores["ours"][:PAIRS] - scores["pair_by_pair"]).abs().max()),
    }


@torch.no_grad()
def evaluation(setting: Setting) -> dict:
    """Retrieval of 1,000 pictures x 5,000 captions by ITC with every feature made once, against both towers for every pair.

    The seconds of a picture, a caption and a pair come from a sample; the ranks of all are computed.
    """
    model = setting.model
    _, pictures = timed(lambda: model.encode_image(setting.pixels).embed)
    _, captions = timed(lambda: model.encode_text(setting.ids, setting.mask).embed)
    pair, count = 0.0, 2
    for n in range(count):
        given = setting.ids[n : n + 1], setting.mask[n : n + 1]
        _, taken = timed(
            lambda n=n, given=given: (
                model.encode_image(setting.pixels[n : n + 1]).embed @ model.encode_text(*given).embed.T
            )
        )
        pair += taken / count
    images, texts = torch.randn(PICTURES, 256), torch.randn(CAPTIONS, 256)
    of = torch.arange(PICTURES).repeat_interleave(CAPTIONS // PICTURES)
    _, ranking = timed(
        lambda: (
            ranks(images, texts, torch.arange(PICTURES), of) + ranks(texts, images, of, torch.arange(PICTURES)).sum()
        )
    )
    cached = PICTURES * pictures / len(setting.pixels) + CAPTIONS * captions / len(setting.ids) + ranking
    return {
        "pictures": PICTURES,
        "captions": CAPTIONS,
        "estimated_from": f"{len(setting.pixels)} pictures, {len(setting.ids)} captions, {count} pairs; ranks of all",
        "cached_cpu_seconds": round(cached, 1),
        "pair_by_pair_cpu_seconds": round(PICTURES * CAPTIONS * pair),
        "times_faster": round(PICTURES * CAPTIONS * pair / cached),
    }


def measure() -> dict:
    """JSON-able. Goals: at most 1.4 GFLOP a pair, 5 times faster, scores equal to 1e-4; evaluation 5 times faster."""
    torch.set_num_threads(1)
    setting = Setting()
    return {"rerank": reranking(setting), "retrieval": evaluation(setting)}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
