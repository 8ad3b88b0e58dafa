"""A run that is killed at twenty drawn moments, and resumed each time, equals a run without interruption, bit by bit.

The moments are spread over four engines and five phases of a run: start, step, save, completion of a save in the background,
and evaluation. A moment is drawn from the time that a phase takes in the run without interruption, in one of its processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, toy_overrides
from tests.processes import command_line, losses, samples, start, tensors
from vlp.weights.checkpoints import all_steps

CONFIG = f"{ROOT}/tests/fixtures/toy_albef.py:towers"
STEPS = 14
SETTINGS = (f"train.steps={STEPS}", "save.every=2", "evaluate_every=4", "save.keep=1")
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
# Each phase with the number of its first entries of which one is killed. They are so few that no run ends before its last
# kill, however many steps it has taken since its last checkpoint.
ENTRIES = {"start": 2, "step": 4, "save": 2, "completion": 2, "evaluation": 1}
SEED = 0


def phases() -> list[tuple[object, str, str]]:
    """Return the functions of each phase: where they are, their name, and the phase."""
    import vlp.train
    from vlp.training import checkpoint
    from vlp.training.run import Run

    return [
        (vlp.train, "set_up", "start"),
        (vlp.train.Trainer, "__init__", "start"),
        (vlp.train.Trainer, "step", "step"),
        (Run, "save", "save"),
        (checkpoint, "complete", "completion"),
        (checkpoint, "prune", "completion"),
        (Run, "evaluate", "evaluation"),
    ]


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Observed:
    """`command_line` that measures the seconds of every entry of a phase.

    Args:
        seconds: File for the measures of this process; its rank is added to the name. None writes none.
        kill: Rank of the process to be killed, phase, entry, and seconds after its begin. An entry that is shorter is killed
            at its end. None kills none.
    """

    def __init__(self, seconds: Path | None = None, kill: tuple[int, str, int, float] | None = None):
        self.seconds, self.kill = seconds, kill

    def __call__(self, arguments: list[str]) -> int:
        rank = int(os.environ["RANK"])
        measured: dict[str, list[float]] = {phase: [] for phase in ENTRIES}
        for place, name, phase in phases():
            own = self.kill[2:] if self.kill and self.kill[:2] == (rank, phase) else None
            setattr(place, name, self._observed(getattr(place, name), measured[phase], own))
        code = command_line(arguments)
        if self.seconds:
            Path(f"{self.seconds}.{rank}").write_text(json.dumps(measured))
        return code

    def _observed(self, function: Callable, measured: list[float], kill: tuple[int, float] | None) -> Callable:
        def observed(*args, **kwargs):
            is_killed = kill is not None and len(measured) == kill[0]
            if is_killed:
                threading.Timer(kill[1], kill_this_process).start()
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                if is_killed:
                    kill_this_process()
                measured.append(time.monotonic() - began)

        return observed


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def draw_kills(engine: str, measured: list[dict[str, list[float]]]) -> list[tuple[int, str, int, float]]:
    """Draw a kill in each phase, in random order, from the seconds of the phases in both processes."""
    rng = random.Random(f"{SEED} {engine}")
    kills = []
    for phase in rng.sample(list(ENTRIES), len(ENTRIES)):
        rank = rng.randrange(2) if measured[1][phase] else 0
        entry = rng.randrange(ENTRIES[phase])
        kills.append((rank, phase, entry, rng.uniform(0, measured[rank][phase][entry])))
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_run_killed_in_every_phase_ends_with_the_same_bits(world, output, engine):
    whole, folder = output / f"whole-{engine}", output / f"killed-{engine}"

    def begin(name: str) -> tuple:
        return ("train", CONFIG, *toy_overrides(world, output), *SETTINGS, f"name={name}")

    done = start(*begin(whole.name), function=Observed(output / engine), world=2, engine=engine).wait(400)
    assert done.codes == [0, 0], done.errors
    for kill in draw_kills(engine, [json.loads(Path(f"{output / engine}.{rank}").read_text()) for rank in range(2)]):
        # a run that was killed before it had an experiment.json is started again
        command = ("train", "--resume", folder) if (folder / "experiment.json").exists() else begin(folder.name)
        running = start(*command, function=Observed(kill=kill), world=2, engine=engine)
        while all(process.is_alive() for process in running.processes):
            time.sleep(0.02)
        running.kill()  # as a launcher does when one has ended
        assert running.processes[kill[0]].exitcode == -signal.SIGKILL, (kill, running.wait().errors)
    done = start("train", "--resume", folder, world=2, engine=engine).wait(400)
    assert done.codes == [0, 0], done.errors
    assert losses(folder) == losses(whole) and samples(folder) == samples(whole)
    assert (folder / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    assert (folder / "checkpoints/best.json").read_text() == (whole / "checkpoints/best.json").read_text()
    assert [path.name for path in all_steps(folder / "checkpoints")] == [
        path.name for path in all_steps(whole / "checkpoints")
    ]
    assert all_steps(folder / "checkpoints")[0].name == f"step-{STEPS:08d}"
    for name in ("model", "optimizer", "average", "momentum", "memory"):
        expected, found = tensors(whole, name), tensors(folder, name)
        assert found.keys() == expected.keys()
        assert [k for k in expected if not torch.equal(expected[k], found[k])] == [], name
