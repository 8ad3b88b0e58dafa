"""``train.profile``: a trace of a few steps, and a table of the time of each part of a step.

runs/NAME/profile/
  trace.json   for chrome://tracing or ui.perfetto.dev
  parts.txt    milliseconds of each part, without the parts inside it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from vlp.files import write_atomically
from vlp.forward import PART, mark_part
from vlp.models.base import Model

SKIPPED, WARM_UP, PROFILED = 3, 2, 5  # steps: the first ones compile and allocate
COMMUNICATION = ("c10d::", "record_param_comms", "gloo:", "nccl:")


@contextmanager
def profiled_steps(model: Model, folder: Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Profile steps if ``wanted``; yield a function to call after each step.

    Args:
        model: Its children are parts of their own.
        folder: Run folder, in which ``profile/`` is written.
    """
    if not wanted:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with ExitStack() as stack:
        for name, child in model.named_children():
            stack.enter_context(marked(child, name))
        plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=PROFILED, repeat=1)
        profiler = stack.enter_context(
            profile(activities=activities, schedule=plan, on_trace_ready=lambda done: write(done, folder / "profile"))
        )
        yield profiler.step


@contextmanager
def marked(module: nn.Module, name: str) -> Iterator[None]:
    """Mark every forward pass of a module as a part."""
    running: list[record_function] = []

    def begin(*_: object) -> None:
        running.append(mark_part(name))
        running[-1].__enter__()

    def end(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write(profiler: profile, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    write_atomically(folder / "parts.txt", table(profiler.events(), PROFILED).encode())


@dataclass
class Times:
    """Microseconds of a part over all profiled steps."""

    host: float = 0.0
    device: float = 0.0


def times_by_part(events: Sequence[Any]) -> dict[str, Times]:
    """Return the time of each part without the parts inside it.

    Device time is that of the kernels which a part launched. Autograd launches the backward pass of a device from a thread of
    its own, outside all parts.
    """
    found: dict[str, Times] = defaultdict(Times)
    for event in events:
        name = part_of(event)
        if name is not None and is_outermost(event, name):
            found[name].host += event.cpu_time_total
            if (around := enclosing(event.cpu_parent)) is not None:
                found[around].host -= event.cpu_time_total
        for kernel in event.kernels:
            found[enclosing(event) or "backward"].device += kernel.duration
    return dict(found)


def part_of(event: Any) -> str | None:
    """Return the part that an event begins, or None."""
    if event.name.startswith(PART):
        return event.name.removeprefix(PART)
    return "communication" if event.name.startswith(COMMUNICATION) else None


def enclosing(event: Any) -> str | None:
    """Return the innermost part that contains the event, which may be the event itself."""
    while event is not None:
        if (name := part_of(event)) is not None:
            return name
        event = event.cpu_parent
    return None


def is_outermost(event: Any, name: str) -> bool:
    """Return whether the event is not inside another one of the same part, whose time contains it."""
    return enclosing(event.cpu_parent) != name


def table(events: Sequence[Any], steps: int) -> str:
    """Return the lines of ``parts.txt``, the slowest part first."""
    parts = times_by_part(events)
    on_device = any(times.device for times in parts.values())
    total = sum(times.device if on_device else times.host for times in parts.values()) or 1.0
    lines = [f"{'part':<24}{'host ms':>10}" + (f"{'device ms':>12}" if on_device else "") + f"{'share':>8}"]
    for name, times in sorted(parts.items(), key=lambda item: -(item[1].device if on_device else item[1].host)):
        device = f"{times.device / steps / 1000:>12.2f}" if on_device else ""
        share = (times.device if on_device else times.host) / total
        lines.append(f"{name:<24}{times.host / steps / 1000:>10.2f}{device}{share:>8.1%}")
    return "\n".join([*lines, f"means of {steps} steps", ""])
