"""`vlp eval` and `vlp report` on a finished run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import COLOURS, toy_overrides
from tests.processes import train
from vlp.cli import main


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    train(*toy_overrides(world, output), "train.steps=2", "save.every=2", "data.workers=0")
    return output / "toy"


@pytest.fixture(scope="module")
def inputs(world, tmp_path_factory) -> dict[str, str]:
    """Data for each task, by its name."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = []
    for n in range(20):
        colour = list(COLOURS)[n % 5]
        Image.fromarray(np.full((32, 32, 3), COLOURS[colour], dtype=np.uint8)).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "label": n % 5, "name": colour, "split": "train" if n < 10 else "val"})
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "pairs.tsv").write_text("".join(f"{n}\ta red square {n}\ta blue square\n" for n in range(6)))
    pictures = f"data={folder}"
    return {
        "retrieval": f"data={world / 'shards'}",
        "zero-shot": pictures,
        "knn": pictures,
        "probe": pictures,
        "sts": pictures,
    }


# tasks of any dual encoder; tests/tasks has the others
DUAL = ("retrieval", "zero-shot", "knn", "probe", "sts")


@pytest.mark.parametrize("task", DUAL)
def test_every_task_prints_a_table_and_keeps_its_result(run, inputs, capsys, task):
    own = {
        "sts": ["tasks=pairs", "geometry=pairs", "max_length=8"],
        "knn": ["k=5", "temperature=0.2", "features=embed"],
        "probe": ["l2=0.1,1"],
        "zero-shot": ["split=val", "prompts=a {}"],
    }
    assert main(["eval", str(run), task, inputs[task], "resamples=20", *own.get(task, [])]) == 0
    out, err = capsys.readouterr()
    written = out.split("written to ")[1].replace("\n", "").strip()
    result = json.loads(Path(written).read_text())
    assert written.startswith(str(run / "eval" / task)) and result["task"] == task
    assert result["protocol"] and result["checkpoint_sha256"] and result["step"] == 2
    assert result["n"].get("images", result["n"].get("pairs")) == {"retrieval": 50, "zero-shot": 10, "sts": 6}.get(
        task, 10
    )
    for metric, interval in result["metrics"].items():
        assert interval["low"] <= interval["value"] + 1e-9 and interval["value"] <= interval["high"] + 1e-9
        assert metric in out
    shown = "%" if task != "sts" else f"{result['metrics']['alignment']['value']:.4f}"
    assert shown in out and ("%" in out.split("95 % interval")[1]) == (task != "sts")


def test_mistakes_are_one_line_before_anything_is_computed(run, inputs, capsys):
    for arguments, message in (
        (["knn"], "give data=FOLDER"),
        (["knn", inputs["knn"], "k=0"], "k is 0; set it to at least 1"),
        (["knn", inputs["knn"], "k=many"], "takes a whole number"),
        (["probe", inputs["probe"], "features=raw"], "'pooled', 'embed'"),
        (["probe", inputs["probe"], "split=test"], "no image of split 'test'"),
        (["sts", inputs["sts"]], "no file"),
        (["sts", inputs["sts"], "tasks=pairs", "geometry=", "max_length=33"], "takes 1 to 32 tokens"),
    ):
        assert main(["eval", str(run), *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and message in err, err


def test_report_of_one_run_holds_what_was_evaluated_by_hand(run, inputs, capsys):
    assert main(["eval", str(run), "sts", inputs["sts"], "tasks=pairs", "geometry=pairs", "resamples=20"]) == 0
    assert main(["eval", str(run), "knn", inputs["knn"], "resamples=20"]) == 0
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    html = (run / "report.html").read_text()
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    assert "<h2>sts: " in html and "<td>alignment</td>" in html and "<h2>knn: " in html
    titles = re.findall(r"<h2>(\w[\w-]*): ", html)  # equal results under two names are one
    assert len(titles) >= 2
    assert "a random answer is correct in 20.00 %" in html
    assert html.count("a random answer") == sum(title != "sts" for title in titles)
