"""Runs on a `WebDatasetStream`: they train, say what a stream cannot promise, and run no command that the user has not named."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cases.inputs import refused
from tests.conftest import ROOT, TOY, toy_overrides
from tests.fixtures.toy import config as toy
from tests.processes import losses, records, run, samples
from vlp.cli import main
from vlp.config import load_config
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.data.reading.tar_streams import WebDatasetStream
from vlp.errors import UserError
from vlp.objectives.instance import InstanceDiscrimination
from vlp.specs.json import dump, from_plain
from vlp.specs.overrides import override
from vlp.sweeps.run_queue import RunQueue
from vlp.tasks.contamination import has_training_data
from vlp.training.validation import check_resumable, check_shards, validate

CONFIG = """
from dataclasses import replace

from tests.fixtures.toy import config as toy
from vlp.data.reading.tar_streams import WebDatasetStream


def config():
    stream = WebDatasetStream("URLS", shuffle=20, epoch_samples=50)
    return replace(toy(), data=replace(toy().data, train=(stream,), val="WORLD/shards", tokenizer="WORLD/tokenizer"))
"""


@pytest.fixture
def config(world, tmp_path) -> Path:
    return write_config(world, tmp_path, f"{world}/shards")


def write_config(world: Path, folder: Path, urls: str) -> Path:
    path = folder / "cfg.py"
    path.write_text(CONFIG.replace("URLS", urls).replace("WORLD", str(world)))
    return path


def with_stream(**fields):
    experiment = toy()
    stream = WebDatasetStream(**{"urls": "shards"} | fields)
    return replace(experiment, data=replace(experiment.data, train=(stream,)))


# -- training


def test_run_trains_stops_and_resumes_at_a_new_place(config, tmp_path):
    arguments = (config, f"output={tmp_path}", "data.workers=0", "save.every=2")
    done = run("train", *arguments, "train.steps=4")
    assert done.codes == [0], done.errors
    folder = tmp_path / "toy"
    assert len(losses(folder)) == 4 and json.loads((folder / "data.json").read_text()) == []
    before = samples(folder)
    assert [record["epoch"] for record in records(folder)] == [8 * n / 50 for n in range(1, 5)]
    done = run("train", "--resume", folder, "train.steps=6")
    (line,) = done.errors[0].splitlines()
    assert done.codes == [2] and "it starts at a new place" in line and "set data.train.0.inexact_resume=true" in line
    done = run("train", "--resume", folder, "train.steps=6", "data.train.0.inexact_resume=true")
    assert done.codes == [0], done.errors
    assert len(losses(folder)) == 6 and samples(folder)[:4] == before
    assert json.loads((folder / "experiment.json").read_text())["data"]["train"][0]["inexact_resume"] is True


def test_fingerprints_of_a_stream_are_not_compared(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    assert has_training_data(tmp_path, with_stream(urls=f"pipe:touch {tmp_path}/ran").data)
    assert not (tmp_path / "ran").exists()


# -- what a stream does not go with


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda e: override(e, ["data.readers=2"]), "data.readers=2 .*; set it to 1"),
        (
            lambda e: override(e, ["train.steps=none", "train.epochs=2"]),
            "set data.train.0.epoch_samples, or train.steps",
        ),
        (
            lambda e: replace(e, data=replace(e.data, train=(*e.data.train, Source("x")))),
            "mixes a WebDatasetStream with 1 other",
        ),
        (lambda e: replace(e, data=replace(e.data, train=(Sentences("x"), *e.data.train))), "mixes a WebDatasetStream"),
        (lambda e: replace(e, data=replace(e.data, train=e.data.train * 2)), "mixes a WebDatasetStream"),
        (lambda e: replace(e, objectives={"i": InstanceDiscrimination()}), "has no rows; give Sources to data.train"),
        (lambda e: override(e, ["data.train.0.epoch_samples=0"]), "epoch_samples is 0; set it to at least 1"),
        (lambda e: override(e, ["data.train.0.shuffle=-1"]), "shuffle is -1; set it to at least 0"),
    ],
)
def test_settings_that_need_an_index_are_refused(change, reason):
    validate(with_stream())
    with pytest.raises(UserError, match=reason) as error:
        validate(change(with_stream()))
    assert "\n" not in str(error.value)


def test_each_worker_of_each_process_needs_a_shard(world):
    experiment = override(with_stream(), [f"data.train={world}/shards", "data.workers=2"])
    assert isinstance(experiment.data.stream, WebDatasetStream)
    check_shards(experiment, 2)
    with pytest.raises(UserError, match=r"5 shard\(s\) for 6 readers .*; lower data.workers, or set .*resampled=true"):
        check_shards(experiment, 3)
    check_shards(override(experiment, ["data.train.0.resampled=true"]), 3)
    check_shards(override(experiment, ["data.workers=0"]), 5)


def test_resuming_needs_consent():
    with pytest.raises(UserError, match="cannot continue where it stopped"):
        check_resumable(with_stream())
    check_resumable(with_stream(inexact_resume=True))
    check_resumable(toy())


def test_stream_is_stored_and_read_back():
    experiment = with_stream(resampled=True, shuffle=0, label="cls", epoch_samples=9)
    assert from_plain(json.loads(dump(experiment))) == experiment


def test_evaluation_on_a_command_is_refused(world, capfd, tmp_path):
    line = refused(capfd, "train", TOY, *toy_overrides(world, tmp_path), f"data.val=pipe:touch {tmp_path}/ran")
    assert "a command cannot be indexed" in line and not (tmp_path / "ran").exists()


# -- commands of somebody else


@pytest.fixture
def sent(tmp_path, monkeypatch) -> tuple[Path, list[str]]:
    """A run folder whose experiment.json names a command, and the urls of the experiments that are trained from now on."""
    folder, trained = tmp_path / "sent", []
    folder.mkdir()
    (folder / "experiment.json").write_text(dump(with_stream(urls="pipe:touch ran")))
    monkeypatch.setattr("vlp.train.train", lambda experiment, **_: trained.append(experiment.data.stream.urls) or 0)
    return folder, trained


@pytest.mark.parametrize(
    "command", ["--resume FOLDER", "--resume FOLDER/", "FOLDER/experiment.json", "FOLDER/experiment.json seed=1"]
)
def test_command_of_a_json_file_runs_only_if_the_user_says_so(sent, capfd, command):
    folder, trained = sent
    arguments = ["train", *command.replace("FOLDER", str(folder)).split()]
    assert "runs the shell command 'pipe:touch ran'" in refused(capfd, *arguments) and not trained
    for consent, urls in {
        "data.train.0.urls=pipe:touch ran": "pipe:touch ran",
        "data.train.0.urls=pipe:cat mine": "pipe:cat mine",
        "data.train=pipe:cat mine": "pipe:cat mine",
        "data.train.0.urls=shards": "shards",
        "--trust-code": "pipe:touch ran",
    }.items():
        assert main([*arguments, consent]) == 0
        assert trained.pop() == urls


def test_command_of_the_users_own_config_runs(world, sent, tmp_path):
    folder, trained = sent
    config = write_config(world, tmp_path, "pipe:touch ran")
    assert main(["train", str(config)]) == 0 and trained == ["pipe:touch ran"]
    (folder / "experiment.json").write_text(dump(load_config(str(config)).resolved()))
    assert main(["train", "--resume", str(folder), str(config)]) == 0 and len(trained) == 2


def test_json_file_without_commands_needs_no_consent(sent):
    folder, trained = sent
    (folder / "experiment.json").write_text(dump(with_stream()))
    assert main(["train", "--resume", str(folder)]) == 0 and trained == ["shards"]


@pytest.mark.parametrize("resumed", [False, True])
def test_queue_names_the_commands_again(tmp_path, monkeypatch, resumed):
    started = []

    class Process:
        def __init__(self, arguments, **_):
            started.append(arguments)

        def wait(self):
            return 1

    monkeypatch.setattr("subprocess.Popen", Process)
    for urls, named in (("pipe:cat a", ["data.train.0.urls=pipe:cat a"]), ("a", [])):
        experiment = replace(with_stream(urls=urls), output=str(tmp_path / urls))
        if resumed:
            experiment.folder.mkdir(parents=True)
            (experiment.folder / "experiment.json").write_text(dump(experiment))
        with RunQueue() as queue, pytest.raises(UserError, match="exit code 1"):
            queue.train(experiment)
        assert [a for a in started.pop() if a.startswith("data.")] == named


# -- import


def test_webdataset_is_imported_only_where_a_stream_is_read():
    code = "import sys, vlp.train, vlp.commands.train, vlp.training.setup; print('webdataset' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
