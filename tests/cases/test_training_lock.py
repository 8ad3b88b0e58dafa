"""One training at a time in a run folder: a second one is refused and changes nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cases.inputs import refused
from tests.conftest import ROOT, TOY, environment, toy_overrides
from tests.processes import losses, resume, start, wait_for_step
from vlp.errors import UserError
from vlp.training.run_lock import RunLock

LONG = ("train.steps=100000", "save.every=100000")
HOLD = """
import sys, time
from pathlib import Path
from vlp.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.acquire()
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path / "run"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_lock_is_held_by_one_process_and_released_when_it_is_killed(tmp_path, holder):
    before = sorted((tmp_path / "run").iterdir())
    with RunLock(tmp_path / "run") as lock:
        with pytest.raises(UserError, match=f"run is being trained by process {holder.pid} on .*; stop it first"):
            lock.acquire()
        assert sorted((tmp_path / "run").iterdir()) == before
        holder.kill()
        holder.wait()
        lock.acquire()
        assert f"process {os.getpid()} on " in (tmp_path / "run" / "train.lock").read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_lock_whose_file_was_removed_while_it_was_taken_is_taken_again(tmp_path, monkeypatch):
    """The last holder removes the file between the opening and the locking of the next one."""
    import fcntl

    locked = []

    def remove_first(*arguments):
        if not locked:
            (tmp_path / "train.lock").unlink()
        locked.append(arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert len(locked) == 2 and os.path.samestat(os.fstat(lock.descriptor), os.stat(tmp_path / "train.lock"))


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    import errno
    import fcntl

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with RunLock(tmp_path) as lock, pytest.warns(UserWarning, match="file system without locks"):
        lock.acquire()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_second_training_in_a_folder_is_refused(world, tmp_path, capfd, world_size):
    """Also by --resume, before and after the first checkpoint, whatever the number of processes."""
    overrides = [*toy_overrides(world, tmp_path), "data.workers=1", "name=run"]
    running = start("train", TOY, *overrides, *LONG, world=world_size)
    folder = tmp_path / "run"
    try:
        wait_for_step(running, folder, 2)
        before = {p: p.stat().st_size for p in folder.rglob("*") if p.name not in ("log.jsonl", "samples.0.jsonl")}
        assert f"{folder} is being trained by process" in refused(capfd, "train", "--resume", folder)
        assert f"{folder} already holds a run" in refused(capfd, "train", TOY, *overrides)
        assert before.keys() <= set(folder.rglob("*"))
    finally:
        running.signal(signal.SIGINT)
        done = running.wait()
    assert done.codes == [0] * world_size, done.errors
    step = len(losses(folder))  # one line a step
    assert not (folder / "train.lock").exists()
    again = start("train", "--resume", folder, world=world_size)
    wait_for_step(again, folder, step + 2)
    again.signal(signal.SIGINT)
    assert again.wait().codes == [0] * world_size
    assert len(losses(folder)) >= step + 2 and not (folder / "train.lock").exists()


def test_of_two_that_start_at_once_one_trains(world, tmp_path):
    """Both have found an empty folder."""
    overrides = [*toy_overrides(world, tmp_path), "data.workers=0", "name=run", "train.steps=20"]
    both = [start("train", TOY, *overrides) for _ in range(2)]
    done = [running.wait() for running in both]
    assert sorted(code for each in done for code in each.codes) == [0, 2]
    (loser,) = [each for each in done if each.codes == [2]]
    (line,) = loser.errors[0].splitlines()
    assert "is being trained by process" in line or "already holds a run" in line
    assert (
        len(losses(tmp_path / "run")) == 20 and len((tmp_path / "run" / "starts.jsonl").read_text().splitlines()) == 1
    )


def test_run_whose_processes_were_killed_is_resumed_at_once(world, tmp_path):
    """Data workers may outlive a killed training for a moment. They do not hold its lock."""
    running = start(
        "train", TOY, *toy_overrides(world, tmp_path), "data.workers=2", "name=run", *LONG[1:], "train.steps=40"
    )
    wait_for_step(running, tmp_path / "run", 3)
    running.kill()
    assert (tmp_path / "run" / "train.lock").exists()
    began = time.monotonic()
    resume(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 40 and time.monotonic() - began < 100
