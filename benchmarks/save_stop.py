"""Time that a save stops the training, in the background and waiting for the whole checkpoint, and the growth of host memory.

The tensors of a model, its average and two moments are saved in turn both ways. Each tensor is made when it is saved, as one
that is sharded over processes: `benchmarks.engine_memory` saves real ones.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import in_fresh_process, main, resident_mib
from vlp.training import checkpoint
from vlp.training.saver import Saver

SIZES = {"layers": 48, "width": 1024, "repeats": 5, "saves": 30}
SMALL = {"layers": 2, "width": 16, "repeats": 2, "saves": 3}
MIB = 2**20


class Gathered:
    """A tensor that is made when it is saved, as one that is sharded over processes."""

    def __init__(self, width: int):
        self.shape, self.dtype = torch.Size([width, width]), torch.float32

    def full_tensor(self) -> torch.Tensor:
        return torch.ones(self.shape)


def state_of(layers: int, width: int) -> checkpoint.Files:
    return {
        name: {f"{number}.{kind}": Gathered(width) for number in range(layers) for kind in kinds}
        for name, kinds in {"model": ("w",), "average": ("w",), "optimizer": ("exp_avg", "exp_avg_sq")}.items()
    }


def grown(layers: int, width: int, saves: int) -> dict[int, float]:
    """Return the growth of the peak of resident memory in MiB from before the first save to after some of the saves."""
    files, growth = state_of(layers, width), {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saver = Saver(Path(folder), keep=1)
        saver.save(0, {"model": {"0": Gathered(1)}}, {})  # loads the code of a save
        saver.wait()
        before = resident_mib("VmRSS")
        for step in range(1, saves + 1):
            saver.save(step, files, {})
            saver.wait()
            if step in (1, 2, 5, 10, 20, saves):
                growth[step] = round(resident_mib("VmHWM") - before, 2)
        saver.close()
    return growth


def timed(layers: int, width: int, repeats: int) -> dict[str, float]:
    """Return the medians of the seconds of each way, and the growth of the peak of resident memory in MiB."""
    files = state_of(layers, width)
    waiting, stopped = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saver = Saver(Path(folder), keep=1)
        saver.save(1, {"model": {str(number): Gathered(width) for number in range(8)}}, {})  # buffers of the first save
        saver.wait()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident_mib("VmRSS")
        for step in range(2, 2 + 2 * repeats, 2):
            began = time.perf_counter()
            checkpoint.save(Path(folder), step, files, {})
            checkpoint.prune(Path(folder), 1, step)
            waiting.append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.save(step + 1, files, {})
            stopped.append(time.perf_counter() - began)
            saver.wait()
        saver.close()
        growth = resident_mib("VmHWM") - before
    return {"waiting": statistics.median(waiting), "stopped": statistics.median(stopped), "growth": growth}


def measure(layers: int, width: int, repeats: int, saves: int) -> dict:
    found = in_fresh_process(timed, layers, width, repeats)
    return {
        "checkpoint_mib": round(4 * layers * width * width * 4 / MIB, 2),
        "largest_tensor_mib": round(width * width * 4 / MIB, 2),
        "growth_in_save_mib": round(found["growth"], 2),
        "growth_after_saves_mib": in_fresh_process(grown, max(1, layers // 8), width, saves),
        "waiting_seconds": round(found["waiting"], 3),
        "background_seconds": round(found["stopped"], 3),
        "ratio": round(found["stopped"] / found["waiting"], 3),
    }


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
