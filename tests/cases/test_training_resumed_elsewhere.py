"""Runs are resumed with data that have moved, and trained beyond their last step. Other changes are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cases.inputs import refused
from tests.conftest import toy_overrides
from tests.processes import losses, records, resume, run, samples, tensors, train
from tests.test_bad_input import contents
from vlp.config import load_json

HALF = ("data.workers=0", "train.steps=6", "save.every=3")


def stopped_at_3(folder: Path) -> Path:
    """Make a run of six steps look as if it had been stopped after three."""
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    (folder / "checkpoints" / "best.json").unlink(missing_ok=True)
    (folder / "eval.jsonl").unlink()
    return folder


@pytest.fixture
def moved(world, tmp_path) -> tuple[Path, Path, Path]:
    """A run that is stopped at step 3, the new location of its shards, and a run without interruption."""
    shards = Path(shutil.copytree(world / "shards", tmp_path / "one"))
    overrides = [*toy_overrides(world, tmp_path), f"data.train={shards}", f"data.val={shards}", *HALF]
    train(*overrides, "name=whole")
    train(*overrides, "name=run")
    return stopped_at_3(tmp_path / "run"), shards.rename(tmp_path / "two"), tmp_path / "whole"


def test_run_is_resumed_with_shards_that_have_moved(moved, capfd):
    folder, shards, whole = moved
    before = contents(folder)
    error = refused(capfd, "train", "--resume", folder)
    assert "if the data have moved, resume with data.train=NEW data.val=NEW" in error
    assert contents(folder) == before
    resume(folder, f"data.train={shards}", f"data.val={shards}")
    assert losses(folder) == losses(whole) and samples(folder) == samples(whole)
    assert all(torch.equal(a, b) for a, b in zip(*(tensors(f, "model").values() for f in (folder, whole))))
    stored = load_json(folder / "experiment.json").data
    assert (stored.train[0].shards, stored.val) == (str(shards), str(shards))
    resume(folder)  # the new location is stored


def test_other_shards_than_those_of_the_run_are_refused(moved, world, capfd, tmp_path):
    folder, shards, _ = moved
    fewer = Path(shutil.copytree(shards, tmp_path / "fewer"))
    for file in (sorted(fewer.glob("*.tar"))[0], fewer / "manifest.json"):
        file.unlink()
    before = contents(folder)
    error = refused(capfd, "train", "--resume", folder, f"data.train={fewer}", f"data.val={shards}")
    assert (
        f"the shards at {fewer} are not the ones that {folder} was started with (50 samples in 5 shards then, 40 in 4 now)"
        in error
    )
    assert "name the same shards with data.train=LOCATION" in error
    for change in ("data.train=,", f"data.train={shards},{shards}", "data.batch_size=4", "optim.lr=0.1"):
        refused(capfd, "train", "--resume", folder, f"data.val={shards}", change)
    assert contents(folder) == before


def test_weights_of_moved_sources_are_kept(world, tmp_path):
    """data.train=A,B names locations only."""
    for name in ("a", "b"):
        shutil.copytree(world / "shards", tmp_path / name)
    sources = f"data.train={tmp_path / 'a'},{tmp_path / 'b'}"
    train(*toy_overrides(world, tmp_path), sources, "data.train.0.weight=3", "data.train.1.weight=1", *HALF, "name=run")
    folder = stopped_at_3(tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "c")
    resume(folder, f"data.train={tmp_path / 'c'},{tmp_path / 'b'}")
    stored = load_json(folder / "experiment.json").data.train
    assert [(source.shards, source.weight) for source in stored] == [(str(tmp_path / "c"), 3), (str(tmp_path / "b"), 1)]


@pytest.mark.parametrize("finished", [True, False])
def test_longer_run_with_a_constant_rate_is_that_of_a_run_as_long_from_the_start(world, tmp_path, finished):
    overrides = [*toy_overrides(world, tmp_path), "schedule.kind=constant", "data.workers=0", "save.every=3"]
    train(*overrides, "train.steps=9", "name=whole")
    train(*overrides, "train.steps=6", "name=run")
    folder = tmp_path / "run"
    if not finished:
        stopped_at_3(folder)
    resume(folder, "train.steps=9")
    assert losses(folder) == losses(tmp_path / "whole") and samples(folder) == samples(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(*(tensors(tmp_path / n, "model").values() for n in ("run", "whole"))))
    assert json.loads((folder / "experiment.json").read_text())["train"]["steps"] == 9
    starts = [json.loads(line)["total_steps"] for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert starts == [6, 9]
    evaluated = [json.loads(line)["step"] for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert evaluated == ([6, 9] if finished else [9])


def test_schedule_of_a_longer_run_is_that_of_the_longer_run_from_its_next_step_on(world, tmp_path):
    overrides = [*toy_overrides(world, tmp_path), *HALF]
    train(*overrides, "name=run")
    resume(tmp_path / "run", "train.steps=12")
    schedule = load_json(tmp_path / "run" / "experiment.json").schedule
    expected = [schedule.factor(step, 6 if step < 6 else 12) * 1e-3 for step in range(12)]
    assert [line["lr"] for line in records(tmp_path / "run")] == pytest.approx(expected)
    assert expected[6] > 2 * expected[5]  # as the documentation says, it rises again


def test_run_of_epochs_is_trained_for_more(world, tmp_path, capfd):
    train(*toy_overrides(world, tmp_path), "data.workers=0", "train.steps=none", "train.epochs=0.5", "name=run")
    folder = tmp_path / "run"
    assert len(losses(folder)) == 4
    resume(folder, "train.epochs=1")
    assert len(losses(folder)) == 7
    resume(folder, "train.epochs=none", "train.steps=8")
    assert len(losses(folder)) == 8
    before = contents(folder)
    error = refused(capfd, "train", "--resume", folder, "train.steps=5")
    assert (
        f"{folder} is a run of 8 steps, and train.steps or train.epochs now gives 5; it may only become longer" in error
    )
    assert "set one of train.steps and train.epochs" in refused(capfd, "train", "--resume", folder, "train.epochs=2")
    assert contents(folder) == before
    done = run("train", "--resume", folder)
    assert done.codes == [0] and "is already at its last step, 8" in done.errors[0]


def test_unknown_file_of_a_resumed_run_is_refused(moved, capfd):
    folder, shards, _ = moved
    assert "nowhere" in refused(capfd, "train", "--resume", folder, "data.train=nowhere", f"data.val={shards}")
