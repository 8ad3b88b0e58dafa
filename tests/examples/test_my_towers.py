"""Towers that are not part of vlp train, resume, evaluate, and start new runs, as the built-in ones do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.processes import Running
from vlp.cli import main
from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.files import read_log
from vlp.specs.config_file import load_module
from vlp.weights import checkpoints

EXAMPLES = ROOT / "examples"
CONFIGS = {"config": "my-towers", "albef": "my-towers-albef"}


def vlp(*arguments: object) -> None:
    """Run a command in a process of its own, from which no earlier import is left."""
    done = Running(main, (list(map(str, arguments)),)).wait()
    assert done.codes == [0], done.errors


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.newest_whole(run / "checkpoints") / "model.safetensors")


@pytest.fixture(scope="module", params=CONFIGS)
def run(request, world, tmp_path_factory):
    """A run of four steps that was continued after two of them, next to one without interruption, ``whole``."""
    output = tmp_path_factory.mktemp("runs")
    overrides = [f"data.{key}={world / 'shards'}" for key in ("train", "val")]
    overrides += [f"data.tokenizer={world / 'tokenizer'}", "data.batch_size=8", "data.max_length=16", "data.workers=0"]
    overrides += [f"output={output}", "train.steps=4", "save.every=2", "save.keep=9", "evaluate.retrieval.resamples=20"]
    config, folder = f"{EXAMPLES / 'my_towers.py'}:{request.param}", output / CONFIGS[request.param]
    vlp("train", config, *overrides, "name=whole")
    vlp("train", config, *overrides)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    vlp("train", "--resume", folder, "--config", config)
    return folder


def test_examples_are_short():
    for name in ("bag_of_words", "conv_image"):
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40


def test_training_that_was_continued_is_the_same_to_the_bit(run):
    once, continued = newest(run.parent / "whole"), newest(run)
    assert once.keys() == continued.keys()
    assert all(torch.equal(once[name], continued[name]) for name in once)
    losses = [record["loss"] for record in read_log(run / "log.jsonl")]
    assert len(losses) >= 4 and losses[-1] != losses[0]


def test_evaluation_has_the_metrics_of_retrieval(run):
    shutil.rmtree(run / "eval")
    vlp("eval", run, "retrieval", "--trust-code")
    (result,) = (run / "eval").glob("retrieval*.json")
    assert "mean_recall" in json.loads(result.read_text())["metrics"]


def test_built_in_tower_is_not_started_from_one_of_another_class(run):
    with pytest.raises(UserError, match="is a conv_image:ConvNet, not a TimmImage"):
        TimmImage("test_vit", weights=str(run)).resolved()


def test_new_run_starts_from_the_towers_of_the_old_one(run):
    towers = load_module(EXAMPLES / "my_towers.py")
    specs = {"image": towers.ConvNet(weights=str(run))}
    if run.name == "my-towers":
        specs["text"] = towers.BagOfWords(vocab_size=200, max_length=40, weights=str(run))
    trained = newest(run)
    for part, spec in specs.items():
        tower = spec.build()
        assert not tower.report.new and len(tower.report.loaded) == len(list(tower.state_dict()))
        assert all(torch.equal(trained[f"{part}.{name}"], value) for name, value in tower.state_dict().items())
        again = spec.build(load_weights=False).state_dict()
        assert any(not torch.equal(again[name], value) for name, value in tower.state_dict().items())
