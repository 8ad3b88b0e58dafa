"""A user's mistake ends with one line that says what is wrong and what to do, exit code 2, and no partly written file."""

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import TOY, toy_overrides
from tests.processes import command_line, run, train
from vlp import cli


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    train(*toy_overrides(world, output), "name=toy")
    return output / "toy"


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "toy"))


def contents(folder: Path) -> dict:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capfd, *arguments: object) -> str:
    """Return the one line that `vlp ARGUMENTS` prints before it exits with 2."""
    code = cli.main([str(a) for a in arguments])
    said = capfd.readouterr().err
    assert code == 2, said
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vlp: "), said
    return lines[0]


def broken_world(tmp_path: Path, world: Path, how: str) -> Path:
    folder = tmp_path / "broken"
    if how == "empty":
        folder.mkdir()
    else:
        shutil.copytree(world / "shards", folder)
        shard = sorted(folder.glob("*.tar"))[0]
        for index in folder.glob("*.json"):
            index.unlink()
        for other in sorted(folder.glob("*.tar"))[1:]:
            other.unlink()
        data = shard.read_bytes()
        shard.write_bytes({"not-a-tar": b"this is not a tar" * 100, "cut": data[: len(data) // 2], "nothing": b""}[how])
    return folder


CONFIG = {
    "misspelt section": (["trian.steps=3"], "no field 'trian'; did you mean 'train'?"),
    "misspelt field": (["data.batchsize=8"], "no field 'batchsize'; did you mean 'batch_size'?"),
    "misspelt field of the model": (["model.image.nme=x"], "no field 'nme'; did you mean 'name'?"),
    "misspelt objective": (["objectives.itx.weight=2"], "there is no 'itx' here; did you mean 'itc'?"),
    "index beyond the sources": (["data.train.1.weight=2"], "should be a number from 0 to 0"),
    "key below a value": (["seed.x=2"], "there is nothing below it"),
    "a section as a value": (["data=8"], "set one of its fields: train, val"),
    "no equals sign": (["data.batch_size"], "write it as dotted.key=value"),
    "text for a whole number": (["train.steps=many"], "takes a whole number or none, not 'many'"),
    "fraction for a whole number": (["data.batch_size=8.5"], "data.batch_size takes a whole number, not '8.5'"),
    "text for a number": (["optim.lr=fast"], "optim.lr takes a number, not 'fast'"),
    "number for true or false": (["train.compile=1"], "takes true or false"),
    "misspelt choice": (["train.precision=bf61"], "'fp32', 'bf16', not 'bf61'; did you mean 'bf16'?"),
    "misspelt optional choice": (["train.engine=dpd"], "one of 'single', 'ddp', 'deepspeed', 'fsdp2' or none"),
    "misspelt schedule": (["schedule.kind=cosin"], "use cosine, linear or constant"),
    "batch larger than the data": (["data.batch_size=64"], "larger than the data (50 samples"),
    "batch that does not divide": (["train.accumulation=3"], "not a multiple of train.accumulation=3"),
    "empty batch": (["data.batch_size=0"], "data.batch_size is 0; set it to at least 1"),
    "checkpoints every 0 steps": (["save.every=0"], "save.every is 0; set it to at least 1"),
    "average decay above one": (["train.ema_decay=1.5"], "train.ema_decay is 1.5; set it to at most 1"),
    "negative workers": (["data.workers=-1"], "data.workers is -1; set it to at least 0"),
    "steps and epochs": (["train.epochs=2"], "set one of train.steps and train.epochs"),
    "no steps": (["train.steps=0"], "make it at least one"),
    "best checkpoint by an unknown task": (["save.best=vqa/top1"], "names no task of evaluate (retrieval)"),
    "frozen prefix without parameters": (["train.frozen=vision."], "no parameter starts with 'vision.'"),
    "learning-rate scale without parameters": (
        ["train.lr_scales.vision=0.1"],
        "'vision' matches no trainable parameter",
    ),
    "towers of different widths": (["model.projection=none"], "the image tower is 64 wide, the text tower 32"),
    "captions longer than the tower's positions": (["data.max_length=99"], "the text tower takes 32 tokens"),
    "unknown image tower": (["model.image.name=resnet_fifty"], "resnet_fifty"),
    "tokenizer larger than the tower": (["model.text.config.vocab_size=50"], "the text tower only 50"),
    "negative seed": (["seed=-1"], "seed is -1; set it to at least 0"),
    "betas above one": (["optim.betas=2,3"], "optim.betas has 2.0; set it below 1"),
    "negative width": (["model.embed_size=-4"], "model.embed_size is -4"),
    "empty name": (["name="], "the run has no name"),
    "missing data": (["data.train=nowhere/shards"], "nowhere/shards"),
    "missing validation data": (["data.val=nowhere/val"], "nowhere/val"),
    "no validation data": (["data.val=none"], "set data.val"),
    "missing tokenizer": (["data.tokenizer=nowhere"], "nowhere"),
    "missing package of a log": (["log.wandb=project"], "pip install 'vlp[wandb]'"),
}


@pytest.mark.parametrize("case", CONFIG)
def test_invalid_override_is_refused(world, tmp_path, capfd, case):
    if case == "missing package of a log" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    overrides, message = CONFIG[case]
    said = refused(capfd, "train", TOY, *toy_overrides(world, tmp_path / "runs"), *overrides)
    assert message in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("how", ["empty", "not-a-tar", "cut", "nothing"])
@pytest.mark.parametrize("key", ["data.train", "data.val"])
def test_unreadable_data_is_refused(world, tmp_path, capfd, how, key):
    folder = broken_world(tmp_path, world, how)
    said = refused(capfd, "train", TOY, *toy_overrides(world, tmp_path / "runs"), f"{key}={folder}")
    assert str(folder) in said
    assert not (tmp_path / "runs").exists()


FILES = {
    "misspelt field in the file": (
        "from vlp.config import *\ndef config(): return Experiment(name='x', modle=1, objectives={}, data=Data(train=()))",
        "Experiment has no field 'modle'; did you mean 'model'?",
    ),
    "misspelt field of a part": (
        "from vlp.optim.optimizers import AdamW\ndef config(): return AdamW(weight_dekay=1)",
        "AdamW has no field 'weight_dekay'; did you mean 'weight_decay'?",
    ),
    "file without config()": ("x = 1", "does not define config()"),
    "function that returns something else": ("def config(): return 3", "returns a int, not a vlp.config.Experiment"),
    "syntax": ("def config(:", "invalid syntax"),
    "misspelt import": ("from vlp.optim.optimizers import AdamX", "cannot import name 'AdamX'"),
}


@pytest.mark.parametrize("case", FILES)
def test_invalid_config_file_is_refused(tmp_path, capfd, case):
    text, message = FILES[case]
    (tmp_path / "mine.py").write_text(text)
    said = refused(capfd, "train", tmp_path / "mine.py")
    assert message in said and "mine.py" in said


def test_wrong_type_in_a_config_file_is_refused(world, tmp_path, capfd):
    text = TOY.read_text().replace("batch_size=8", "batch_size='8'")
    (tmp_path / "mine.py").write_text(text)
    said = refused(capfd, "train", tmp_path / "mine.py", *toy_overrides(world, tmp_path / "runs"))
    assert "data.batch_size is '8'; it takes a whole number" in said


def test_class_inside_a_function_is_refused(world, tmp_path, capfd):
    text = TOY.read_text() + (
        "\n\nfrom dataclasses import dataclass, replace\n\nplain = config\n\n\ndef config():\n"
        "    @dataclass(frozen=True)\n    class Mine(ImageTextContrast):\n        x: int = 0\n\n"
        "    return replace(plain(), objectives={'mine': Mine()})\n"
    )
    (tmp_path / "mine.py").write_text(text)
    said = refused(capfd, "train", tmp_path / "mine.py", *toy_overrides(world, tmp_path / "runs"))
    assert "Mine is defined inside a function; move it to the top of its module" in said
    assert not (tmp_path / "runs").exists()


def test_missing_config_is_refused(capfd):
    assert "give a config to train" in refused(capfd, "train")
    assert "no config file nowhere.py" in refused(capfd, "train", "nowhere.py")
    assert "give a config" in refused(capfd, "train", "data.batch_size=3")


def test_folder_of_a_run_is_not_overwritten(world, finished, capfd):
    before = contents(finished)
    said = refused(capfd, "train", TOY, *toy_overrides(world, finished.parent))
    assert f"{finished} already holds a run; continue it with --resume {finished}" in said
    assert contents(finished) == before


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["optim.lr=0.5"], "optim.lr"),
        (["data.batch_size=4", "seed=3"], "data.batch_size, seed"),
        (["model.text.dropout=0.3"], "model.text.dropout"),
        (["objectives.itc.label_smoothing=0.3"], "objectives.itc.label_smoothing"),
        (["train.accumulation=2"], "train.accumulation"),
    ],
)
def test_resume_with_a_changed_experiment_names_the_keys(copied, capfd, overrides, named):
    before = contents(copied)
    said = refused(capfd, "train", "--resume", copied, *overrides)
    assert f"was started with other values of {named}; resume without changing them" in said
    assert contents(copied) == before


