"""Stages are ordinary runs that start from the weights of the previous one, and the same command continues them."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TOY, toy_overrides
from tests.fixtures.toy_stages import config as toy_stages
from tests.fixtures.toy_vlmo_stages import config as toy_vlmo
from tests.processes import losses, run, start, tensors, wait_for_step
from tests.test_bad_input import contents, refused
from vlp.cli import main
from vlp.config import load_json
from vlp.data.reading.sentences import Sentences
from vlp.errors import UserError
from vlp.models.single import Single
from vlp.specs.json import dump
from vlp.specs.overrides import override
from vlp.sweeps.run_queue import RunQueue
from vlp.sweeps.stages import Stages

STAGES = ROOT / "tests" / "fixtures" / "toy_stages.py"
FIRST, SECOND = "toy-stages/1-pairs", "toy-stages/2-words"


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(world, output) -> Path:
    """Both stages, trained by one command without interruption."""
    done = run("train", STAGES, *toy_overrides(world, output), "name=whole", "stages.2.optim.lr=2e-3")
    assert done.codes == [0], done.errors
    return output / "whole"


# --- which runs they are ----------------------------------------------------------------------------------------------


def test_later_stage_starts_from_the_folder_of_the_previous_one():
    first, second = replace(toy_stages(), output="somewhere").runs()
    assert (str(first.folder), first.model.weights) == (f"somewhere/{FIRST}", None)
    assert (str(second.folder), second.model.weights) == (f"somewhere/{SECOND}", str(first.folder))


def test_override_reaches_one_stage_by_name_or_number_or_all_stages():
    stages = toy_stages().overridden(
        ["stages.2-words.train.steps=9", "stages.1.optim.lr=0.5", "data.batch_size=4", "name=x", "output=y"]
    )
    first, second = stages.runs()
    assert (first.train.steps, second.train.steps) == (6, 9)
    assert (first.optim.lr, second.optim.lr) == (0.5, 1e-3)
    assert first.data.batch_size == second.data.batch_size == 4
    assert first.folder == Path("y/x/1-pairs")


OVERRIDES = {
    "stages.3.train.steps=9": "stages are 1 to 2",
    "stages.0.train.steps=9": "stages are 1 to 2",
    "stages.1-pears.train.steps=9": "did you mean '1-pairs'?",
    "stages=2": "stages",
    "trian.steps=3": "did you mean 'train'?",
    "stages.1.objectives.mlm.weight=2": "there is no 'mlm' here",
}


@pytest.mark.parametrize("assignment", OVERRIDES)
def test_invalid_override_is_refused(capfd, tmp_path, assignment):
    assert OVERRIDES[assignment] in refused(capfd, "train", STAGES, assignment, f"output={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_invalid_stages_are_refused_before_the_first_one_starts(world, capfd, tmp_path):
    from tests.fixtures.toy import config as toy

    with pytest.raises(UserError, match="has no stage"):
        Stages("x", {}).runs()
    with pytest.raises(UserError, match="stage b: a Single has no field weights"):
        Stages("x", {"a": toy(), "b": replace(toy(), model=Single())}).runs()
    overrides = [*toy_overrides(world, tmp_path), "stages.2.data.batch_size=0"]
    assert "data.batch_size is 0" in refused(capfd, "train", STAGES, *overrides)
    assert not list(tmp_path.iterdir())


def test_refused_stage_leaves_no_file_behind(world, capfd, tmp_path):
    """Nor does the first stage start if the data of a later one is missing."""
    runs = tmp_path / "runs"
    assert str(tmp_path / "nowhere") in refused(
        capfd, "train", STAGES, *toy_overrides(world, runs), f"stages.2.data.train={tmp_path / 'nowhere'}"
    )
    assert not runs.exists()
    with pytest.raises(SystemExit):  # its process has printed the reason
        main(["train", str(STAGES), *map(str, toy_overrides(world, runs)), "stages.1.data.batch_size=500"])
    assert "data.batch_size" in capfd.readouterr().err
    assert not list(runs.rglob("*.json"))
    (tmp_path / "file").write_text("")
    said = refused(capfd, "train", STAGES, *toy_overrides(world, tmp_path / "file" / "runs"))
    assert "cannot write" in said and "set output=FOLDER" in said


def test_single_stage_without_its_start_weights_is_refused(world, capfd, tmp_path):
    """A stage is an ordinary experiment whose ``model.weights`` is a run folder."""
    _, second = toy_stages().overridden(toy_overrides(world, tmp_path)).runs()
    path = tmp_path / "second.json"

    def said(weights: str) -> str:
        path.write_text(dump(replace(second, model=replace(second.model, weights=weights))))
        return refused(capfd, "train", path)

    assert f"no such file or folder: {tmp_path / FIRST}" in said(str(tmp_path / FIRST))
    done = run("train", TOY, *toy_overrides(world, tmp_path), "train.steps=1", "name=dual")
    assert done.codes == [0]
    assert "of another model" in said(str(tmp_path / "dual"))
    shutil.rmtree(tmp_path / "dual" / "checkpoints")
    assert "has no checkpoint to start from; train it first" in said(str(tmp_path / "dual"))
    assert not second.folder.exists()


def test_refused_run_prints_one_line(tmp_path, capfd):
    from tests.fixtures.toy import config as toy

    broken = replace(toy(), output=str(tmp_path))  # its data are missing
    with RunQueue() as queue, pytest.raises(SystemExit, match="2"):
        queue.train(broken)
    found = capfd.readouterr().err
    assert "no shards at shards: it does not exist" in found and found.count("\n") == 1


# --- running them -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_second_stage_starts_from_the_weights_of_the_first(whole, world):
    first, second = whole / "1-pairs", whole / "2-words"
    assert len(losses(first)) == len(losses(second)) == 6
    assert "loaded" in (second / "parameters.txt").read_text()
    before, resumed = tensors(first, "model"), load_json(second / "experiment.json")
    torch.manual_seed(0)
    started = resumed.model.build()
    assert all(torch.equal(started.state_dict()[name], value) for name, value in before.items())
    assert (second / "eval.jsonl").exists() and not (first / "eval.jsonl").exists()


@pytest.mark.slow
def test_finished_stages_are_skipped_and_changed_ones_refused(whole, world, capfd):
    overrides = [*toy_overrides(world, whole.parent), "name=whole", "stages.2.optim.lr=2e-3"]
    before = contents(whole)
    done = run("train", STAGES, *overrides)
    assert done.codes == [0] and contents(whole) == before
    assert "other values of train.steps" in refused(capfd, "train", STAGES, *overrides, "stages.1.train.steps=5")
    assert contents(whole) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stage_stopped_by_a_signal_exits_with_0_and_continues_bitwise(whole, world, output, number):
    arguments = ("train", STAGES, *toy_overrides(world, output), f"name={number.name}", "stages.2.optim.lr=2e-3")
    running = start(*arguments)
    folder = output / number.name / "2-words"
    wait_for_step(running, folder, 2)
    running.signal(number)
    done = running.wait()
    out = (running.folder / "0.out").read_text()
    assert done.codes == [0], done.errors
    assert f"stopped in stage 2-words; continue with: vlp train {STAGES}" in out and f"name={number.name}" in out
    assert 2 <= len(losses(folder)) < 6
    first = contents(folder.with_name("1-pairs"))
    assert run(*arguments).codes == [0]
    assert contents(folder.with_name("1-pairs")) == first
    assert losses(folder) == losses(whole / "2-words")
    expected = tensors(whole / "2-words", "model")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(folder, "model").items())


def test_launched_processes_train_one_stage_per_command(world, output):
    arguments = ("train", STAGES, *toy_overrides(world, output), "name=connected")
    for said, ends in (("1-pairs is done; continue with 2-words: vlp train", 1), ("done: ", 2), ("all 2", 2)):
        running = start(*arguments, world=2)
        done = running.wait()
        assert done.codes == [0, 0], done.errors
        assert said in (running.folder / "0.out").read_text()
        assert (running.folder / "1.out").read_text() == ""
        folders = sorted(path.name for path in (output / "connected").iterdir())
        assert folders == ["1-pairs", "2-words"][:ends]
    state = override(load_json(output / "connected" / "2-words" / "experiment.json"), []).model
    assert state.weights == str(output / "connected" / "1-pairs")
    assert json.loads((output / "connected/2-words/starts.jsonl").read_text())["processes"] == 2


# --- VLMo -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vlmo_stages_train_on_images_then_texts_then_pairs(world, output, tmp_path, capfd):
    """The stages run in this process. The text stage reads a file and changes no weight of the image stage."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"a {colour} square number {n}\n" for n in range(20) for colour in ("red", "blue")))
    stages = toy_vlmo().overridden([*toy_overrides(world, output), "data.workers=0"])
    text = stages.stages["2-text"]
    text = replace(text, data=replace(text.data, train=(Sentences(str(texts)),)))
    runs = replace(stages, stages=stages.stages | {"2-text": text}).runs()
    for stage in runs:
        path = tmp_path / f"{stage.name}.json"
        path.write_text(dump(stage))
        assert main(["train", str(path)]) == 0, capfd.readouterr().err
    images, text, pairs = (stage.folder for stage in runs)
    before, after = tensors(images, "model"), tensors(text, "model")
    kept = [name for name in before if not name.startswith("mim.")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    moved = {name for name in after if ".experts.text." in name}
    assert any(not torch.equal(after[name], before[name.replace(".text.", ".image.")]) for name in moved)
    assert "copied (encoder.layers.0.experts.text" in (text / "parameters.txt").read_text()
    assert "new (" in (pairs / "parameters.txt").read_text() and any(
        ".experts.vl." in name for name in tensors(pairs, "model")
    )

    # pairs directly after images: the run has no text expert to start from
    wrong = replace(runs[2], name="wrong", model=replace(runs[2].model, weights=str(images)))
    path.write_text(dump(wrong))
    capfd.readouterr()
    assert "lacks the text expert of encoder.layers.0" in refused(capfd, "train", path)
    assert not wrong.folder.exists()
    # pair objectives on a source of texts
    alone = replace(runs[2], name="alone", data=runs[1].data)
    path.write_text(dump(alone))
    assert "needs images, and data.train names files of texts only" in refused(capfd, "train", path)
