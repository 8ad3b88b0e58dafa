"""VLMo's pre-training step at base size, 224 px, texts padded to 40: operations, time and memory against tests/vlmo_reference.py.

``python -m tests.bench.vlmo_step``. The model is random, the captions Flickr8k's: the operations are counted by torch
(multiply-add = 2) on meta tensors, where only ids and masks are real; time and peak memory are measured at 4 pairs.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.albef_step import captions, masked_of, resident
from tests.vlmo_reference import reference_step
from vlp.encoders.mome import BASE
from vlp.forward import Forward, Surroundings
from vlp.losses.masked import IGNORED
from vlp.models.vlmo import Vlmo, VlmoModel
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.sampling import MaskedIds, TextMasking
from vlp.types import Batch

THREADS, LENGTH = 1, 40
TOKENS = {4: 51, 8: 101}  # real ones, of so many pairs
PUBLISHED = {4: 2649, 8: 5297}  # GFLOP of the published code
OBJECTIVES = {
    "itc": ImageTextContrast(weight=0.5),
    "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
    "itm": ImageTextMatching(keys="student", same_picture="negative"),
    "mlm": MaskedText(weight=0.25, mean_over="process"),
}
SPEC = Vlmo(replace(BASE, drop_path=0.0, text_dropout=0.0))


def given(count: int, reference: bool) -> tuple[Tensor, Tensor, MaskedIds]:
    """Ids, mask and what is masked; the published code pads to `LENGTH`."""
    ids, mask, vocabulary = captions(count, TOKENS[count])
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


def product_losses(model: VlmoModel, batch: Batch, masked: MaskedIds) -> Tensor:
    with patch.object(TextMasking, "__call__", lambda *_: masked):
        f = Forward(model, batch, around=Surroundings())
        return sum(objective.weight * objective(f) for objective in OBJECTIVES.values())


STEPS = {"product": product_losses, "reference": reference_losses}


def prepared(name: str, count: int = 4, checkpointing: bool = False) -> tuple:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ids, mask, masked = given(count, name == "reference")
    model = SPEC.build()
    if checkpointing:
        model.set_checkpointing(True)
    return model, Batch(torch.arange(count), torch.randn(count, 3, 224, 224), ids, mask), masked


def run(name: str, ready: tuple, bf16: bool = False) -> float:
    """CPU seconds of one forward and backward."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss = STEPS[name](*ready)
    loss.backward()
    return time.process_time() - began


def operations(name: str, count: int) -> int:
    """GFLOP of a step, run for real: the host asks for lengths."""
    model, batch, masked = prepared(name, count)
    with FlopCounterMode(display=False) as counter:
        run(name, (model, batch, masked))
    return round(counter.get_total_flops() / 1e9)


def peak(name: str, checkpointing: bool = False) -> float:
    """MiB of peak growth over the state before the step, gradients included."""
    ready = prepared(name, checkpointing=checkpointing)
    before = resident("VmRSS")
    run(name, ready)
    return round(resident("VmHWM") - before)


if __name__ == "__main__":
    what, *args = sys.argv[1:]
    if what == "time":
        ready = {n: prepared(n) for n in args[0].split(",")}
        for r in range(2):
            for n in ready:
                for b in (False, True):
                    if b and n == "reference":
                        continue
                    ready[n][0].zero_grad()
                    print(n, b, run(n, ready[n], b), flush=True)
    else:
        print(what, globals()[what](*[int(a) if a.isdigit() else a for a in args]))
