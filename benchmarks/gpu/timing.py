"""Time, memory, operations and kernels of a step, on a GPU, or on the CPU where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATASHEET_TFLOPS = 989  # bf16 without sparsity: H100 SXM, H200
BLOCKS, STEPS, WARM_UP = 4, 5, 5
Step = Callable[[], object]


def timed(steps: Mapping[str, Step], small: bool) -> dict[str, dict]:
    """Median seconds of 20 steps of each way after warm-up, their spread, and peak memory above what was there before.

    The ways take turns in blocks of steps, so that a drift of the card's clock meets all of them.
    """
    blocks, count, warm_up = (1, 2, 1) if small else (BLOCKS, STEPS, WARM_UP)
    peaks = {}
    for name, step in steps.items():
        for _ in range(warm_up):
            step()
        peaks[name] = peak_mib(step)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name, step in steps.items():
            taken[name] += stamps(step, count)
    return {name: {**summary(seconds), "peak_mib": peaks[name]} for name, seconds in taken.items()}


def summary(seconds: list[float]) -> dict:
    """Median, and the distance of the quartiles as a share of it."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"seconds": middle, "spread": round((high - low) / middle, 3), "steps": len(seconds)}


def stamps(step: Step, count: int) -> list[float]:
    """Seconds of each of ``count`` steps in a row; the host does not wait between them."""
    if DEVICE == "cpu":
        times = [time.perf_counter()]
        for _ in range(count):
            step()
            times.append(time.perf_counter())
        return [after - before for before, after in zip(times, times[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:])]


def peak_mib(step: Step) -> int | None:
    """Peak growth of the device's memory in a step; None on a CPU."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def ratio(slow: float, fast: float) -> float:
    return round(slow / fast, 3)


def flops(step: Step) -> int:
    """Floating-point operations of a step by torch's count (multiply-add = 2)."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matmul_tflops(small: bool) -> float:
    """What the card gives: the best of some square bf16 matrix products of random numbers."""
    size = 256 if small else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    stamps(lambda: a @ b, 3)
    return 2 * size**3 / min(stamps(lambda: a @ b, 10)) / 1e12


def utilisation(operations: int, seconds: float, measured_tflops: float) -> dict:
    """Share of the card's peak that the operations of a step make: of the datasheet's, and of a large matrix product's."""
    tflops = operations / seconds / 1e12
    return {
        "tflop_a_step": round(operations / 1e12, 3),
        "tflops": round(tflops, 1),
        "of_datasheet": round(tflops / DATASHEET_TFLOPS, 4),
        "of_matrix_product": round(tflops / measured_tflops, 4),
    }


def kernels(step: Step, count: int = 10) -> list[dict]:
    """The most expensive kernels (operators on a CPU) of a step, with their share of all kernel time."""
    from torch.profiler import ProfilerActivity, profile

    cuda = DEVICE == "cuda"
    step()  # what is made once
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        step()
        if cuda:
            torch.cuda.synchronize()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    return [
        {
            "kernel": event.key[:120],
            "calls": event.count,
            "ms": round(getattr(event, field) / 1e3, 3),
            "share": round(getattr(event, field) / total, 4),
        }
        for event in events[:count]
    ]
