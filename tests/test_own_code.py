"""A user's own objective, augmentation and task, in files next to the config: train, resume, evaluate, sweep, launch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TOY, toy_overrides
from tests.processes import losses, run
from vlp.cli import main
from vlp.commands.serve import searcher
from vlp.errors import UserError

DCL = '''
"""Decoupled contrastive loss (Yeh et al. 2022): the positive pair is not in the denominator."""

from dataclasses import dataclass

from torch import Tensor, eye

from vlp.objectives.base import Objective


@dataclass(frozen=True)
class Dcl(Objective):
    temperature: float = 0.1

    def __call__(self, f) -> Tensor:
        logits = f.image.embed @ f.text.embed.T / self.temperature  # (B, B)
        negatives = logits.masked_fill(eye(len(logits)).bool(), -1e4)
        return (negatives.logsumexp(1) - logits.diagonal()).mean()
'''
CONFIG = (
    TOY.read_text()
    .replace("objectives={", "objectives={'dcl': Dcl(), ")
    .replace("RandomResizedCrop(scale=(0.5, 1.0))", "Half(scale=(0.5, 1.0))")
    .replace("Retrieval(resamples=20", "Mine(resamples=20")
    .replace("SIZES = {", "from dataclasses import dataclass\n\nfrom dcl import Dcl\n\nSIZES = {")
    .replace(
        "def config()",
        "@dataclass(frozen=True)\nclass Half(RandomResizedCrop):\n    share: float = 0.5\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Retrieval):\n    pass\n\n\ndef config()",
    )
)
SWEEP = """
from dataclasses import replace

from cfg import config as plain
from vlp.sweeps.ablation import Ablation
from vlp.sweeps.stages import Stages


def config() -> Ablation:
    warm = replace(plain().objectives["dcl"], temperature=0.5)
    variants = {"plain": plain(), "warm": replace(plain(), objectives={"dcl": warm})}
    return Ablation("sweep", variants, ("retrieval/mean_recall",), seeds=(0,))


def stages() -> Stages:
    return Stages("staged", {"1-first": plain(), "2-second": plain()})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "dcl.py").write_text(DCL)
    (folder / "cfg.py").write_text(CONFIG)
    (folder / "sweep.py").write_text(SWEEP)
    return folder


@pytest.fixture(scope="module")
def overrides(world, folder) -> list[str]:
    return [*toy_overrides(world, folder / "runs"), "train.steps=4", "save.every=2"]


@pytest.fixture(scope="module")
def trained(folder, overrides) -> Path:
    done = run("train", folder / "cfg.py", *overrides, "name=trained")
    assert done.codes == [0], done.errors
    return folder / "runs" / "trained"


@pytest.fixture
def moved(trained, tmp_path) -> Path:
    """The run folder at another place, where its config is not."""
    return Path(shutil.copytree(trained, tmp_path / "moved"))


def refused(*arguments) -> str:
    done = run(*arguments)
    assert done.codes == [2], done.errors
    (line,) = done.errors[0].splitlines()
    return line


def test_run_keeps_the_config_and_the_modules_next_to_it(folder, trained):
    kept = {path.name: path.read_text() for path in (trained / "code").iterdir() if path.suffix == ".py"}
    assert kept == {name: (folder / name).read_text() for name in ("cfg.py", "dcl.py")}
    plain = json.loads((trained / "experiment.json").read_text())
    assert plain["objectives"]["dcl"]["type"] == "dcl:Dcl"
    assert plain["data"]["augment"]["type"] == "cfg:Half" and plain["evaluate"]["retrieval"]["type"] == "cfg:Mine"
    assert "loss/dcl" in json.loads((trained / "log.jsonl").read_text().splitlines()[0])


OPENING = ("train --resume RUN", "eval RUN retrieval", "gradcam RUN", "train RUN/experiment.json name=again")


@pytest.mark.parametrize("command", OPENING)
def test_folder_alone_is_refused(moved, command):
    line = refused(*command.replace("RUN", str(moved)).split())
    assert f"{moved}/experiment.json: the experiment uses its own code (" in line
    assert "give --config CONFIG.py" in line and "--trust-code" in line