def test_resume_with_another_config_file_names_the_keys(world, copied, capfd):
    lamb = TOY.with_name("toy_lamb.py")
    said = refused(capfd, "train", lamb, *toy_overrides(world, copied.parent), "--resume", copied)
    assert "optim.type" in said and "optim.lr" in said


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path, capfd):
    assert "is the folder a run?" in refused(capfd, "train", "--resume", tmp_path)
    (tmp_path / "experiment.json").write_text('{"type": "vlp.config:Exp')
    assert "is the folder a run?" in refused(capfd, "train", "--resume", tmp_path)
    (tmp_path / "experiment.json").write_text('{"type": "os:system"}')
    assert "uses its own code (os:system)" in refused(capfd, "train", "--resume", tmp_path)


@pytest.mark.parametrize("command", [["train", "--resume"], ["eval"]])
def test_checkpoint_of_another_model_is_refused(copied, capfd, command):
    plain = json.loads((copied / "experiment.json").read_text())
    plain["model"]["embed_size"] = 16
    (copied / "experiment.json").write_text(json.dumps(plain))
    (copied / "eval.jsonl").unlink()
    before = contents(copied)
    said = refused(capfd, *command, copied, *(["retrieval"] if command == ["eval"] else []))
    assert "is of another model: it has another shape of 2 tensors, e.g. image_projection.weight" in said
    assert contents(copied) == before


