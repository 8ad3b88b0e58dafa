"""A process that is stopped, killed or stuck ends all processes of a run with one message that names it."""

import os
import signal
import time

import pytest

from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, start, wait_for_step

SETTINGS = ("train.steps=500", "train.stall_timeout=4", "evaluate_every=0")


def loads_for_ever(arguments: list[str]) -> int:
    """Run `command_line`; the second process waits for its third batch, as for a file system that is gone."""
    from vlp.train import Trainer

    prepare, calls = Trainer.micro_batches, []

    def micro_batches(trainer):
        for loaded in prepare(trainer):
            calls.append(1)
            if len(calls) == 3 and trainer.accelerator.process_index == 1:
                time.sleep(1000)
            yield loaded

    Trainer.micro_batches = micro_batches
    return command_line(arguments)


def messages(errors: list[str]) -> list[str]:
    return [line for error in errors for line in error.splitlines() if line.startswith("vlp: ")]


@pytest.mark.parametrize("number", [0, 1])
def test_stopped_process_is_named_and_ends_the_run(world, tmp_path, number):
    running = start("train", TOY, *toy_overrides(world, tmp_path), *SETTINGS, "name=stopped", world=2)
    wait_for_step(running, tmp_path / "stopped", 3)
    began = time.monotonic()
    os.kill(running.processes[number].pid, signal.SIGSTOP)
    done = running.wait(60)
    assert time.monotonic() - began < 30
    (message,) = messages(done.errors)
    assert f"no progress for 4 s: process {number} (" in message and "does not answer" in message
    assert done.codes[1 - number] == 1


def test_process_that_waits_for_its_data_is_named(world, tmp_path):
    arguments = ("train", TOY, *toy_overrides(world, tmp_path), *SETTINGS, "name=stuck")
    done = start(*arguments, world=2, function=loads_for_ever).wait(60)
    (message,) = messages(done.errors)
    assert "no progress for 4 s: process 1 (" in message and "has not loaded its batch" in message
    assert 1 in done.codes and 0 not in done.codes
