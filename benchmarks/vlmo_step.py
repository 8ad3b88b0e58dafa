"""VLMo's pre-training step at base size, 224 px, texts padded to 40: operations, time and memory against tests/vlmo_reference.py.

``python -m benchmarks.vlmo_step``. The model is random, the captions Flickr8k's, 4 of them with 51 tokens; the operations are
counted by torch (multiply-add = 2). Peak memory also where cheap activations are made again, `vlp.encoders.activation_checkpointing`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.albef_step import captions, masked_of
from benchmarks.common import in_fresh_process, main, resident_mib
from benchmarks.models import TINY_VLMO, VLMO
from tests.vlmo_reference import attend, attend_fused, reference_step
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.forward import Graph, StepContext
from vlp.losses.masked import IGNORED
from vlp.models.base import Model
from vlp.models.vlmo import Vlmo, VlmoModel
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.train import Pretrainer, single_graph
from vlp.training.detached import DetachedGraph
from vlp.types import Batch, MaskedIds

THREADS = 1
LENGTH = 40  # tokens that the published code pads to
PUBLISHED = 2649  # GFLOP of the published code, at 4 pairs of 51 tokens
# timed: pairs, and their tokens
SIZES = {"spec": VLMO, "timed": (4, 51), "rounds": 2}
SMALL = {"spec": TINY_VLMO, "timed": (4, 51), "rounds": 1}
OBJECTIVES = {
    "itc": ImageTextContrast(weight=0.5),
    "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
    "itm": ImageTextMatching(keys="student", duplicates="negative"),
    "mlm": MaskedText(weight=0.25, mean_over="local"),
}


def padded(ids: Tensor, mask: Tensor, masked: MaskedIds) -> tuple[Tensor, Tensor, MaskedIds]:
    """The same texts, padded to `LENGTH`."""
    old, more = ids.shape[1], LENGTH - ids.shape[1]
    positions = masked.positions // old * LENGTH + masked.positions % old
    masked = MaskedIds(F.pad(masked.input_ids, (0, more)), positions, masked.labels)
    return F.pad(ids, (0, more)), F.pad(mask, (0, more)), masked


def reference_losses(
    model: VlmoModel, batch: Batch, masked: MaskedIds, attend: Callable[..., Tensor] = attend
) -> Tensor:
    labels = torch.full_like(batch.input_ids, IGNORED, device=masked.labels.device)
    labels.view(-1)[masked.positions] = masked.labels
    losses = reference_step(model, batch, masked.input_ids, labels, attend=attend)
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
    "reference_fused": partial(reference_losses, attend=attend_fused),  # with attention that it predates
}


def built(spec: Vlmo) -> VlmoModel:
    """The same random weights each time."""
    torch.manual_seed(0)
    return spec.build()


def prepared(
    name: str, model: VlmoModel, size: tuple[int, int], how: Checkpointing = "none", device: str = "cpu"
) -> tuple:
    """Model, batch and masked texts of one way of `STEPS`.

    Args:
        model: is moved to the device.
        size: pairs, and their tokens.
    """
    torch.manual_seed(0)
    ids, mask, vocabulary = captions(*size)
    masked = masked_of(ids, mask, vocabulary, device)
    if name.startswith("reference"):
        ids, mask, masked = padded(ids, mask, masked)
    model.to(device).set_activation_checkpointing(how)
    batch = Batch(torch.arange(len(ids)), torch.randn(len(ids), 3, *model.preprocess.size), ids, mask)
    return model, batch.to(torch.device(device)), masked


def losses_of(name: str, ready: tuple) -> Tensor:
    """() sum of what one way of `STEPS` makes of what was `prepared`."""
    return STEPS[name](*ready)


def run(name: str, ready: tuple, bf16: bool = False) -> float:
    """CPU seconds of one forward and backward."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = losses_of(name, ready)
    loss.backward()
    return time.process_time() - began


def optimizer_of(name: str, model: VlmoModel) -> torch.optim.Optimizer:
    if name.startswith("reference"):
        return torch.optim.AdamW(model.parameters())
    return AdamW().build([{"params": list(model.parameters())}])


def update(name: str, ready: tuple, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def operations(name: str, spec: Vlmo, size: tuple[int, int]) -> float:
    """GFLOP of a step, which is run for real: the host asks for lengths."""
    torch.set_num_threads(THREADS)
    ready = prepared(name, built(spec), size)
    with FlopCounterMode(display=False) as counter:
        run(name, ready)
    return counter.get_total_flops() / 1e9


def all_operations(*sizes) -> dict:
    """GFLOP of both, beside what ../shared/reference/costs.md says of the published code at 4 pairs."""
    found = {name: in_fresh_process(operations, name, *sizes) for name in COUNTED}
    rounded = {name: round(gflop) for name, gflop in found.items()}
    return {**rounded, "published": PUBLISHED, "ratio": round(found["product"] / PUBLISHED, 3)}


def peak(name: str, how: Checkpointing, spec: Vlmo, size: tuple[int, int]) -> float:
    """MiB of peak growth over the state before the step, gradients included."""
    torch.set_num_threads(THREADS)
    ready = prepared(name, built(spec), size, how)
    before = resident_mib("VmRSS")
    run(name, ready)
    return max(1, round(resident_mib("VmHWM") - before))


def seconds(rounds: int, spec: Vlmo, size: tuple[int, int]) -> dict:
    """Of the reference, of ours, and of ours in bfloat16, in turn, best of ``rounds``; and their ratios."""
    torch.set_num_threads(THREADS)
    ways = {"reference": ("reference", False), "fp32": ("product", False), "bf16": ("product", True)}
    ways |= {"per_loss_bf16": ("per_loss", True)}
    ready = {name: prepared(name, built(spec), size) for name, _ in ways.values()}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first is for warming up
        for way, (name, bf16) in ways.items():
            ready[name][0].zero_grad()
            taken[way].append(run(name, ready[name], bf16))
    best = {way: min(each[1:]) for way, each in taken.items()}
    ratios = {f"{way}_to_reference": round(best[way] / best["reference"], 3) for way in list(ways)[1:]}
    return {f"{way}_cpu_seconds": round(each, 2) for way, each in best.items()} | ratios


def memory(*sizes) -> dict:
    """Peaks, and their ratios to the reference's, by train.backward and train.activation_checkpointing."""
    ways = {f"{step}_{how}": (step, how) for step in ("product", "per_loss") for how in ("none", "cheap")}
    ways |= {"reference": ("reference", "none")}
    found = {way: in_fresh_process(peak, *how, *sizes) for way, how in ways.items()}
    ratios = {f"{way}_to_reference": round(mib / found["reference"], 3) for way, mib in found.items()}
    return {f"{way}_mib": mib for way, mib in found.items()} | ratios


def measure(spec: Vlmo, timed: tuple[int, int], rounds: int) -> dict:
    """JSON-able. Goals, of the reference's: operations 0.83, memory 0.45, time 0.75 and 0.40."""
    return {
        "operations": all_operations(spec, timed),
        "time": in_fresh_process(seconds, rounds, spec, timed),
        "memory": memory(spec, timed),
        "threads": THREADS,
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
