"""A finished run, looked at: its report, its search page, its evaluation by command."""

import base64
import json
import re

import pytest

from tests.conftest import TOY, toy_overrides, vlp
from vlp import checkpoint
from vlp.errors import UserError
from vlp.report import write_report
from vlp.serve import searcher, serve


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    done = vlp("train", TOY, *toy_overrides(world, output), "train.steps=6", "evaluate_every=3", "log.tensorboard=true")
    assert done.returncode == 0, done.stderr
    return output / "toy"


def test_report_is_one_file_with_curves_numbers_queries_and_the_command(run):
    html = write_report(run).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # nothing is loaded from elsewhere
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert len(pictures) == 1 + 2 * 5  # the curves, and five answers to each of the toy's two examples
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert html.count('class="right"') <= 2
    result = json.loads((run / "eval" / "retrieval.json").read_text())
    for metric, interval in result["metrics"].items():
        assert f"<td>{metric}</td><td>{100 * interval['value']:.1f} %</td>" in html
    assert "tests/fixtures/toy.py" in html and "train.steps=6" in html
    assert result["checkpoint_sha256"][:16] in html


def test_report_of_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
    (tmp_path / "experiment.json").write_text((run / "experiment.json").read_text())
    with pytest.raises(UserError, match="no step in its log"):
        write_report(tmp_path)


def test_every_result_names_the_weights_that_it_was_measured_on(run):
    result = json.loads((run / "eval" / "retrieval.json").read_text())
    weights = run / "checkpoints" / f"step-{result['step']:08d}" / "model.safetensors"
    assert result["checkpoint_sha256"] == checkpoint.file_hash(weights)
    assert (
        result["n"] == {"images": 50, "captions": 100} and result["seed"] == 0 and "any-positive" in result["protocol"]
    )


def test_a_line_a_step_with_what_a_reader_needs(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    needed = {"loss", "loss/itc", "lr", "temperature", "gradient_norm", "samples_per_second", "data_wait", "memory_mib"}
    assert all(needed <= line.keys() for line in lines)
    assert all(("geometry/alignment" in line) == (line["step"] % 2 == 0) for line in lines)
    assert list((run / "tensorboard").glob("events*"))


def test_search_finds_pictures_by_words(run):
    found = searcher(run, None, count=5)("a red square")
    assert len(found) == 5
    assert all(pixels.shape == (40, 48, 3) and "square" in caption for pixels, caption in found)


def test_serve_without_gradio_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"vlp\[serve\]"):
        serve(run, None, 0)
