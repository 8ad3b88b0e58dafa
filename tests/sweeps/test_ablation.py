"""An ablation trains what is missing, no more, and its table holds what the runs' own logs say."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, toy_overrides
from vlp.cli import main
from vlp.errors import UserError
from vlp.sweeps.ablation import ablate, interval, load_ablation, results

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


def test_interval_is_students():
    stats = pytest.importorskip("scipy.stats")
    values = [0.31, 0.35, 0.30, 0.37]
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-4)
    assert math.isnan(interval([0.5])[1])


def test_an_override_reaches_every_variant_and_the_ablations_own_keys_do_not(config, tmp_path):
    ablation = load_ablation(str(config), ["seeds=3", f"output={tmp_path}", "train.steps=7"])
    runs = ablation.runs()
    assert ablation.seeds == (3,)
    assert {e.train.steps for each in runs.values() for e in each} == {7}
    assert runs["smooth"][0].folder == tmp_path / "toy-ablation" / "smooth-seed3"
    assert (
        runs["smooth"][0].objectives["itc"].label_smoothing == 0.3 != runs["plain"][0].objectives["itc"].label_smoothing
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("def config(): return 3", "returns a int, not a vlp.sweeps.ablation.Ablation"),
        ("config = ", "line 1"),
        ("import nothing_such", "nothing_such"),
    ],
)
def test_what_is_no_ablation_is_refused_in_one_line(tmp_path, capsys, text, complaint):
    path = tmp_path / "a.py"
    path.write_text(text)
    assert main(["ablate", str(path)]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


STAGED = """
from dataclasses import replace
from tests.fixtures.toy_stages import config as stages
from vlp.sweeps.ablation import Ablation

def config():
    staged = stages()
    return Ablation("toy-staged", {"staged": staged, "last": staged.stages["2-words"]}, ("retrieval/mean_recall",), seeds=(0,))
"""


def test_stages_as_a_variant_are_judged_by_the_last_one(config, tmp_path):
    config.write_text(STAGED)
    ablation = load_ablation(str(config), [f"output={tmp_path}", "train.steps=7", "seeds=0,5"])
    (_, chain), ((last,), _) = ablation.chains()["staged"], ablation.chains()["last"]
    assert [e.seed for e in chain] == [5, 5] and {e.train.steps for e in (*chain, last)} == {7}
    folder = tmp_path / "toy-staged" / "staged-seed5"
    assert [e.folder for e in chain] == [folder / "1-pairs", folder / "2-words"]
    assert chain[1].model.weights == str(folder / "1-pairs") and last.model.weights is None
    assert ablation.runs()["staged"][1] == chain[1]


@pytest.mark.slow
def test_stages_are_trained_and_tabulated_like_any_variant(world, config, tmp_path):
    config.write_text(STAGED)
    overrides = [*map(str, toy_overrides(world, tmp_path)), "train.steps=2", "save.every=2"]
    ablation = load_ablation(str(config), overrides)
    said = []
    assert ablate(ablation, said.append)
    folder = tmp_path / "toy-staged"
    assert said == [str(folder / name) for name in ("staged-seed0/1-pairs", "staged-seed0/2-words", "last-seed0")]
    own = json.loads((folder / "staged-seed0" / "2-words" / "eval.jsonl").read_text())["retrieval/mean_recall"]
    assert results(ablation)["staged"] == {"retrieval/mean_recall": [own]}
    seconds = [
        json.loads(line)["seconds"]
        for name in ("1-pairs", "2-words")
        for line in (folder / "staged-seed0" / name / "log.jsonl").read_text().splitlines()
    ]
    assert f"| staged | 1 | {sum(seconds) / 60:.1f} | {own:.1%} |" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_it_trains_what_is_missing_and_tabulates_what_the_logs_say(world, config, tmp_path):
    overrides = [o for o in toy_overrides(world, tmp_path) if not str(o).startswith("name=")]
    ablation = load_ablation(str(config), [*map(str, overrides), "train.steps=3", "save.every=3", f"output={tmp_path}"])
    said = []
    ablate(ablation, said.append)
    assert len(said) == 4
    for variant, experiments in ablation.runs().items():
        own = [json.loads((e.folder / "eval.jsonl").read_text().splitlines()[-1]) for e in experiments]
        assert results(ablation)[variant]["retrieval/mean_recall"] == [line["retrieval/mean_recall"] for line in own]
    table = (ablation.folder / "table.md").read_text()
    assert table.count("\n| ") == 3 and "| smooth | 2 |" in table and "±" in table
    assert Image.open(ablation.folder / "plot.png").width > 300

    said.clear()
    (ablation.runs()["smooth"][1].folder / "eval.jsonl").unlink()  # as if it had been killed before its evaluation
    before = {e.folder: (e.folder / "log.jsonl").read_text() for each in ablation.runs().values() for e in each}
    ablate(ablation, said.append)
    assert said == [str(tmp_path / "toy-ablation" / "smooth-seed1")]
    assert before == {e.folder: (e.folder / "log.jsonl").read_text() for each in ablation.runs().values() for e in each}

    changed = load_ablation(str(config), [*map(str, overrides), "train.steps=4", f"output={tmp_path}"])
    with pytest.raises(UserError, match="started with other values of .*train.steps"):
        ablate(changed, said.append)