@pytest.mark.parametrize("command", [["train", "--resume"], ["eval"]])
def test_run_with_only_damaged_checkpoints_is_refused(copied, capfd, command):
    for path in copied.glob("checkpoints/step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(copied)
    said = refused(capfd, *command, copied, *(["retrieval"] if command == ["eval"] else []))
    assert "damaged" in said and "model.safetensors was altered" in said
    assert contents(copied) == before


EVALUATIONS = {
    "missing run": (["nowhere", "retrieval"], "no such file or folder: nowhere"),
    "missing data": (["RUN", "retrieval", "data=nowhere"], "nowhere"),
    "misspelt key": (["RUN", "retrieval", "batchsize=3"], "did you mean 'batch_size'?"),
    "wrong type": (["RUN", "retrieval", "ks=1,x"], "'x'"),
    "missing step": (["RUN", "retrieval", "--checkpoint", "7"], "there are steps 12, 9"),
    "checkpoint that is not a step": (["RUN", "retrieval", "--checkpoint", "newest"], "takes a step, 'best' or 'last'"),
    "task without data": (["RUN", "zero-shot"], "give data=FOLDER"),
    "missing folder of images": (["RUN", "zero-shot", "data=nowhere"], "no folder nowhere"),
    "prompt without a placeholder": (
        ["RUN", "zero-shot", "data=WORLD", "prompts=a photo"],
        "has no {} for the class name",
    ),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_invalid_evaluation_is_refused(finished, world, tmp_path, capfd, case):
    arguments, message = EVALUATIONS[case]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(next((world / "pictures").iterdir()), tmp_path / name)
    given = [a.replace("RUN", str(finished)).replace("WORLD", str(tmp_path)) for a in arguments]
    before = contents(finished)
    assert message in refused(capfd, "eval", *given)
    assert contents(finished) == before


def test_output_inside_a_file_is_refused(world, tmp_path, capfd):
    (tmp_path / "file").write_text("not a folder")
    said = refused(capfd, "train", TOY, *toy_overrides(world, tmp_path / "file" / "runs"))
    assert "cannot write" in said and "set output=FOLDER" in said


def without_permission(arguments: list[str]) -> int:
    """Run `command_line` as a user without write permission."""
    import tests.preload  # noqa: F401, now: the other user may not be able to read the interpreter's files

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return command_line(arguments)


def test_output_without_write_permission_is_refused(world, tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:-1], *world.parents[:-1], world, *world.rglob("*")):
        if os.stat(folder).st_uid == os.getuid() and folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "runs").mkdir(mode=0o555)
    done = run("train", TOY, *toy_overrides(world, tmp_path / "runs"), function=without_permission)
    (line,) = done.errors[0].splitlines()[-1:]
    assert done.codes == [2], done.errors
    assert line.startswith("vlp: cannot write") and "Permission denied" in line and "Traceback" not in done.errors[0]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("where", ["log", "evaluation"])
def test_full_disk_during_logging_ends_with_one_line(world, tmp_path, capfd, monkeypatch, where):
    from vlp.tasks import base
    from vlp.training import logging

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "log":
        monkeypatch.setattr(logging.RunLog, "step", full)
    else:
        monkeypatch.setattr(base, "write_atomically", full)
    code = cli.main(["train", str(TOY), *toy_overrides(world, tmp_path), "train.steps=2", "data.workers=0"])
    last = capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and last.startswith("vlp: ") and "No space left on device; free some space" in last


def test_programming_error_keeps_its_traceback(world, tmp_path, monkeypatch):
    from vlp.training import setup as module

    monkeypatch.setattr(module, "parameter_groups", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(TOY), *toy_overrides(world, tmp_path)])
