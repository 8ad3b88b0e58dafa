"""Bytes that a process of two holds under DDP, FSDP2 and ZeRO-3, and the growth of its memory while it saves a checkpoint.

The model is a stack of linear layers with an average of its weights, trained for one step by AdamW.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import main, resident_mib
from tests.processes import launched_with
from vlp.config import Training
from vlp.distributed import local_shard
from vlp.optim.ema import EMA
from vlp.optim.optimizers import AdamW
from vlp.testing import ProcessPool
from vlp.training import checkpoint
from vlp.training.launch import start_engine
from vlp.training.state import TrainState

SIZES = {"layers": 32, "width": 1024}
SMALL = {"layers": 4, "width": 16}
MIB = 2**20


class Stack(nn.Module):
    """Mean of the squares that a stack of linear layers computes."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def held(process: int, processes: int, engine_name: str, layers: int, width: int) -> dict[str, float]:
    """Train one step and save in this process; return MiB by part, and the growth of the resident memory in the save."""
    os.dup2(2, 1)  # DeepSpeed prints to the standard output, which is for the results
    with launched_with(engine_name, process, processes):
        engine = start_engine(Training(steps=1), processes)
        model = Stack(layers, width)
        engine.place(model)
        state = TrainState(average=EMA(model, 0.9))
        names, parameters = zip(*model.named_parameters())
        optimizer = AdamW().build([{"params": list(parameters), "names": list(names)}])
        module, prepared = engine.prepare(model, model, optimizer, state)
        engine.accelerator.backward(module(torch.randn(2, width)))
        gradients = [p.grad for p in model.parameters()]
        prepared.step()
        state.average.update(model)
        inner, parts = prepared.optimizer, {}
        if engine_name == "zero3":
            # DeepSpeed has stepped already. It keeps a buffer of gradients and a float32 copy of the weights.
            gradients, parts["master"] = [inner.grad_partitions_flat_buffer], inner.fp32_partitioned_groups_flat
            inner = inner.optimizer
        moments = [x for values in inner.state.values() for x in values.values() if x.ndim]
        parts |= {"weights": model.parameters(), "gradients": gradients, "moments": moments}
        parts["average"] = state.average.network.parameters()
        found = {name: sum(local_shard(x).nbytes for x in tensors) / MIB for name, tensors in parts.items()}
        files = {"model": model.state_dict(), "optimizer": engine.optimizer_tensors(model, prepared.optimizer)}
        files |= state.files()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident_mib("VmRSS")
        with tempfile.TemporaryDirectory() as folder:
            if process:
                checkpoint.gather(files)
            else:
                checkpoint.save(Path(folder), 1, files, {})
        found["growth_in_save"] = resident_mib("VmHWM") - before
        return {name: round(mib, 2) for name, mib in found.items()}


def measure(layers: int, width: int) -> dict:
    found: dict = {"model_mib": round(layers * (width + 1) * width * 4 / MIB, 2)}
    found["largest_tensor_mib"] = round(width * width * 4 / MIB, 2)
    pool = ProcessPool()
    pool(held, 2, "fsdp2", 2, 16)  # buffers of the processes that exist from the first save on
    for engine in ("ddp", "fsdp2", "zero3"):
        found[engine] = dict(zip(("process_0", "process_1"), pool(held, 2, engine, layers, width)))
    pool.close()
    return found


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
