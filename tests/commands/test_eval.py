"""`vlp eval`: the run's own tasks, tasks by name, and a task that a user writes in a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TOY, environment, toy_overrides
from tests.processes import train
from vlp.cli import main
from vlp.tasks.find import find_task, shipped_tasks

MRR = '''
from dataclasses import dataclass

import numpy as np

from vlp.specs.fields import setting
from vlp.tasks.base import Result, Task
from vlp.tasks.embeddings import encode_pairs
from vlp.tasks.metrics import bootstrap, ranks


@dataclass(frozen=True)
class MeanReciprocalRank(Task):
    """Mean of 1 / rank of the own image, over captions.

    Args:
        data: Shards.
        batch_size: Images encoded at a time.
    """

    headline = "mrr"

    data: str
    batch_size: int = setting(64, least=1, changes_result=False)

    def evaluate(self, model):
        pairs = encode_pairs(model, self.data, self.batch_size)
        rank = ranks(pairs.texts, pairs.images, pairs.text_ids, pairs.image_ids)
        mrr = bootstrap((1 / (rank + 1)).double().numpy(), pairs.text_ids.numpy(), model.seed)
        return Result("cosine similarity", self.data, {"captions": len(rank)}, {"mrr": mrr})
'''


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    train(*toy_overrides(world, output), "train.steps=2", "save.every=2", "data.workers=0")
    return output / "toy"


@pytest.fixture
def mrr(tmp_path, monkeypatch) -> Path:
    """An otherwise empty folder with mrr.py, as the working directory."""
    (tmp_path / "mrr.py").write_text(MRR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mrr", raising=False)
    return tmp_path


def read(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / f"{name}.json").read_text())


def measured(result: dict) -> dict:
    """Everything except when, how fast and by which command it was measured."""
    return {key: value for key, value in result.items() if key not in ("seconds", "time", "command")}


def test_task_of_a_users_file(run, world, mrr, capsys):
    given = ["eval", str(run), "mrr.py:MeanReciprocalRank"]
    assert main([*given, f"data={world / 'shards'}", "batch_size=7"]) == 0
    assert "mrr" in capsys.readouterr().out
    result = read(run, "MeanReciprocalRank-shards")
    assert result["task"] == "MeanReciprocalRank" and result["headline"] == "mrr" and result["n"] == {"captions": 100}
    recall = read(run, "retrieval")["metrics"]["t2i_r@1"]["value"]
    assert recall <= result["metrics"]["mrr"]["value"] <= 1 and result["step"] == 2
    assert main(["report", str(run)]) == 0
    assert "<td>mrr</td>" in (run / "report.html").read_text()


def test_help_of_a_users_task_and_of_the_runs_own(run, mrr, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(run), "mrr.py:MeanReciprocalRank", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for text in (
        "Mean of 1 / rank",
        "data=(required)\n      Shards.",
        "batch_size=64\n      Images encoded",
        "tokenizer=",
    ):
        assert text in out, out
    with pytest.raises(SystemExit):
        main(["eval", str(run), "retrieval", "--help"])
    out = capsys.readouterr().out
    assert "resamples=20\n" in out and "ks=1,5,10\n" in out  # as the toy experiment sets them
    with pytest.raises(SystemExit):
        main(["eval", str(run), "rerank", "--help"])
    out = capsys.readouterr().out
    assert "k=128\n" in out and "resamples=1000\n" in out and "data=none\n" in out


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("retreival", "there is no task 'retreival'; did you mean 'retrieval'?"),
        ("mrr.py:MeanRank", "mrr.py:MeanRank is not a subclass of vlp.tasks.base.Task; mrr has MeanReciprocalRank"),
        ("mrr.py:np", "mrr.py:np is not a subclass"),
        ("nowhere.py:Task", "no file nowhere.py"),
        ("nowhere:Task", "cannot import nowhere: No module named 'nowhere'"),
        ("broken.py:Task", "broken.py: "),
        ("mrr.py:MeanReciprocalRank batch=3 data=x", "did you mean 'batch_size'?"),
        ("mrr.py:MeanReciprocalRank data=x batch_size=0", "batch_size is 0; set it to at least 1"),
        ("mrr.py:MeanReciprocalRank", "needs data; give data=..."),
    ],
)
def test_mistakes_are_one_line(run, mrr, capsys, task, message):
    (mrr / "broken.py").write_text("def f(:")
    assert main(["eval", str(run), *task.split()]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err


def test_without_a_task_the_runs_own_are_evaluated_into_the_files_of_the_training(run, capsys):
    of_training = measured(read(run, "retrieval"))
    files = {path.name for path in (run / "eval").iterdir()}
    assert main(["eval", str(run)]) == 0
    assert measured(read(run, "retrieval")) == of_training
    assert main(["eval", str(run), "retrieval"]) == 0  # the name stands for the same settings
    assert measured(read(run, "retrieval")) == of_training
    assert main(["eval", str(run), "workers=0", "retrieval.batch_size=64"]) == 0
    assert measured(read(run, "retrieval")) == of_training
    assert {path.name for path in (run / "eval").iterdir()} == files
    assert main(["eval", str(run), "retrieval.ks=1,2"]) == 0
    assert "i2t_r@2" in read(run, "retrieval-ks=1,2")["metrics"]
    capsys.readouterr()
    assert main(["eval", str(run), "retrieval.batchsize=3"]) == 2
    assert "did you mean 'batch_size'?" in capsys.readouterr().err


def test_weights_need_a_task(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "weights.pth")]) == 2
    assert "does not say what to evaluate; give a task" in capsys.readouterr().err


def test_users_task_works_during_training_too(world, mrr, capsys):
    config = TOY.read_text().replace("from vlp.tasks.retrieval import Retrieval", "from mrr import MeanReciprocalRank")
    task = f'evaluate={{"ranks": MeanReciprocalRank({str(world / "shards")!r})}}'
    config = config.replace('evaluate={"retrieval": Retrieval(resamples=20, examples=2)}', task)
    (mrr / "mine.py").write_text(config.replace("retrieval/mean_recall", "ranks/mrr"))
    assert main(["train", "mine.py", *toy_overrides(world, mrr / "runs"), "train.steps=2", "data.workers=0"]) == 0
    of_training = measured(read(mrr / "runs" / "toy", "ranks"))
    assert of_training["task"] == "MeanReciprocalRank"
    assert main(["eval", str(mrr / "runs" / "toy"), "--config", "mine.py"]) == 0
    assert measured(read(mrr / "runs" / "toy", "ranks")) == of_training


def test_every_task_has_a_name_of_its_own_and_its_options_are_explained():
    from dataclasses import fields

    from vlp.specs.docstrings import field_docs

    found = shipped_tasks()
    assert {"retrieval", "rerank", "zero-shot", "knn", "probe", "sts", "classification", "vqa", "masked"} <= set(found)
    for name in found:
        cls = find_task(name)
        assert cls.name == name
        assert set(field_docs(cls)) >= {field.name for field in fields(cls)}, name


def test_command_line_loads_no_torch_before_it_needs_it(tmp_path):
    code = "import sys; from vlp.tasks.find import shipped_tasks; import vlp.cli; shipped_tasks(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "False\n"
    done = subprocess.run(
        [sys.executable, "-m", "vlp.cli", "eval", "--help"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "tasks of vlp: " in done.stdout and "zero-shot" in done.stdout
    assert os.listdir(tmp_path) == []
