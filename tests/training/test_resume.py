"""A run that was stopped in any way and resumed equals a run without interruption, bit by bit."""

import os
import random
import shutil
import signal
import time
from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.conftest import TOY, toy_overrides
from tests.processes import (
    command_line,
    losses,
    records,
    resume,
    run,
    samples,
    start,
    tensors,
    train,
    wait_for_step,
)
from vlp.weights.checkpoints import all_steps

STEPS = 24
# the toy has dropout; this adds an average
FULL = ("train.ema_decay=0.9", f"train.steps={STEPS}")
SAME_FOR_ANY_WORLD = ("model.text.dropout=0.0", f"train.steps={STEPS}")


def dies_in_the_third_save(arguments: list[str]) -> int:
    """Run `command_line`, but kill the process while it writes its third checkpoint."""
    from vlp.training import checkpoint

    calls, original = [], checkpoint.save_file

    def save_file(*args):
        calls.append(args)
        original(*args)
        if len(calls) == 8:  # three files per checkpoint
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_file
    return command_line(arguments)


def dies_before_evaluating(arguments: list[str]) -> int:
    from vlp.training.run import Run

    Run.evaluate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return command_line(arguments)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=[1, 2])
def world_size(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def whole(world, output, world_size) -> Path:
    """A run without interruption."""
    train(*toy_overrides(world, output), *FULL, f"name=whole-{world_size}", world=world_size)
    return output / f"whole-{world_size}"


def assert_same(folder: Path, whole: Path) -> None:
    """Compare losses, gradient norms, weights, averages and optimizer state bit by bit, and the samples of every batch."""
    assert losses(folder) == losses(whole)
    assert [r["gradient_norm"] for r in records(folder)] == [r["gradient_norm"] for r in records(whole)]
    assert samples(folder) == samples(whole)
    assert all_steps(folder / "checkpoints")[0].name == f"step-{STEPS:08d}"
    for name in ("model", "average", "optimizer"):
        expected, found = tensors(whole, name), tensors(folder, name)
        assert expected.keys() == found.keys()
        assert [k for k in expected if not torch.equal(expected[k], found[k])] == []


def test_every_sample_occurs_once_in_every_epoch(whole):
    stream = list(chain.from_iterable(samples(whole)))
    assert len(stream) == STEPS * 8
    for epoch in range(len(stream) // 50):
        assert len(set(stream[epoch * 50 : (epoch + 1) * 50])) == 50


@pytest.mark.slow
def test_run_killed_at_random_steps_and_during_a_save_resumes_bitwise(world, output, world_size, whole):
    folder, rng = output / f"killed-{world_size}", random.Random(world_size)
    running = start("train", TOY, *toy_overrides(world, output), *FULL, f"name={folder.name}", world=world_size)
    for step in (4, 9, 13):
        wait_for_step(running, folder, step + rng.randrange(3))
        running.kill()
        assert -signal.SIGKILL in [p.exitcode for p in running.processes]
        running = start("train", "--resume", folder, world=world_size)
    wait_for_step(running, folder, 14)
    running.kill()
    # an incomplete checkpoint has a temporary name
    done = run("train", "--resume", folder, world=world_size, function=dies_in_the_third_save)
    assert done.codes[0] == -signal.SIGKILL
    assert list((folder / "checkpoints").glob(".step-*.tmp"))
    resume(folder, world=world_size)
    assert not list((folder / "checkpoints").glob(".step-*.tmp"))
    assert_same(folder, whole)


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_stopped_by_a_signal_exits_with_0_and_resumes_bitwise(world, output, world_size, whole, number):
    folder = output / f"{number.name}-{world_size}"
    running = start("train", TOY, *toy_overrides(world, output), *FULL, f"name={folder.name}", world=world_size)
    wait_for_step(running, folder, 5)
    # a terminal or a scheduler sends the signal to the data workers too
    workers = list(chain.from_iterable(children_of(p.pid) for p in running.processes))
    assert len(workers) >= world_size
    running.signal(number)
    for worker in workers:
        os.kill(worker, number)
    done = running.wait()
    assert done.codes == [0] * world_size, done.errors
    stopped = len(losses(folder))
    assert 5 <= stopped < STEPS
    assert f"stopped at step {stopped} and saved; continue with: vlp train --resume {folder}" in done.errors[0]
    assert all_steps(folder / "checkpoints")[0].name == f"step-{stopped:08d}"
    resume(folder, world=world_size)
    assert_same(folder, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_process_stops_all_processes_at_the_same_step(world, output, rank):
    folder = output / f"one-{rank}"
    running = start("train", TOY, *toy_overrides(world, output), "train.steps=200", f"name={folder.name}", world=2)
    wait_for_step(running, folder, 4)
    os.kill(running.processes[rank].pid, signal.SIGTERM)
    assert running.wait().codes == [0, 0]
    stopped = len(losses(folder))
    assert all_steps(folder / "checkpoints")[0].name == f"step-{stopped:08d}"
    assert len(samples(folder)) == stopped  # both processes stopped


def never_ends_its_evaluation(arguments: list[str]) -> int:
    from vlp.training.run import Run

    Run.evaluate = lambda *_: time.sleep(100)
    return command_line(arguments)


def test_signal_during_an_evaluation_stops_it_and_the_resumed_run_evaluates(world, output):
    folder = output / "evaluating"
    arguments = (*toy_overrides(world, output), *FULL, "train.steps=4", f"name={folder.name}")
    running = start("train", TOY, *arguments, function=never_ends_its_evaluation)
    wait_for_step(running, folder, 4)
    saved = folder / "checkpoints" / "step-00000004"
    while not saved.exists() and running.processes[0].is_alive():
        pass
    running.signal(signal.SIGTERM)
    done = running.wait(timeout=60)
    assert done.codes == [0], done.errors
    assert "stopped at step 4 and saved" in done.errors[0] and not (folder / "eval.jsonl").exists()
    resume(folder)
    assert (folder / "eval.jsonl").exists() and len(losses(folder)) == 4


def test_signal_before_the_first_step_stops_the_run(world, output):
    folder = output / "early"
    running = start("train", TOY, *toy_overrides(world, output), "train.steps=200", f"name={folder.name}")
    while not (folder / "experiment.json").exists() and running.processes[0].is_alive():
        pass
    running.signal(signal.SIGTERM)
    assert running.wait().codes == [0]
    assert len(losses(folder)) < 100


def test_run_killed_before_its_first_checkpoint_restarts(world, output, world_size, whole):
    folder = output / f"early-{world_size}"
    arguments = (*toy_overrides(world, output), *FULL, "save.every=1000", f"name={folder.name}")
    running = start("train", TOY, *arguments, world=world_size)
    wait_for_step(running, folder, 2)
    running.kill()
    assert not (folder / "checkpoints").exists()
    resume(folder, world=world_size)
    assert_same(folder, whole)


def test_run_killed_between_save_and_evaluation_evaluates_when_resumed(world, output):
    """Also at a step before the last: the evaluations and the best checkpoint are those of a run without interruption."""
    arguments = (*toy_overrides(world, output), "evaluate_every=6")
    train(*arguments, "name=evaluated")
    folder = output / "not-evaluated"
    for command in (("train", TOY, *arguments, f"name={folder.name}"), ("train", "--resume", folder)):
        assert run(*command, function=dies_before_evaluating).codes == [-signal.SIGKILL]
        assert not (folder / "eval.jsonl").exists()
    resume(folder)
    assert (folder / "eval.jsonl").read_text() == (output / "evaluated" / "eval.jsonl").read_text()
    assert (folder / "checkpoints/best.json").read_text() == (output / "evaluated/checkpoints/best.json").read_text()
    assert f"{folder} is already at its last step, 12" in run("train", "--resume", folder).errors[0]


@pytest.mark.slow
def test_number_of_processes_may_change_on_resume(world, output):
    """2 -> 1 -> 2 processes: every batch has the same samples, and the losses equal those of one process up to rounding."""
    train(*toy_overrides(world, output), *SAME_FOR_ANY_WORLD, "name=reference")
    folder = output / "elastic"
    running = start("train", TOY, *toy_overrides(world, output), *SAME_FOR_ANY_WORLD, "name=elastic", world=2)
    for step, then in ((7, 1), (15, 2)):
        wait_for_step(running, folder, step)
        running.kill()
        running = start("train", "--resume", folder, world=then)
    assert running.wait().codes == [0, 0]
    assert samples(folder) == samples(output / "reference")
    assert losses(folder) == pytest.approx(losses(output / "reference"), abs=1e-5)


def test_partly_written_last_line_of_a_log_is_removed(world, output):
    folder = output / "cut"
    train(*toy_overrides(world, output), f"name={folder.name}")
    expected = losses(folder), samples(folder), (folder / "eval.jsonl").read_text()
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    for name in ("log.jsonl", "samples.0.jsonl", "eval.jsonl", "quarantine.jsonl"):
        with open(folder / name, "a") as f:
            f.write('{"step": 9, "lo')
    resume(folder)
    assert (losses(folder), samples(folder), (folder / "eval.jsonl").read_text()) == expected