def test_report_and_show_need_no_code(moved):
    assert run("report", moved).codes == [0] and (moved / "report.html").exists()
    assert run("show", moved / "experiment.json").codes == [0]


@pytest.mark.parametrize("how", ["config", "--config", "--trust-code"])
def test_run_is_resumed_with_its_config_or_its_copy_of_the_code(folder, overrides, trained, moved, how):
    shutil.rmtree(moved / "checkpoints" / "step-00000004")
    config = [folder / "cfg.py", *overrides] if how == "config" else []
    option = {"config": [], "--config": ["--config", folder / "cfg.py"], "--trust-code": ["--trust-code"]}[how]
    done = run("train", *config, "--resume", moved, *option)
    assert done.codes == [0], done.errors
    assert "resumed at step 2" in done.errors[0]
    assert losses(moved) == losses(trained)


def test_changed_code_of_a_resumed_run_is_said_and_the_earlier_text_is_kept(folder, overrides, moved, tmp_path):
    shutil.rmtree(moved / "checkpoints" / "step-00000004")
    for name in ("cfg.py", "dcl.py"):
        shutil.copy(folder / name, tmp_path / name)
    changed = DCL.replace(".mean()", ".mean() * 2")
    (tmp_path / "dcl.py").write_text(changed)
    done = run("train", "--resume", moved, "--config", tmp_path / "cfg.py")
    assert done.codes == [0], done.errors
    assert "dcl.py has changed since the run was started" in done.errors[0]
    assert (moved / "code" / "dcl.py").read_text() == changed
    assert (moved / "code" / "dcl.until-step-2.py").read_text() == DCL
    assert not (moved / "code" / "cfg.until-step-2.py").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_parameter_that_no_loss_reaches_is_named(folder, overrides, processes):
    arguments = [*overrides, "train.steps=1", f"name=unread-{processes}"]
    (folder / "only.py").write_text(
        "from dataclasses import replace\n\nfrom cfg import config as plain\n\n\n"
        "def config():\n    return replace(plain(), objectives={'dcl': plain().objectives['dcl']})\n"
    )
    done = run("train", folder / "only.py", *arguments, world=processes)
    said = "no loss reaches temperature; set train.frozen=temperature"
    assert done.codes == [0 if processes == 1 else 2] * processes
    assert any(said in errors for errors in done.errors)
    if processes == 2:
        done = run("train", folder / "only.py", *arguments, "train.frozen=temperature", "name=frozen", world=processes)
        assert done.codes == [0, 0], done.errors


def test_loss_that_is_no_scalar_is_named_with_its_shape(folder, overrides):
    (folder / "rows.py").write_text(DCL.replace(".diagonal()).mean()", ".diagonal())"))
    (folder / "many.py").write_text(
        "from dataclasses import replace\n\nfrom cfg import config as plain\nfrom rows import Dcl\n\n\n"
        "def config():\n    return replace(plain(), objectives={'dcl': Dcl()})\n"
    )
    done = run("train", folder / "many.py", *overrides, "name=rows")
    assert done.codes == [2], done.errors
    assert "objectives.dcl returned a tensor of shape (8,); a loss is a scalar" in done.errors[0].splitlines()[-1]
    line = refused("train", folder / "many.py", *overrides, "name=rows")
    assert "it has no checkpoint yet: remove" in line


@pytest.mark.parametrize("how", ["--config", "--trust-code"])
def test_run_is_evaluated_with_its_config_or_its_copy_of_the_code(folder, moved, how):
    option = ["--config", folder / "cfg.py"] if how == "--config" else ["--trust-code"]
    done = run("eval", moved, "retrieval", "resamples=20", "allow_leak=true", *option)
    assert done.codes == [0], done.errors


def test_config_without_the_class_does_not_help(moved):
    assert "(dcl:Dcl)" in refused("eval", moved, "retrieval", "--config", TOY)
    assert "name two sources" in refused("eval", moved, "retrieval", "--config", TOY, "--trust-code")
    assert "has its classes itself" in refused("train", TOY, "--trust-code")
    (moved / "code" / "cfg.py").unlink()
    assert "cannot be imported" in refused("eval", moved, "retrieval", "--trust-code")


