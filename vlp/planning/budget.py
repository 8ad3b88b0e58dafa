"""Memory of a device, communication and time of a run, from the trace of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads the tables of this module, and the trace imports torch
    from vlp.planning.trace import Trace

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """Published figures of an accelerator.

    Args:
        memory: Bytes.
        bf16: Dense matrix products in bfloat16, operations per second.
        fp32: The same in float32 without TF32, which vlp does not switch on.
    """

    memory: float
    bf16: float
    fp32: float


# data sheets of NVIDIA, dense
DEVICES = {
    "h200": Device(141e9, 989e12, 67e12),
    "h100": Device(80e9, 989e12, 67e12),
    "a100": Device(80e9, 312e12, 19.5e12),
    "a100-40": Device(40e9, 312e12, 19.5e12),
    "l40s": Device(48e9, 362e12, 91.6e12),
    "rtx4090": Device(24e9, 165e12, 82.6e12),
}
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RESERVED = 0.08  # share of a device's memory for the context, communication buffers and fragmentation


def memory(trace: Trace, engine: str, devices: int) -> dict[str, float]:
    """Return the bytes that a device holds at the fullest moment of a step, by part.

    ZeRO-1 shards the optimizer state, ZeRO-2 the gradients too, ZeRO-3 and FSDP2 also the weights and their averages.
    """
    cut_state = devices if engine != "ddp" else 1
    cut_gradients = devices if engine in ("zero2", "zero3", "fsdp2") else 1
    cut_weights = devices if engine in ("zero3", "fsdp2") else 1
    if cut_gradients == 1:
        step = {"gradients and activations": trace.peak}
    else:
        step = {"gradients": trace.gradients / cut_gradients, "activations": trace.activations}
    parts = {
        "weights": trace.weights / cut_weights,
        **step,
        "optimizer state": trace.moments / cut_state,
        "momentum encoder": trace.momentum / cut_weights,
        "averaged weights": trace.average / cut_weights,
        "queues": trace.queues,
    }
    if engine == "ddp" and devices > 1:
        parts["gradient buckets"] = trace.gradients
    return {name: size for name, size in parts.items() if size}


def communication(trace: Trace, engine: str, devices: int, passes: int) -> dict[str, float]:
    """Return the bytes that a device receives in a step, by collective.

    A ring all-reduce delivers twice the tensor less one share, an all-gather or reduce-scatter once.

    Args:
        passes: Backward passes of a step.
    """
    if devices == 1:
        return {}
    share = (devices - 1) / devices
    weights, gradients = trace.weights * share, trace.gradients * share
    if engine == "ddp":
        engine_bytes = {"gradients, all-reduce": 2 * gradients}
    elif engine in ("zero1", "zero2"):
        each = gradients * (passes if engine == "zero2" else 1)
        engine_bytes = {"gradients, reduce-scatter": each, "weights, all-gather": weights}
    else:
        engine_bytes = {"gradients, reduce-scatter": gradients * passes, "weights, all-gather": 2 * weights * passes}
    objectives = {f"objectives, {kind}": size * share for kind, size in trace.exchanged.items()}
    return {name: size for name, size in (engine_bytes | objectives).items() if size}


def seconds_of_step(trace: Trace, device: Device, precision: str, utilisation: float) -> float:
    """Return the time of a step if the matrix products reach a share ``utilisation`` of the device's figure."""
    peak = device.bf16 if precision == "bf16" else device.fp32
    return sum(trace.operations.values()) / (peak * utilisation)
