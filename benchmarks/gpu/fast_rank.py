"""Contrastive loss at 32,768 x 512, re-ranking and VQA ranking, against the plain and the published ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from open_clip.loss import ClipLoss

from benchmarks import contrastive_memory, rerank, vqa_ranking
from benchmarks.gpu.timing import DEVICE, Step, ratio, timed


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    return {
        "contrastive loss": partial(contrast, small),
        "re-ranking": partial(reranking, small),
        "VQA ranking": partial(ranking, small),
    }


def contrast(small: bool) -> dict:
    """Forward and backward in float32, the loss alone."""
    rows, width = (64, 16) if small else (32_768, 512)
    given = contrastive_memory.inputs(rows, width, DEVICE)
    x, y, scale, _ = given
    loss_of = ClipLoss()

    def theirs() -> None:
        torch.autograd.grad(loss_of(x, y, scale), (x, y, scale))

    ways: dict[str, Step] = {
        name: partial(contrastive_memory.forward_backward, name, given) for name in ("plain", "tiled")
    }
    found = timed({"open_clip": theirs, **ways}, small)
    return {
        "rows": rows,
        "ways": found,
        "times_faster": ratio(found["open_clip"]["seconds"], found["tiled"]["seconds"]),
        "memory_share": ratio(found["tiled"]["peak_mib"], found["open_clip"]["peak_mib"]) if DEVICE == "cuda" else None,
    }


@torch.no_grad()
def reranking(small: bool) -> dict:
    """One image with its candidates, seconds a pair, in float32 and bf16."""
    sizes = rerank.SMALL if small else rerank.SIZES
    setting = rerank.Setting(sizes["spec"], sizes["k"], sizes["k"], DEVICE)
    apart = float((setting.ours() - setting.pair_by_pair()).abs().max())
    found = timed({"ours": setting.ours, "pair by pair": setting.pair_by_pair}, small)
    with torch.autocast(DEVICE, torch.bfloat16):
        found |= timed({"ours, bf16": setting.ours, "pair by pair, bf16": setting.pair_by_pair}, small)
    return {
        "candidates": sizes["k"],
        "ways": found,
        "times_faster": ratio(found["pair by pair"]["seconds"], found["ours"]["seconds"]),
        "largest_difference_of_scores": apart,
        "ok": apart <= 1e-4,
    }


@torch.no_grad()
def ranking(small: bool) -> dict:
    """One question with its candidates."""
    given = vqa_ranking.prepared(**(vqa_ranking.SMALL if small else vqa_ranking.SIZES), device=DEVICE)
    compared = vqa_ranking.compared(given)
    ways = {"ours": partial(vqa_ranking.ours, *given), "published": partial(vqa_ranking.published, *given)}
    found = timed(ways, small)
    return {
        **compared,
        "ways": found,
        "times_faster": ratio(found["published"]["seconds"], found["ours"]["seconds"]),
        "ok": compared["largest_difference_of_scores"] <= 1e-4,
    }
