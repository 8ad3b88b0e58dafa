"""Retrieval and re-ranking with ViT-B/16 at 384 px and BERT-base, 577 tokens a picture, on Flickr8k's captions, one thread.

``python -m benchmarks.rerank``. The models are random. "Pair by pair" is what the published code does with a pair: a copy of
the picture's tokens for each caption, texts padded to 30, attention written out; costs.md has 11.48 GFLOP for it, fusion alone.
Operations are torch's count (multiply-add = 2), of real tensors.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import first_captions, main, text_tokenizer
from benchmarks.models import albef, tiny_albef
from tests.albef_reference import plain
from vlp.models.albef import Albef, AlbefModel
from vlp.tasks.metrics import ranks
from vlp.tasks.rerank import Texts, encode_distinct, match
from vlp.types import Encoded

PADDED = 30
# pairs: that the slow way is timed on
SIZES = {"spec": albef(384, mlm=False), "k": 128, "pairs": 16, "rounds": 3, "pictures": 1_000, "captions": 5_000}
SMALL = {"spec": tiny_albef(mlm=False), "k": 4, "pairs": 2, "rounds": 1, "pictures": 10, "captions": 50}


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
    """One model twice: ours, and with everything that saves work taken out.

    Args:
        k: candidates of the picture.
        pairs: that are scored pair by pair.
    """

    @torch.no_grad()
    def __init__(self, spec: Albef, k: int, pairs: int, device: str = "cpu"):
        torch.manual_seed(0)
        self.k, self.pairs = k, pairs
        self.model: AlbefModel = spec.build().to(device).eval()
        self.plain = plain(copy.deepcopy(self.model))
        every = first_captions()
        captions = every[:: len(every) // k][:k]
        ids, mask, _ = text_tokenizer(clean=True)(captions, PADDED)
        more = PADDED - ids.shape[1]
        self.ids, self.mask = (torch.nn.functional.pad(x, (0, more)).to(device) for x in (ids, mask))
        subject = SimpleNamespace(
            model=self.model,
            tokenizer=lambda *_: (self.ids.cpu(), self.mask.cpu(), 0),
            data=SimpleNamespace(max_length=PADDED),
            device=torch.device(device),
            rank=0,
        )
        self.pixels = torch.randn(2, 3, *self.model.preprocess.size).to(device)
        self.image = self.model.encode_image(self.pixels[:1])
        self.texts: Texts = encode_distinct(subject, captions, k)
        self.text = self.plain.encode_text(self.ids[:pairs], self.mask[:pairs])

    def ours(self) -> Tensor:
        """(K,) scores of one picture with its candidates, its keys and values projected on the way."""
        return match(self.model, self.image, self.texts, torch.arange(self.k), self.k)

    def pair_by_pair(self) -> Tensor:
        """(n,) scores of the first pairs, each with a copy of the picture, of which nothing is shared."""
        image = self.image
        copies = (each.expand(self.pairs, *each.shape[1:]) for each in (image.tokens, image.mask, image.embed))
        projected = self.plain.project(Encoded(*copies))
        return self.plain.itm(self.plain.fuse(projected, self.text)[:, 0])[:, 1].cpu()


@torch.no_grad()
def reranking(setting: Setting, rounds: int) -> dict:
    """One picture with its candidates, against pairs one like the other; in turns, medians."""
    ways = {"ours": (setting.ours, setting.k), "pair_by_pair": (setting.pair_by_pair, setting.pairs)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for turn in range(rounds + 1):  # the first is for warming up
        for name, (run, pairs) in ways.items():
            scores[name], taken = timed(run)
            if turn:
                seconds[name].append(taken / pairs)
    each = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "candidates": setting.k,
        "gflop_a_pair": round(counted(setting.ours) / setting.k, 3),
        "gflop_a_pair_one_by_one": round(counted(setting.pair_by_pair) / setting.pairs, 3),
        "real_tokens_a_caption": round(float(setting.mask.sum(1).float().mean()), 2),
        "cpu_ms_a_pair": {name: round(value * 1e3, 2) for name, value in each.items()},
        "times_faster": round(each["pair_by_pair"] / each["ours"], 1),
        "largest_difference_of_scores": float((scores["ours"][: setting.pairs] - scores["pair_by_pair"]).abs().max()),
    }


@torch.no_grad()
def evaluation(setting: Setting, pictures: int, captions: int) -> dict:
    """Retrieval of pictures x captions by ITC with every feature made once, against both towers for every pair.

    The seconds of a picture, a caption and a pair come from a sample; the ranks of all are computed.
    """
    model = setting.model
    _, of_pictures = timed(lambda: model.encode_image(setting.pixels).embed)
    _, of_captions = timed(lambda: model.encode_text(setting.ids, setting.mask).embed)
    pair, count = 0.0, 2
    for n in range(count):
        given = setting.ids[n : n + 1], setting.mask[n : n + 1]
        _, taken = timed(
            lambda n=n, given=given: (
                model.encode_image(setting.pixels[n : n + 1]).embed @ model.encode_text(*given).embed.T
            )
        )
        pair += taken / count
    images, texts = torch.randn(pictures, 256), torch.randn(captions, 256)
    every, of = torch.arange(pictures), torch.arange(pictures).repeat_interleave(captions // pictures)
    _, ranking = timed(lambda: ranks(images, texts, every, of).sum() + ranks(texts, images, of, every).sum())
    cached = pictures * of_pictures / len(setting.pixels) + captions * of_captions / len(setting.ids) + ranking
    return {
        "pictures": pictures,
        "captions": captions,
        "estimated_from": f"{len(setting.pixels)} pictures, {len(setting.ids)} captions, {count} pairs; ranks of all",
        "cached_cpu_seconds": round(cached, 1),
        "pair_by_pair_cpu_seconds": round(pictures * captions * pair),
        "times_faster": round(pictures * captions * pair / cached),
    }


def measure(spec: Albef, k: int, pairs: int, rounds: int, pictures: int, captions: int) -> dict:
    """JSON-able. Goals: at most 1.4 GFLOP a pair, 5 times faster, scores equal to 1e-4; evaluation 5 times faster."""
    torch.set_num_threads(1)
    setting = Setting(spec, k, pairs)
    return {"rerank": reranking(setting, rounds), "retrieval": evaluation(setting, pictures, captions)}


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
