"""``vlp plan`` against a real step of ALBEF: ``python -m benchmarks.plan_accuracy``.

Operations are those that torch counts, memory is the peak of what torch allocates in forward and backward, in bfloat16.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import allocated_peak, main
from benchmarks.models import albef, tiny_albef
from vlp.config import Data, Experiment, Training
from vlp.data.reading.shards import Source
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.planning.trace import CPU, StepLosses, trace_step
from vlp.training.setup import configure_model, initial_state

THREADS = 2
SIZES = {"image_size": 256, "pairs": 4, "tokens": 30}
SMALL = {"image_size": 32, "pairs": 4, "tokens": 8}


def measure(image_size: int, pairs: int, tokens: int) -> dict:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = albef(image_size) if image_size > 32 else tiny_albef()
    experiment = Experiment(
        name="plan",
        model=model.resolved(),
        objectives={"itc": ImageTextContrast(), "itm": ImageTextMatching(keys="student"), "mlm": MaskedText()},
        data=Data(train=(Source("shards"),), batch_size=pairs, max_length=tokens),
        train=Training(steps=1, precision="bf16"),
    )
    traced = trace_step(experiment)
    network = experiment.build_model(load_weights=False)
    configure_model(network, experiment.train)
    losses = StepLosses(experiment, network, initial_state(experiment, network, 1, CPU), pairs, tokens)
    with FlopCounterMode(display=False) as flops:
        losses().backward()
    losses.attempt.zero_grad()
    peak = allocated_peak(lambda: losses().backward())
    operations = sum(traced.operations.values())
    return {
        "image_size": image_size,
        "pairs": pairs,
        "planned_gflop": round(operations / 1e9, 1),
        "measured_gflop": round(flops.get_total_flops() / 1e9, 1),
        "operations_ratio": round(operations / flops.get_total_flops(), 3),
        "planned_mib": round(traced.peak / 2**20),
        "measured_mib": round(peak / 2**20),
        "memory_ratio": round(traced.peak / peak, 3),
        "goal": "within 10 %",
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
