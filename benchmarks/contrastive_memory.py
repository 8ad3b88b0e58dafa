"""Memory and time of the symmetric contrastive loss, plain and tiled: ``python -m benchmarks.contrastive_memory``.

Peak growth (MiB) is the peak resident memory of a fresh process after forward and backward, minus its resident memory
once the inputs exist. So it counts everything but the two input matrices: both gradients (2 x 64 MiB at 32,768 x 512),
what autograd keeps, the tiles, and the libraries' work space. Times are CPU seconds, which other jobs disturb less.
"""

import json
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from vlp.losses.softmax import info_nce
from vlp.losses.tiled import tiled_info_nce

WIDTH, SCALE, THREADS = 512, 14.3, 2


def both_ways(loss):
    return lambda x, y, scale, ids: loss(x, y, scale, ids, ids) + loss(y, x, scale, ids, ids)


LOSSES = {
    "plain": both_ways(info_nce),
    "tiled": both_ways(tiled_info_nce),
}


def measure() -> dict:
    """JSON-able: the goal's case, the plain form where it fits, and how the two compare there."""
    large = in_fresh_process(cost, "tiled", 32768)
    plain, tiled = in_fresh_process(cost, "plain", 4096), in_fresh_process(cost, "tiled", 4096)
    return {
        "shape": [32768, WIDTH],
        "threads": THREADS,
        **large,
        # What the plain form would take: it grows with the square of the rows.
        "plain_peak_growth_mb_extrapolated": plain["peak_growth_mb"] * (32768 // 4096) ** 2,
        "at_4096": {"plain": plain, "tiled": tiled, **in_fresh_process(compare, 4096)},
    }


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def cost(name: str, rows: int) -> dict:
    """Of one forward and backward."""
    arguments = inputs(rows)
    before, cpu, wall = memory_mb("VmRSS"), time.process_time(), time.perf_counter()
    forward_backward(name, arguments)
    return {
        "peak_growth_mb": round(memory_mb("VmHWM") - before, 1),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "seconds": round(time.perf_counter() - wall, 2),
    }


def compare(rows: int) -> dict:
    """Tiled against plain: relative error of the value and of the worst gradient, and CPU time (best of three each)."""
    arguments, seconds, results = inputs(rows), {"plain": [], "tiled": []}, {}
    for _ in range(3):
        for name, taken in seconds.items():
            start = time.process_time()
            results[name] = forward_backward(name, arguments)
            taken.append(time.process_time() - start)
    (expected, *references), (value, *gradients) = results["plain"], results["tiled"]
    return {
        "value_relative_error": abs(value / expected - 1).item(),
        "gradient_relative_error": max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients, references)),
        "time_ratio_tiled_to_plain": round(min(seconds["tiled"]) / min(seconds["plain"]), 3),
    }


def forward_backward(name: str, arguments) -> tuple:
    x, y, scale, ids = arguments
    loss = LOSSES[name](x, y, scale, ids)
    return loss.detach(), *torch.autograd.grad(loss, (x, y, scale))


def inputs(rows: int) -> tuple:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(rows, WIDTH), dim=1).requires_grad_() for _ in range(2))
    return x, y, torch.tensor([SCALE], requires_grad=True), torch.arange(rows)


def memory_mb(field: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM at its peak (Linux)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
