"""Where the host waits for the device in a training step of `vlp train`: between the start of a micro-batch and the end of its
backward pass no wait is wanted, as it leaves the device idle.

On a GPU torch tells each wait (`torch.cuda.set_sync_debug_mode`); on a CPU the operators are counted that would wait on a GPU,
as far as they can be told: see `tests.syncs`.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.albef_step import OBJECTIVES
from benchmarks.gpu.timing import DEVICE
from benchmarks.models import TINY_CLIP, clip
from tests.conftest import make_world, toy_overrides
from tests.fixtures import toy, toy_stages, toy_vlmo_stages
from tests.syncs import place, watching
from vlp.config import Experiment, Training
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.ema import MomentumConfig
from vlp.specs.overrides import override
from vlp.train import Trainer
from vlp.training.interrupts import TrainingInterrupt
from vlp.training.run_lock import RunLock
from vlp.training.setup import set_up

WARM_UP = 2


def checks(small: bool) -> dict[str, Callable[[], dict]]:
    return {name: partial(watched, experiment) for name, experiment in experiments().items()}


def experiments() -> dict[str, Experiment]:
    """The toys of the tests: how often the host waits does not depend on sizes."""
    plain = toy.config()
    clip_step = replace(
        plain,
        model=clip(TINY_CLIP),
        objectives={"itc": ImageTextContrast()},
        data=replace(plain.data, max_length=20),
    )
    albef_step = replace(toy_stages.config().stages["2-words"], objectives=OBJECTIVES, momentum=MomentumConfig(0.995))
    vlmo_step = toy_vlmo_stages.config().stages["3-pairs"]
    return {"CLIP": clip_step, "ALBEF": albef_step, "VLMo": vlmo_step}


@cache
def world() -> Path:
    return make_world(Path(tempfile.mkdtemp(prefix="vlp-syncs-")))


def watched(experiment: Experiment) -> dict:
    """The waits of one step, by phase and by line of vlp."""
    output = Path(tempfile.mkdtemp(prefix="vlp-syncs-"))
    train = Training(steps=WARM_UP + 2, precision="bf16", threads=1)
    experiment = override(replace(experiment, train=train), [*toy_overrides(world(), output), "evaluate_every=0"])
    run = set_up(experiment, False, RunLock(experiment.folder))
    trainer, interrupted = Trainer(run), TrainingInterrupt()
    with closing(trainer.micro_batches()) as micro_batches:
        for _ in range(WARM_UP):
            trainer.step(micro_batches, interrupted)
        with waits_of(trainer) as waits:
            trainer.step(micro_batches, interrupted)
    run.close(together=True)
    return {
        "in_micro_batch": sum(n for (phase, _), n in waits.items() if phase == "micro-batch"),
        "after": sum(n for (phase, _), n in waits.items() if phase == "after"),
        "places": [{"phase": phase, "place": place, "times": n} for (phase, place), n in waits.most_common(40)],
    }


@contextmanager
def waits_of(trainer: Trainer) -> Iterator[Counter]:
    """(phase, line) -> waits of a step."""
    waits: Counter = Counter()
    phase = "before"

    def note() -> None:
        waits[phase, place()] += 1

    def begin(inner: Callable) -> Callable:
        def prepare(*given):
            nonlocal phase
            phase = "micro-batch"
            return inner(*given)

        return prepare

    def end(inner: Callable) -> Callable:
        def backward(*given, **named):
            nonlocal phase
            inner(*given, **named)
            phase = "after"

        return backward

    accelerator = trainer.accelerator
    with (
        patch.object(trainer, "prepare", begin(trainer.prepare)),
        patch.object(accelerator, "backward", end(accelerator.backward)),
        told_by_torch(note) if DEVICE == "cuda" else watching(note),
    ):
        yield waits


@contextmanager
def told_by_torch(note: Callable[[], None]) -> Iterator[None]:
    def show(message, *_, **__) -> None:
        if "synchronizing CUDA operation" in str(message):
            note()
        else:
            print(message, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
