"""VLMo's pre-training step at base size, 224 px, texts padded to 40: operations, time and memory against tests/vlmo_reference.py.

``python -m benchmarks.vlmo_step``. The model is random, the captions Flickr8k's, 4 of them with 51 tokens; the operations are
counted by torch (multiply-add = 2). Peak memory also where cheap activations are made again, `vlp.encoders.activation_checkpointing`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.albef_step import captions, in_fresh_process, masked_of, resident
from tests.vlmo_reference import reference_step
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.encoders.mome import BASE
from vlp.forward import Graph, StepContext
from vlp.losses.masked import IGNORED
from vlp.models.base import Model
from vlp.models.vlmo import Vlmo, VlmoModel
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.train import Pretrainer, single_graph
from vlp.training.detached import DetachedGraph
from vlp.types import Batch, MaskedIds

THREADS, LENGTH = 1, 40
PAIRS, TOKENS = 4, 51
PUBLISHED = 2649  # GFLOP of the published code
OBJECTIVES = {
    "itc": ImageTextContrast(weight=0.5),
    "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
    "itm": ImageTextMatching(keys="student", duplicates="negative"),
    "mlm": MaskedText(weight=0.25, mean_over="local"),
}
SPEC = Vlmo(replace(BASE, drop_path=0.0, text_dropout=0.0))


def given(reference: bool) -> tuple[Tensor, Tensor, MaskedIds]:
    """Ids, mask and what is masked; the published code pads to `LENGTH`."""
    ids, mask, vocabulary = captions(PAIRS, TOKENS)
    masked = masked_of(ids, mask, vocabulary)
    if not reference:
        return ids, mask, masked
    old, more = ids.shape[1], LENGTH - ids.shape[1]
    positions = masked.positions // old * LENGTH + masked.positions % old
    padded = MaskedIds(F.pad(masked.input_ids, (0, more)), positions, masked.labels)
    return F.pad(ids, (0, more)), F.pad(mask, (0, more)), padded


def reference_losses(model: VlmoModel, batch: Batch, masked: MaskedIds) -> Tensor:
    labels = torch.full_like(batch.input_ids, IGNORED, device=masked.labels.device)
    labels.view(-1)[masked.positions] = masked.labels
    losses = reference_step(model, batch, masked.input_ids, labels)
    return sum(OBJECTIVES[name].weight * loss for name, loss in losses.items())


def product_losses(
    model: VlmoModel, batch: Batch, masked: MaskedIds, graph: Callable[[Model], Graph] = single_graph
) -> Tensor:
    with patch.object(TextMasking, "__call__", lambda *_: masked):
        return Pretrainer(model, OBJECTIVES, graph)([batch], None, StepContext())[1]


COUNTED = ("product", "reference")  # torch's counter hooks parameters, which autograd.grad refuses
STEPS = {
    "product": product_losses,
    "per_loss": partial(product_losses, graph=partial(DetachedGraph, per_loss=True)),  # train.backward=per_loss
    "reference": reference_losses,
}


def prepared(name: str, checkpointing: Checkpointing = "none") -> tuple:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ids, mask, masked = given(name == "reference")
    model = SPEC.build()
    model.set_activation_checkpointing(checkpointing)
    return model, Batch(torch.arange(PAIRS), torch.randn(PAIRS, 3, 224, 224), ids, mask), masked


def run(name: str, ready: tuple, bf16: bool = False) -> float:
    """CPU seconds of one forward and backward."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss = STEPS[name](*ready)
    loss.backward()
    return time.process_time() - began


def operations(name: str) -> int:
    """GFLOP of a step, which is run for real: the host asks for lengths."""
    ready = prepared(name)
    with FlopCounterMode(display=False) as counter:
        run(name, ready)
    return round(counter.get_total_flops() / 1e9)


def peak(name: str, checkpointing: Checkpointing) -> float:
    """MiB of peak growth over the state before the step, gradients included."""
    ready = prepared(name, checkpointing)
    before = resident("VmRSS")
    run(name, ready)
    return round(resident("VmHWM") - before)


def seconds(rounds: int = 2) -> dict:
    """Of the reference, of ours, and of ours in bfloat16, in turn, best of ``rounds``; and their ratios."""
    ways = {"reference": ("reference", False), "fp32": ("product", False), "bf16": ("product", True)}
    ways |= {"per_loss_bf16": ("per_loss", True)}
    ready = {name: prepared(name) for name in STEPS}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first is for warming up
        for way, (name, bf16) in ways.items():
            ready[name][0].zero_grad()
            taken[way].append(run(name, ready[name], bf16))
    best = {way: min(each[1:]) for way, each in taken.items()}
    ratios = {f"{way}_to_reference": round(best[way] / best["reference"], 3) for way in list(ways)[1:]}
    return {f"{way}_cpu_seconds": round(each, 2) for way, each in best.items()} | ratios


def memory() -> dict:
    """Peaks, and their ratios to the reference's, by train.backward and train.activation_checkpointing."""
    ways = {f"{step}_{how}": (step, how) for step in ("product", "per_loss") for how in ("none", "cheap")}
    ways |= {"reference": ("reference", "none")}
    found = {way: in_fresh_process(peak, *how) for way, how in ways.items()}
    ratios = {f"{way}_to_reference": round(mib / found["reference"], 3) for way, mib in found.items()}
    return {f"{way}_mib": mib for way, mib in found.items()} | ratios


def counted() -> dict:
    """GFLOP of both, at 4 pairs, beside what ../shared/reference/costs.md says of the published code."""
    found = {name: in_fresh_process(operations, name) for name in COUNTED}
    return {**found, "published": PUBLISHED, "ratio": round(found["product"] / PUBLISHED, 3)}


def measure() -> dict:
    """JSON-able. Goals, of the reference's: operations 0.83, memory 0.45, time 0.75 and 0.40."""
    return {"operations": counted(), "time": in_fresh_process(seconds), "memory": memory(), "threads": THREADS}


if __name__ == "__main__":
    parts = {"operations": counted, "time": seconds, "memory": memory}
    print(json.dumps(measure() if len(sys.argv) < 2 else {name: parts[name]() for name in sys.argv[1:]}, indent=1))
