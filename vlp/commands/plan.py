"""``vlp plan``: memory, operations, communication and time of an experiment on given devices, before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vlp.commands.code import add_code_options
from vlp.errors import UserError
from vlp.planning import budget

if TYPE_CHECKING:
    from vlp.config import Experiment
    from vlp.planning.trace import Trace

DAY = 86_400  # seconds


def add_parser(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, operations, communication and days of an experiment on given devices",
        epilog="example: vlp plan configs/align/pretrain.py --devices 64 --engine fsdp2",
    )
    plan.add_argument("config", help="a Python config, FILE.py:NAME for another function of it, or an experiment.json")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="before the options, e.g. data.batch_size=256")
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="processes, one a device (default: 1)")
    plan.add_argument("--device", default="h100", help=f"{', '.join(budget.DEVICES)} (default: %(default)s)")
    plan.add_argument("--engine", default="ddp", help=f"{', '.join(budget.ENGINES)} (default: %(default)s)")
    plan.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the device's published figure (default: %(default)s)"
    )
    plan.add_argument("--tokens", type=int, metavar="L", help="length of every text (default: data.max_length)")
    plan.add_argument(
        "--samples", type=int, metavar="N", help="samples of an epoch, for schedules in epochs and memory banks"
    )
    add_code_options(plan)
    plan.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlp.commands.train import load
    from vlp.config import Experiment
    from vlp.specs.overrides import override
    from vlp.training.validation import validate

    check_options(options)
    spec, _ = load(options, options.config, Experiment)
    experiment = override(spec, options.overrides)
    validate(experiment)
    per_step = options.devices * experiment.train.accumulation
    if experiment.data.batch_size % per_step:
        raise UserError(
            f"data.batch_size={experiment.data.batch_size} cannot be split over {options.devices} devices and "
            f"{experiment.train.accumulation} micro-batches; make it a multiple of {per_step}"
        )
    experiment = replace(experiment, model=experiment.model.resolved())
    print("\n".join(describe(experiment, options)))
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError for an option out of range."""
    if options.device not in budget.DEVICES:
        raise UserError(f"--device {options.device} is not known; give one of {', '.join(budget.DEVICES)}")
    if options.engine not in budget.ENGINES:
        raise UserError(f"--engine {options.engine} is not known; give one of {', '.join(budget.ENGINES)}")
    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation {options.utilisation} is not a share; give a number above 0 and at most 1")
    for name in ("devices", "tokens", "samples"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} is too small; give at least 1")


def describe(experiment: Experiment, options: argparse.Namespace) -> list[str]:
    """Return the lines of the plan."""
    device, train = budget.DEVICES[options.device], experiment.train
    trace = trace_with(experiment, options)
    memory = budget.memory(trace, options.engine, options.devices)
    usable = device.memory * (1 - budget.RESERVED)
    exchanged = budget.communication(trace, options.engine, options.devices, train.backward_passes)
    seconds = budget.seconds_of_step(trace, device, train.precision, options.utilisation)
    rows = experiment.micro_batch_size // options.devices
    lines = [
        f"{experiment.name}: {options.devices} x {options.device}, {options.engine}, {train.precision}; "
        f"{experiment.data.batch_size:,} samples a step, {rows:,} in a micro-batch of a device",
        "",
        *table("parameters", trace.parameters, 1e6, "M"),
        *table("memory of a device", memory, budget.GIB, "GiB"),
        f"  {'usable':<28}{usable / budget.GIB:>10,.2f} GiB",
        "",
        *table("operations of a step and device", trace.operations, 1e12, "TFLOP"),
        *(table("received by a device in a step", exchanged, 1e6, "MB") if exchanged else []),
        f"at {options.utilisation:.0%} of the published figure, without waiting for data or communication:",
        f"  {seconds:.3g} s a step, {experiment.data.batch_size / seconds:,.0f} samples/s, {duration(experiment, options, seconds)}",
    ]
    if sum(memory.values()) > usable:
        lines += ["", "It does not fit. Memory of a device with one setting changed:", *remedies(experiment, options)]
    return lines


def trace_with(experiment: Experiment, options: argparse.Namespace) -> Trace:
    from vlp.planning.trace import trace_step

    return trace_step(experiment, options.devices, options.tokens, options.samples or 1_000_000)


def table(title: str, parts: Mapping[str, float], unit: float, name: str) -> list[str]:
    rows = [*parts.items(), ("total", sum(parts.values()))]
    return [title, *(f"  {part:<28}{size / unit:>10,.2f} {name}" for part, size in rows), ""]


def duration(experiment: Experiment, options: argparse.Namespace, seconds: float) -> str:
    """Return the length of the schedule, as far as it is known."""
    steps, epochs = experiment.train.steps, experiment.train.epochs
    if steps is None and options.samples is None:
        return f"{epochs:g} epochs: give --samples N for the days"
    steps = steps or -(-int(epochs * options.samples) // experiment.data.batch_size)
    return f"{steps:,} steps in {steps * seconds / DAY:,.2f} days"


def remedies(experiment: Experiment, options: argparse.Namespace) -> list[str]:
    """Return a line for each setting that lowers the memory, with the memory that it leads to."""
    lines = []
    for setting, changed, engine in alternatives(experiment, options):
        try:
            trace = trace_with(changed, options)
        except UserError:  # the model or an objective refuses it
            continue
        size = sum(budget.memory(trace, engine, options.devices).values())
        lines.append(f"  {setting:<44}{size / budget.GIB:>10,.2f} GiB")
    return lines


def alternatives(experiment: Experiment, options: argparse.Namespace) -> Iterator[tuple[str, Experiment, str]]:
    """Yield (setting, changed experiment, engine) that need less memory."""
    train = experiment.train
    for kind in ("cheap", "full"):
        changed = replace(train, activation_checkpointing=kind)
        yield f"train.activation_checkpointing={kind}", replace(experiment, train=changed), options.engine
    if experiment.micro_batch_size // options.devices % 2 == 0:
        setting, halved = (
            f"train.accumulation={2 * train.accumulation}",
            replace(train, accumulation=2 * train.accumulation),
        )
        yield setting + " (fewer negatives)", replace(experiment, train=halved), options.engine
        cached = replace(halved, grad_cache=True)
        yield setting + " train.grad_cache=true", replace(experiment, train=cached), options.engine
    for engine in ("zero2", "fsdp2") if options.devices > 1 else ():
        yield f"--engine {engine}", experiment, engine
