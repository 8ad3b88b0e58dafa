"""A process that is stopped, killed or stuck ends all processes of a run with one message that names it."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import TOY, toy_overrides
from tests.processes import Done, Running, command_line, losses, start, wait_for_step

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


def stop_one_and_ask(world: Path, output: Path, stopped: int, number: int, *more: str) -> tuple[Running, float]:
    """Suspend one of two processes of a run, wait until the other waits for it, and send that one a signal.

    Returns:
        The processes, and the time of the signal.
    """
    running = start("train", TOY, *toy_overrides(world, output), *SETTINGS, *more, "name=asked", world=2)
    wait_for_step(running, output / "asked", 3)
    os.kill(running.processes[stopped].pid, signal.SIGSTOP)
    time.sleep(1)  # the other one is in a collective by now
    os.kill(running.processes[1 - stopped].pid, number)
    return running, time.monotonic()


def assert_one_line(done: Done, waiting: int, expected: str) -> None:
    assert done.codes[waiting] == 130, done
    assert "Traceback" not in "".join(done.errors)
    (message,) = messages(done.errors)
    assert expected in message


@pytest.mark.parametrize(
    "stopped, number",
    [
        (1, signal.SIGTERM),
        pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signal_to_a_process_that_waits_for_a_stopped_one_ends_the_run_in_one_line(world, tmp_path, stopped, number):
    """Long before the limit of a stall, which is an hour here."""
    running, asked = stop_one_and_ask(world, tmp_path, stopped, number, "train.stall_timeout=3600")
    running.processes[1 - stopped].join(60)
    assert time.monotonic() - asked < 25  # a launcher kills after 30
    done = running.wait()
    assert_one_line(done, 1 - stopped, f"stopped without a save: process {stopped} (")


def test_second_signal_ends_a_process_that_waits_for_a_stopped_one_at_once(world, tmp_path):
    running, asked = stop_one_and_ask(world, tmp_path, 1, signal.SIGTERM, "train.stall_timeout=none")
    time.sleep(3)
    assert running.processes[0].is_alive()
    os.kill(running.processes[0].pid, signal.SIGTERM)
    running.processes[0].join(60)
    assert time.monotonic() - asked < 6
    done = running.wait()
    assert_one_line(done, 0, "asked twice to stop, so stopped without a save")


def test_run_that_was_suspended_for_longer_than_the_limit_continues(world, tmp_path):
    """As on a laptop that sleeps, or with `scontrol suspend`. The processes stop and continue at different moments."""
    arguments = (*toy_overrides(world, tmp_path), *SETTINGS[1:], "train.steps=60", "name=suspended")
    running = start("train", TOY, *arguments, world=2)
    wait_for_step(running, tmp_path / "suspended", 3)
    first, second = (process.pid for process in running.processes)
    for pid, number, seconds in (
        (second, signal.SIGSTOP, 0.7),  # in which the first process reads the last news of it
        (first, signal.SIGSTOP, 6),
        (first, signal.SIGCONT, 0.7),
        (second, signal.SIGCONT, 0),
    ):
        os.kill(pid, number)
        time.sleep(seconds)
    done = running.wait()
    assert done.codes == [0, 0], done.errors
    assert len(losses(tmp_path / "suspended")) == 60
