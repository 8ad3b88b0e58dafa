"""Memory and time of the symmetric contrastive loss, plain and tiled: ``python -m benchmarks.contrastive_memory``.

Peak growth (MiB) is the peak resident memory of a fresh process after forward and backward, minus its resident memory
once the inputs exist. So it counts everything but the two input matrices: both gradients (2 x 64 MiB at 32,768 x 512),
what autograd keeps, the tiles, and the libraries' work space. Times are CPU seconds, which other jobs disturb less.
"""

import time

import torch
import torch.nn.functional as F

from benchmarks.common import in_fresh_process, main, resident_mib
from vlp.losses.softmax import info_nce
from vlp.losses.tiled import tiled_info_nce

SCALE, THREADS = 14.3, 2
SIZES = {"rows": 32_768, "rows_of_plain": 4096, "width": 512}
SMALL = {"rows": 64, "rows_of_plain": 32, "width": 16}


def both_ways(loss):
    return lambda x, y, scale, ids: loss(x, y, scale, ids, ids) + loss(y, x, scale, ids, ids)


LOSSES = {"plain": both_ways(info_nce), "tiled": both_ways(tiled_info_nce)}


def measure(rows: int, rows_of_plain: int, width: int) -> dict:
    """JSON-able: the goal's case, the plain form where it fits, and how the two compare there."""
    large = in_fresh_process(cost, "tiled", rows, width)
    plain, tiled = (in_fresh_process(cost, name, rows_of_plain, width) for name in ("plain", "tiled"))
    return {
        "shape": [rows, width],
        "threads": THREADS,
        **large,
        # What the plain form would take: it grows with the square of the rows.
        "plain_peak_growth_mb_extrapolated": plain["peak_growth_mb"] * (rows // rows_of_plain) ** 2,
        f"at_{rows_of_plain}": {"plain": plain, "tiled": tiled, **in_fresh_process(compare, rows_of_plain, width)},
    }


def cost(name: str, rows: int, width: int) -> dict:
    """Of one forward and backward."""
    torch.set_num_threads(THREADS)
    arguments = inputs(rows, width)
    before, cpu, wall = resident_mib("VmRSS"), time.process_time(), time.perf_counter()
    forward_backward(name, arguments)
    return {
        "peak_growth_mb": round(resident_mib("VmHWM") - before, 1),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "seconds": round(time.perf_counter() - wall, 2),
    }


def compare(rows: int, width: int) -> dict:
    """Tiled against plain: relative error of the value and of the worst gradient, and CPU time (best of three each)."""
    torch.set_num_threads(THREADS)
    arguments, seconds, results = inputs(rows, width), {"plain": [], "tiled": []}, {}
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


def inputs(rows: int, width: int, device: str = "cpu") -> tuple:
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(rows, width), dim=1).to(device).requires_grad_() for _ in range(2))
    return x, y, torch.tensor([SCALE], device=device, requires_grad=True), torch.arange(rows, device=device)


if __name__ == "__main__":
    main(measure, SIZES, SMALL)