@pytest.mark.slow
def test_variants_and_stages_are_trained_in_processes_of_their_own(folder, overrides):
    done = run("ablate", folder / "sweep.py", *overrides)
    assert done.codes == [0], done.errors
    for variant in ("plain-seed0", "warm-seed0"):
        assert len(losses(folder / "runs" / "sweep" / variant)) == 4
    assert run("ablate", folder / "sweep.py", *overrides).codes == [0]
    stages = (f"{folder / 'sweep.py'}:stages", *overrides, "stages.2.model.weights=none", "name=staged")
    done = run("train", *stages)
    assert done.codes == [0], done.errors
    assert len(losses(folder / "runs" / "staged" / "2-second")) == 4


@pytest.mark.slow
def test_two_launched_processes_find_the_code(folder, overrides):
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "ddp_cpu2.yaml"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "vlp.train", "cfg.py", *overrides, "name=launched"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(losses(folder / "runs" / "launched")) == 4
    assert json.loads((folder / "runs" / "launched" / "starts.jsonl").read_text())["processes"] == 2


PLANTED = """
from dataclasses import dataclass
from pathlib import Path

Path("SENTINEL").write_text("imported")


@dataclass(frozen=True)
class Planted:
    weight: float = 1.0
"""
NAMES = (
    "os:system",
    "antigravity:fly",
    "planted:Planted",
    "torch._inductor.cpu_vec_isa:VecAVX2",
    "tests.test_own_code:Loads",
    "vlp.planted:Planted",
    "vlp.optim.optimizers:planted",
)


def loads(self):
    raise AssertionError("constructed")


Loads = type("Loads", (), {"__dataclass_fields__": {}, "__init__": loads, "__module__": __name__})


@pytest.mark.parametrize("name", NAMES)
def test_opening_a_folder_imports_and_builds_nothing_that_it_names(trained, tmp_path, monkeypatch, capfd, name):
    """Also with the folder as the working directory, which is on the path under `python -m`."""
    moved = Path(shutil.copytree(trained, tmp_path / "sweep" / "plain-seed0"))
    sentinel = tmp_path / "sentinel"
    for place in (moved, moved / "code", tmp_path):
        place.mkdir(exist_ok=True)
        (place / "planted.py").write_text(PLANTED.replace("SENTINEL", str(sentinel)))
    plain = json.loads((moved / "experiment.json").read_text().replace("cfg:Half", "RandomResizedCrop"))
    del plain["data"]["augment"]["share"]
    plain["evaluate"] = {}
    plain["objectives"] = {"planted": {"type": name, "weight": 1.0}}
    (moved / "experiment.json").write_text(json.dumps(plain))
    (result,) = (moved / "eval").glob("*.json")
    evaluated = json.loads(result.read_text()) | {"task": name}
    (moved / "eval" / "planted.json").write_text(json.dumps({k: v for k, v in evaluated.items() if k != "headline"}))
    monkeypatch.chdir(moved)
    monkeypatch.syspath_prepend(str(moved))
    (tmp_path / "vlp_test_sweep.py").write_text(
        "from tests.fixtures.toy import config as toy\nfrom vlp.sweeps.ablation import Ablation\n"
        f"def config(): return Ablation('sweep', {{'plain': toy()}}, ('x',), (0,), output={str(tmp_path)!r})\n"
    )
    before = set(sys.modules)
    commands = (
        ["train", "--resume", moved],
        ["train", moved / "experiment.json", "name=again"],
        ["eval", moved, "retrieval"],
        ["gradcam", moved],
        ["ablate", tmp_path / "vlp_test_sweep.py"],
    )
    for command in commands:
        assert main([str(a) for a in command]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and name in error, error
    for command in (["report", moved], ["show", moved / "experiment.json"]):
        assert main([str(a) for a in command]) == (2 if name.startswith("vlp.") else 0), capfd.readouterr().err
    assert main(["report", str(moved), "--output", str(tmp_path / "comparison")]) == 0
    with pytest.raises(UserError, match=re.escape(name)):
        searcher(moved, None)
    assert not sentinel.exists()
    assert not {"planted", "antigravity"} & (set(sys.modules) - before)
