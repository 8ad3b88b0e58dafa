"""Checkpoints that are completed in the background: training goes on, and kills and errors leave complete checkpoints only."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, kill_at_call, losses, resume, run, start, tensors, train, wait_for_step
from vlp.errors import UserError
from vlp.training import checkpoint
from vlp.training.saver import Saver
from vlp.weights import checkpoints


def in_background() -> bool:
    return threading.current_thread() is not threading.main_thread()


@pytest.fixture
def blocked(monkeypatch):
    """Return an event that the background waits for before it completes a checkpoint."""
    go_on, complete = threading.Event(), checkpoint.complete

    def waiting(*args):
        assert go_on.wait(30)
        return complete(*args)

    monkeypatch.setattr(checkpoint, "complete", waiting)
    yield go_on
    go_on.set()


def test_tensors_may_change_while_the_checkpoint_is_completed(tmp_path, blocked):
    saver, weight = Saver(tmp_path, keep=2), torch.zeros(100)
    saver.save(1, {"model": {"w": weight}}, {"step": 1})
    weight += 1
    saver.check()  # neither waits nor fails
    assert checkpoints.all_steps(tmp_path) == []
    blocked.set()
    saver.wait()
    saver.close()
    newest = checkpoints.newest_whole(tmp_path)
    assert newest == tmp_path / "step-00000001"
    assert torch.equal(checkpoints.read(newest, "model")["w"], torch.zeros(100))


def test_background_prunes_after_the_checkpoint_is_complete(tmp_path):
    saver = Saver(tmp_path, keep=2)
    for step in range(1, 5):
        saver.wait()
        saver.save(step, {"model": {"w": torch.zeros(3)}}, {"step": step})
    saver.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    "error, advice",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "check that the folder can be written"),
        (OSError(errno.EIO, "Input/output error"), "check that the folder can be written"),
    ],
)
def test_error_of_the_background_is_raised_by_check_and_wait(tmp_path, monkeypatch, error, advice):
    saver, files = Saver(tmp_path, keep=1), {"model": {"w": torch.zeros(3)}}
    saver.save(1, files, {"step": 1})
    saver.wait()

    def fsync(path):
        raise error

    monkeypatch.setattr(checkpoint, "_sync", fsync)
    saver.save(2, files, {"step": 2})
    saver.close()
    for ask in (saver.check, saver.wait):
        with pytest.raises(UserError, match=f"cannot save .*step-00000002.*{advice}"):
            ask()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.damage(tmp_path / "step-00000001") is None


def test_complete_checkpoint_takes_the_place_of_a_damaged_one_of_its_step(tmp_path):
    for number in (1.0, 2.0):
        saved = checkpoint.save(tmp_path, 3, {"model": {"w": torch.full((3,), number)}}, {"step": 3})
    assert checkpoints.read(saved, "model")["w"].tolist() == [2.0] * 3
    assert [p.name for p in tmp_path.iterdir()] == [saved.name]


KILL_AT = "VLP_TEST_KILL_AT"


def dies_in_the_background(arguments: list[str]) -> int:
    """Run `command_line`, but kill the process at the given one of the background's calls that change files."""
    kill_at_call(int(os.environ[KILL_AT]), (checkpoint, "file_hash"), counts=in_background)
    return command_line(arguments)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    train(*toy_overrides(world, output), "name=whole", "save.keep=1")
    return output / "whole"


# 3 hashes, 5 syncs, the rename and a sync of the first checkpoint; the same of the second one, then the first is pruned
@pytest.mark.parametrize("at", [1, 4, 8, 9, 10, 11, 19, 21, 23, 26])
def test_run_killed_in_the_background_keeps_complete_checkpoints_and_resumes_bitwise(world, whole, tmp_path, at):
    arguments = ("train", TOY, *toy_overrides(world, tmp_path), "name=killed", "save.keep=1")
    done = run(*arguments, function=dies_in_the_background, environment={KILL_AT: str(at)})
    assert done.codes == [-signal.SIGKILL]
    folder = tmp_path / "killed"
    found = checkpoints.all_steps(folder / "checkpoints")
    assert [checkpoints.damage(path) for path in found] == [None] * len(found)
    assert bool(found) == (at > 9)
    resume(folder)
    assert losses(folder) == losses(whole)
    for name in ("model", "optimizer"):
        expected, own = tensors(whole, name), tensors(folder, name)
        assert all(torch.equal(own[key], tensor) for key, tensor in expected.items())


def disk_fails_in_the_background(arguments: list[str]) -> int:
    """Run `command_line` with a disk that is found to be full when the second checkpoint is synced."""
    sync, calls = checkpoint._sync, []

    def failing(path):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    checkpoint._sync = failing
    return command_line(arguments)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("every", ["save.every=3", "save.every=6"])
def test_full_disk_in_the_background_ends_the_run_with_one_line(world, whole, tmp_path, processes, every):
    """With ``save.every=6`` the failing checkpoint is the last one, which the end of the run waits for."""
    arguments = ("train", TOY, *toy_overrides(world, tmp_path), "name=full", every)
    done = run(*arguments, function=disk_fails_in_the_background, world=processes)
    assert done.codes[0] == 2 and not any(code == 0 for code in done.codes)
    assert "Traceback" not in done.errors[0]
    messages = [line for line in done.errors[0].splitlines() if line.startswith("vlp: ")]
    assert len(messages) == 1 and messages[0].startswith("vlp: cannot save ") and "free some space" in messages[0]
    names = [p.name for p in (tmp_path / "full" / "checkpoints").iterdir()]
    assert names == [f"step-{int(every[-1]):08d}"]
    if processes == 1:
        resume(tmp_path / "full")
        assert losses(tmp_path / "full") == losses(whole)


def completes_slowly(arguments: list[str]) -> int:
    complete = checkpoint.complete

    def slow(*args):
        time.sleep(1.5)
        return complete(*args)

    checkpoint.complete = slow
    return command_line(arguments)


def test_run_stopped_by_a_signal_ends_after_its_checkpoint_is_complete(world, whole, tmp_path):
    folder = tmp_path / "stopped"
    arguments = ("train", TOY, *toy_overrides(world, tmp_path), "name=stopped", "save.keep=1")
    running = start(*arguments, function=completes_slowly)
    wait_for_step(running, folder, 5)  # the checkpoint of step 3 is in the background
    assert not checkpoints.all_steps(folder / "checkpoints")
    running.signal(signal.SIGTERM)
    assert running.wait().codes == [0]
    stopped = len(losses(folder))
    assert checkpoints.newest_whole(folder / "checkpoints") == folder / "checkpoints" / f"step-{stopped:08d}"
    resume(folder)
    assert losses(folder) == losses(whole)


def test_evaluation_waits_for_its_checkpoint_on_all_processes(world, tmp_path):
    """It reads the manifest, on every process."""
    arguments = (*toy_overrides(world, tmp_path), "name=both", "train.steps=6", "evaluate_every=3")
    done = run("train", TOY, *arguments, function=completes_slowly, world=2)
    assert done.codes == [0, 0], done.errors
    assert (tmp_path / "both" / "eval.jsonl").read_text().count("\n") == 2
