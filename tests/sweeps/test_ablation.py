"""An ablation trains only the unfinished runs, and its table has the numbers of their logs."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, toy_overrides
from vlp.cli import main
from vlp.errors import UserError
from vlp.specs.origin import command_line
from vlp.sweeps.ablation import ablate, confidence_interval, load_ablation, read_results

CONFIG = """
from dataclasses import replace
from tests.fixtures.toy import config as toy
from vlp.sweeps.ablation import Ablation
from vlp.specs.overrides import override
from vlp.objectives.itc import ImageTextContrast

def config():
    plain = toy()
    return Ablation("toy-ablation", {"plain": plain, "smooth": override(plain, ["objectives.itc.label_smoothing=0.3"])},
                    ("retrieval/mean_recall", "retrieval/i2t_r@1"), seeds=(0, 1))
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "ablation.py"
    path.write_text(CONFIG)
    return path


def test_interval_is_that_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    values = [0.31, 0.35, 0.30, 0.37]
    mean, half = confidence_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-4)
    assert math.isnan(confidence_interval([0.5])[1])


def test_override_reaches_every_variant_except_for_fields_of_the_ablation(config, tmp_path):
    ablation = load_ablation(str(config), ["seeds=3", f"output={tmp_path}", "train.steps=7"])
    runs = ablation.runs()
    assert ablation.seeds == (3,)
    assert {e.train.steps for each in runs.values() for e in each} == {7}
    assert runs["smooth"][0].folder == tmp_path / "toy-ablation" / "smooth-seed3"
    assert (
        runs["smooth"][0].objectives["itc"].label_smoothing == 0.3 != runs["plain"][0].objectives["itc"].label_smoothing
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def config(): return 3", "returns a int, not a vlp.sweeps.ablation.Ablation"),
        ("config = ", "line 1"),
        ("import nothing_such", "nothing_such"),
    ],
)
def test_config_without_an_ablation_is_refused_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "a.py"
    path.write_text(text)
    assert main(["ablate", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


STAGED = """
from dataclasses import replace
from tests.fixtures.toy_stages import config as stages
from vlp.sweeps.ablation import Ablation

def config():
    staged = stages()
    return Ablation("toy-staged", {"staged": staged, "last": staged.stages["2-words"]}, ("retrieval/mean_recall",), seeds=(0,))
"""


def test_stages_are_compared_by_their_last_run(config, tmp_path):
    config.write_text(STAGED)
    ablation = load_ablation(str(config), [f"output={tmp_path}", "train.steps=7", "seeds=0,5"])
    (_, chain), ((last,), _) = ablation.chains()["staged"], ablation.chains()["last"]
    assert [e.seed for e in chain] == [5, 5] and {e.train.steps for e in (*chain, last)} == {7}
    folder = tmp_path / "toy-staged" / "staged-seed5"
    assert [e.folder for e in chain] == [folder / "1-pairs", folder / "2-words"]
    assert chain[1].model.weights == str(folder / "1-pairs") and last.model.weights is None
    assert ablation.runs()["staged"][1] == chain[1]


@pytest.mark.slow
def test_stages_are_trained_and_tabulated_as_any_variant(world, config, tmp_path):
    config.write_text(STAGED)
    overrides = [*map(str, toy_overrides(world, tmp_path)), "train.steps=2", "save.every=2"]
    ablation = load_ablation(str(config), overrides)
    logged = []
    assert ablate(ablation, logged.append)
    folder = tmp_path / "toy-staged"
    assert logged == [str(folder / name) for name in ("staged-seed0/1-pairs", "staged-seed0/2-words", "last-seed0")]
    metric = json.loads((folder / "staged-seed0" / "2-words" / "eval.jsonl").read_text())["retrieval/mean_recall"]
    assert read_results(ablation)["staged"] == {"retrieval/mean_recall": [metric]}
    seconds = [
        json.loads(line)["seconds"]
        for name in ("1-pairs", "2-words")
        for line in (folder / "staged-seed0" / name / "log.jsonl").read_text().splitlines()
    ]
    assert f"| staged | 1 | {sum(seconds) / 60:.1f} | {metric:.1%} |" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_unfinished_runs_are_trained_and_the_table_has_the_numbers_of_the_logs(world, config, tmp_path):
    overrides = [o for o in toy_overrides(world, tmp_path) if not str(o).startswith("name=")]
    ablation = load_ablation(str(config), [*map(str, overrides), "train.steps=3", "save.every=3", f"output={tmp_path}"])
    logged = []
    ablate(ablation, logged.append)
    assert len(logged) == 4
    (start,) = map(json.loads, (Path(logged[0]) / "starts.jsonl").read_text().splitlines())
    assert start["command"] == command_line()  # of this process, which trains the runs in processes of their own
    for variant, experiments in ablation.runs().items():
        lines = [json.loads((e.folder / "eval.jsonl").read_text().splitlines()[-1]) for e in experiments]
        assert read_results(ablation)[variant]["retrieval/mean_recall"] == [
            line["retrieval/mean_recall"] for line in lines
        ]
    table = (ablation.folder / "table.md").read_text()
    assert table.count("\n| ") == 3 and "| smooth | 2 |" in table and "±" in table
    assert "\n\nretrieval: 50 of its images are training images, so this is not a held-out result.\n" in table
    assert Image.open(ablation.folder / "plot.png").width > 300

    logged.clear()
    (ablation.runs()["smooth"][1].folder / "eval.jsonl").unlink()  # as after a kill before the evaluation
    before = {e.folder: (e.folder / "log.jsonl").read_text() for each in ablation.runs().values() for e in each}
    ablate(ablation, logged.append)
    assert logged == [str(tmp_path / "toy-ablation" / "smooth-seed1")]
    assert before == {e.folder: (e.folder / "log.jsonl").read_text() for each in ablation.runs().values() for e in each}

    changed = load_ablation(str(config), [*map(str, overrides), "train.steps=4", f"output={tmp_path}"])
    with pytest.raises(UserError, match="started with other values of .*train.steps"):
        ablate(changed, logged.append)
