"""A data worker that cannot hand over a batch, or is killed, ends the training with one line instead of a wait."""

import os
import resource
import signal

import pytest

from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, run, wait_for_step
from tests.processes import start as start_process
from tests.training.test_resume import children_of
from vlp.data.workers import why_a_worker_ended

ENDED = "vlp: a data worker was killed, or could not hand over a batch, as happens when the memory or the shared memory is full"


def without_shared_memory(arguments: list[str]) -> int:
    """Limit the size of files, and so of shared memory, in the data workers."""
    from vlp.data import stream

    initialise = stream._init_worker

    def limited(worker: int) -> None:
        initialise(worker)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    stream._init_worker = limited
    return command_line(arguments)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_full_shared_memory_is_one_line(world, tmp_path, command):
    overrides = [*toy_overrides(world, tmp_path), "name=run", "train.steps=2"]
    if command == "train":
        done = run("train", TOY, *overrides, "data.workers=1", function=without_shared_memory)
    else:
        assert run("train", TOY, *overrides, "data.workers=1").codes == [0]
        arguments = ("eval", tmp_path / "run", "retrieval", "allow_contamination=true")
        done = run(*arguments, function=without_shared_memory)
    assert done.codes == [2], done.errors
    last = done.errors[0].splitlines()[-1]
    assert last.startswith(ENDED) and "lower data.workers" in last and "Traceback" not in done.errors[0]


def test_killed_worker_is_one_line(world, tmp_path):
    overrides = [*toy_overrides(world, tmp_path), "name=run", "train.steps=100000", "data.workers=1"]
    running = start_process("train", TOY, *overrides)
    wait_for_step(running, tmp_path / "run", 3)
    (worker,) = children_of(running.processes[0].pid)
    os.kill(worker, signal.SIGKILL)
    done = running.wait()
    assert done.codes == [2], done.errors
    assert done.errors[0].splitlines()[-1].startswith(ENDED)
    assert "Traceback" not in done.errors[0]


def test_other_errors_keep_their_traceback():
    assert why_a_worker_ended(RuntimeError("a programming error")) is None
    assert why_a_worker_ended(RuntimeError("DataLoader worker (pid 3) exited unexpectedly with exit code 1.")) is None
    assert "shared memory" in why_a_worker_ended(
        RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error.")
    )
