"""The report and the search page of a finished run, and the files that the report reads."""

import base64
import json
import re
from dataclasses import replace
from html import escape

import pytest

from tests.conftest import TOY, toy_overrides, vlp
from vlp.commands.serve import searcher, serve
from vlp.config import load_config
from vlp.errors import UserError
from vlp.files import file_hash
from vlp.models.single import Single
from vlp.report import run as report
from vlp.report.results import metric_label
from vlp.report.run import write_report
from vlp.specs.json import dump
from vlp.tasks.base import EvalModel, Result
from vlp.tasks.metrics import Interval


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    done = vlp("train", TOY, *toy_overrides(world, output), "train.steps=6", "evaluate_every=3", "log.tensorboard=true")
    assert done.returncode == 0, done.stderr
    return output / "toy"


def test_report_is_one_file_with_curves_metrics_queries_and_the_command(run):
    html = write_report(run).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # nothing is loaded from elsewhere
    images = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert len(images) == 1 + 2 * 5  # the curves, and five answers to each of the toy's two examples
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert html.count('class="correct"') <= 2
    result = json.loads((run / "eval" / "retrieval.json").read_text())
    for metric, interval in result["metrics"].items():
        assert f"<td>{escape(metric_label(metric))}</td><td>{interval['value']:.1%}</td>" in html
    assert "tests/fixtures/toy.py" in html and "train.steps=6" in html
    assert result["checkpoint_sha256"][:16] in html


LINE = {"lr": 1e-3, "gradient_norm": 1.0, "epoch": 0.1, "seconds": 1.0, "samples_per_second": 8.0, "data_wait": 0.1}
LINE |= {"memory_mib": 500.0}


@pytest.mark.parametrize(
    "lines",
    [
        [{"loss": 2.0}],
        [{"loss": None}, {"loss": 2.0, "geometry/uniformity_text": -1.0}],
        [{"loss": 2.0, "geometry/alignment": 0.3, "geometry/uniformity_view_0": -1.0}, {"loss": 1.0}],
        [{"loss": 2.0, "temperature": 0.1}, {"loss": 1.0, "temperature": 0.2}],
    ],
)
def test_report_of_a_run_with_one_tower_and_an_incomplete_log(tmp_path, lines):
    experiment = load_config(str(TOY))
    text = replace(experiment, model=Single(text=experiment.model.text), evaluate={}, name="words")
    (tmp_path / "experiment.json").write_text(dump(text))
    log = [{"step": n + 1} | LINE | line for n, line in enumerate(lines)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    html = write_report(tmp_path).read_text()
    assert html.count("data:image/png") == 1 and "Image retrieval" not in html and "<table>" not in html
    subject = EvalModel(None, None, experiment.data, None, checkpoint="abc")
    metrics = {"mean": Interval(0.5, 0.4, 0.6, percent=False), "uniformity": Interval(-2, -2.1, -1.9, percent=False)}
    Result("Spearman", "sts", {"pairs": 10}, metrics, task="sts").write(tmp_path / "eval" / "sts.json", subject, 2)
    (tmp_path / "eval.jsonl").write_text('{"step": 1}\n{"step": 2, "sts/mean": 0.5, "sts/uniformity": -2}\n')
    html = write_report(tmp_path).read_text()
    assert "<td>0.500</td><td>0.400 to 0.600</td>" in html and "<td>-2.000</td>" in html
    assert "random answer" not in html


def test_report_draws_the_measures_of_objectives_and_names_losses_at_chance(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "png", lambda figure: drawn.append(figure) or b"")
    (tmp_path / "experiment.json").write_text(dump(replace(load_config(str(TOY)), evaluate={})))
    lines = [{"itc/accuracy_hard": 0.5}, {}, {"itc/accuracy_hard": 1.0, "other/accuracy": 0.1}]
    lines[2]["at_chance"] = ["objectives.itc: the loss has been at 2.079"]
    log = [{"step": n + 1, "loss": 2.0, "loss/itc": 2.0} | LINE | line for n, line in enumerate(lines)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    assert "Step 3: objectives.itc: the loss has been at 2.079." in write_report(tmp_path).read_text()
    (figure,) = drawn
    (line,) = figure.axes[-1].lines
    assert line.get_label() == "itc: accuracy hard" and line.get_xdata().tolist() == [1, 3]
    assert line.get_ydata().tolist() == [50.0, 75.0]  # a running mean


def test_report_refuses_a_folder_that_is_not_a_run_or_has_no_steps(tmp_path, run):
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
    (tmp_path / "experiment.json").write_text((run / "experiment.json").read_text())
    with pytest.raises(UserError, match="no step in its log"):
        write_report(tmp_path)


def test_result_has_the_hash_of_its_weights(run):
    result = json.loads((run / "eval" / "retrieval.json").read_text())
    weights = run / "checkpoints" / f"step-{result['step']:08d}" / "model.safetensors"
    assert result["checkpoint_sha256"] == file_hash(weights)
    assert (
        result["n"] == {"images": 50, "captions": 100} and result["seed"] == 0 and "any-positive" in result["protocol"]
    )


def test_log_has_a_line_a_step(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    needed = {"loss", "loss/itc", "lr", "temperature", "gradient_norm", "samples_per_second", "data_wait", "memory_mib"}
    assert all(needed <= line.keys() for line in lines)
    assert all(("geometry/alignment" in line) == (line["step"] % 2 == 0) for line in lines)
    assert list((run / "tensorboard").glob("events*"))


def test_search_returns_images_with_captions(run):
    found = searcher(run, None, count=5)("a red square")
    assert len(found) == 5
    assert all(pixels.shape == (40, 48, 3) and "square" in caption for pixels, caption in found)


def test_serve_without_gradio_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"vlp\[serve\]"):
        serve(run, None, 0)
