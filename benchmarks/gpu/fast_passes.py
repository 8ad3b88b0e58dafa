"""ALBEF and VLMo against the passes that their published code runs (tests/albef_reference.py, tests/vlmo_reference.py).

A step is forward, backward, optimizer and, of ALBEF, the momentum encoder. The published passes run in float32 (TF32 off, as
is torch's default, and on) and with bf16 and fused attention given to them; ours run in bf16. Same pairs on all sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from benchmarks import albef_step, vlmo_step
from benchmarks.gpu.timing import DEVICE, Step, flops, kernels, matmul_tflops, ratio, timed, utilisation
from benchmarks.models import TINY_VLMO, VLMO, albef, tiny_albef

# pairs, and their tokens
ALBEF_SIZE, VLMO_SIZE, SMALL_SIZE = (64, 805), (32, 402), (4, 51)


@dataclass(frozen=True)
class Way:
    """How a step runs.

    Args:
        name: in `STEPS` of the program.
        given: what `prepared` of the program takes beside the sizes.
        tf32: float32 products in TF32.
    """

    name: str
    bf16: bool = True
    tf32: bool = False
    given: dict[str, object] = field(default_factory=dict)


ALBEF_WAYS = {
    "published float32": Way("reference", bf16=False),
    "published TF32": Way("reference", bf16=False, tf32=True),
    "published bf16 + fused attention": Way("reference", given={"fused_attention": True}),
    "ours": Way("product"),
    "ours, cheap checkpointing": Way("product", given={"how": "cheap"}),
}
VLMO_WAYS = {
    "published float32": Way("reference", bf16=False),
    "published TF32": Way("reference", bf16=False, tf32=True),
    "published bf16 + fused attention": Way("reference_fused"),
    "ours": Way("per_loss"),  # as configs/vlmo/ have it
    "ours, one backward": Way("product"),
    "ours, cheap checkpointing": Way("per_loss", given={"how": "cheap"}),
}


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    if small:
        torch.set_num_threads(1)
    return {"ALBEF": partial(albef_ways, small), "VLMo": partial(vlmo_ways, small)}


def albef_ways(small: bool) -> dict:
    size = SMALL_SIZE if small else ALBEF_SIZE
    model = albef_step.built(tiny_albef() if small else albef(256), size).to(DEVICE)
    steps = steps_of(albef_step, ALBEF_WAYS, model, size=size, queue=16 if small else 65_536)
    return compared(steps, size, steps["ours"], small)


def vlmo_ways(small: bool) -> dict:
    size = SMALL_SIZE if small else VLMO_SIZE
    model = vlmo_step.built(TINY_VLMO if small else VLMO).to(DEVICE)
    steps = steps_of(vlmo_step, VLMO_WAYS, model, size=size)
    # torch's counter of operations hooks parameters, which a backward loss by loss refuses
    return compared(steps, size, steps["ours, one backward"], small)


def steps_of(program, ways: dict[str, Way], model: nn.Module, **sizes) -> dict[str, Step]:
    return {name: step_of(program, way, copy.deepcopy(model), sizes) for name, way in ways.items()}


def step_of(program, way: Way, model: nn.Module, sizes: dict) -> Step:
    given = program.prepared(way.name, model, **sizes, **way.given, device=DEVICE)
    optimizer = program.optimizer_of(way.name, model)

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = way.tf32
        with torch.autocast(DEVICE, torch.bfloat16, enabled=way.bf16):
            loss = program.losses_of(way.name, given)
        loss.backward()
        program.update(way.name, given, optimizer)
        optimizer.zero_grad()

    return step


def compared(steps: dict[str, Step], size: tuple[int, int], counted: Step, small: bool) -> dict:
    """Seconds and peak memory of every way, what ours saves, and where its time goes.

    Args:
        counted: of which operations are counted.
    """
    found = timed(steps, small)
    ours, theirs = found["ours"], found["published bf16 + fused attention"]
    return {
        "pairs": size[0],
        "ways": found,
        "times_faster_than_bf16": ratio(theirs["seconds"], ours["seconds"]),
        "times_faster_than_float32": ratio(found["published float32"]["seconds"], ours["seconds"]),
        "memory_share": ratio(ours["peak_mib"], theirs["peak_mib"]) if ours["peak_mib"] else None,
        "utilisation": utilisation(flops(counted), ours["seconds"], matmul_tflops(small)),
        "kernels": kernels(steps["ours"]),
    }
