"""Records are made of finished runs that differ only in the seed, and have the numbers of their files."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from results.__main__ import main
from results.page import section
from results.record import NAME, make_record, read_record
from tests.conftest import ROOT
from tests.fixtures.toy import config as toy
from vlp.config import Experiment
from vlp.errors import UserError
from vlp.specs.json import dump
from vlp.tasks.metrics import Interval

CONFIG = "configs/align/demo.py"


def write_run(folder: Path, experiment: Experiment, r1: float = 0.3, r5: float = 0.6, **start) -> Path:
    """Write the files of a finished run of 12 steps of 5 seconds, evaluated during training and by a command."""
    (folder / "eval").mkdir(parents=True)
    (folder / "experiment.json").write_text(dump(experiment))
    log = [{"step": step, "seconds": 5.0, "loss": 3.0 / step} for step in range(1, 13)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    evaluated = [{"step": 6, "retrieval/r@1": 0.1}, {"step": 12, "retrieval/r@1": r1}]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluated))
    train = ["vlp", "train", CONFIG, f"seed={experiment.seed}"]
    start = {
        "step": 0,
        "total_steps": 12,
        "command": train,
        "processes": 1,
        "threads": 2,
        "machine": "x86_64, 2 cores, torch 2",
        "vlp": "0.1.0",
        "commit": "0123456789abcdef",
    } | start
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    metrics = {"r@1": Interval(r1, r1 - 0.1, r1 + 0.1), "r@5": Interval(r5, r5 - 0.1, r5 + 0.1)}
    result = {"task": "retrieval", "protocol": "cosine", "data": "data/openmoji/val", "n": {"images": 190}}
    result |= {"metrics": {name: vars(i) for name, i in metrics.items()}, "time": "2026-01-01", "trained_on": 0}
    result |= {"headline": "r@1", "choices": 190, "step": 12, "command": ["vlp", "eval", "runs/demo", "retrieval"]}
    (folder / "eval" / "retrieval.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[Path]:
    """Three seeds of one experiment."""
    monkeypatch.chdir(ROOT)
    values = {0: 0.30, 3: 0.35, 4: 0.31}
    return [write_run(tmp_path / f"run{seed}", replace(toy(), seed=seed), r1) for seed, r1 in values.items()]


@pytest.fixture
def ablation(tmp_path, monkeypatch) -> Path:
    """An ablation of two variants and two seeds. One variant is trained in two stages, and both seeds of it."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "sweep"
    for seed in (0, 1):
        write_run(folder / f"plain-seed{seed}", replace(toy(), seed=seed), 0.2 + 0.1 * seed)
        staged = folder / f"a staged one-seed{seed}"
        write_run(staged / "1-images", replace(toy(), seed=seed, name="1-images"))
        later = replace(toy().model, weights=str(staged / "1-images"))
        write_run(staged / "2-pairs", replace(toy(), seed=seed, name="2-pairs", model=later), 0.5 + 0.1 * seed)
    # the order of the ablation, which is not that of the names
    (folder / "table.json").write_text(json.dumps({name: {"retrieval/r@1": []} for name in ("plain", "a staged one")}))
    return folder


def test_record_has_the_numbers_of_the_files(runs):
    record = make_record(runs[:1], warn=pytest.fail)
    ((run,),) = record.variants.values()
    assert record.metrics == ("retrieval/r@1", "retrieval/r@5")
    assert run.metric("retrieval/r@1") == Interval(0.3, 0.3 - 0.1, 0.3 + 0.1)
    assert (run.seed, run.steps, run.minutes, run.processes, run.threads) == (0, 12, 1.0, 1, 2)
    assert run.commits == ("0123456789abcdef",) and run.evaluations["retrieval"].n == {"images": 190}
    assert record.config == CONFIG and record.title.startswith("Drawings and their names")


def test_commands_are_those_that_were_typed(runs):
    assert make_record(runs[:2]).commands == (
        f"vlp train {CONFIG} seed=0",
        f"vlp train {CONFIG} seed=3",
        "vlp eval runs/demo retrieval",
    )
    assert make_record(runs, commands=["make demo"], title="a").commands == ("make demo",)


def test_blind_metrics_are_recorded_under_the_names_of_the_log(runs):
    path = runs[0] / "eval" / "retrieval.json"
    blind = {"r@1": {"value": 0.01, "low": 0.0, "high": 0.02, "percent": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blind": blind}))
    record = make_record(runs[:1])
    assert record.metrics == ("retrieval/r@1", "retrieval/r@5", "retrieval/blind_r@1")
    text = section("a", record)
    assert "| retrieval: blind R@1 | 1.0 % | 0.0 % to 2.0 % |" in text
    assert "Blind: the same with the images of other samples." in text
    assert "Blind:" not in section("a", make_record(runs[:1], metrics=["retrieval/r@1"]))


def test_commands_of_evaluations_that_are_not_recorded_are_left_out(runs):
    result = json.loads((runs[0] / "eval" / "retrieval.json").read_text())
    result |= {"command": ["vlp", "eval", "runs/demo", "knn"], "time": "2025-01-01"}
    (runs[0] / "eval" / "knn.json").write_text(json.dumps(result))
    train, of_retrieval, of_knn = f"vlp train {CONFIG} seed=0", "vlp eval runs/demo retrieval", "vlp eval runs/demo knn"
    assert make_record(runs[:1]).commands == (train, of_knn, of_retrieval)  # in the order of their times
    assert make_record(runs[:1], metrics=["retrieval/r@1"]).commands == (train, of_retrieval)


def test_commands_that_prepare_the_data_come_from_the_config(runs):
    command = shlex.split("vlp train configs/simclr/pretrain.py:imagenette")
    write_run(runs[0].parent / "simclr", toy(), command=command)
    first, second, *_ = make_record([runs[0].parent / "simclr"]).commands
    assert first.startswith("vlp data pack --split train") and second == shlex.join(command)


def test_record_is_read_as_it_was_written(runs, ablation, tmp_path):
    for record in (
        make_record(runs, curves=["loss", "retrieval/r@1"], note="Of two."),
        make_record([ablation], title="Two"),
    ):
        (tmp_path / "a.json").write_text(record.dump())
        assert read_record(tmp_path / "a.json") == record


def test_variants_of_an_ablation_have_its_order_its_metrics_and_the_last_stage(ablation):
    record = make_record([ablation], title="Two variants")
    assert list(record.variants) == ["plain", "a staged one"] and record.metrics == ("retrieval/r@1",)
    values = {name: [run.metric("retrieval/r@1").value for run in runs] for name, runs in record.variants.items()}
    assert values == {"plain": [0.2, pytest.approx(0.3)], "a staged one": [0.5, 0.6]}
    assert {run.steps for run in record.variants["a staged one"]} == {24}
    assert {run.minutes for run in record.variants["a staged one"]} == {2.0}


def test_curve_has_every_evaluation_and_windows_of_a_long_log(runs):
    log = [{"step": step, "seconds": 1.0, "loss": float(step)} for step in range(1, 251)]
    (runs[0] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log[:250]))
    start = json.loads((runs[0] / "starts.jsonl").read_text()) | {"total_steps": 250}
    (runs[0] / "starts.jsonl").write_text(json.dumps(start))
    (runs[0] / "eval.jsonl").write_text('{"step": 6, "retrieval/r@1": 0.1}\n{"step": 250, "retrieval/r@1": 0.3}\n')
    ((run,),) = make_record(runs[:1], curves=["retrieval/r@1", "loss"]).variants.values()
    assert run.curves["retrieval/r@1"] == [(6, 0.1), (250, 0.3)]
    assert len(run.curves["loss"]) == 84 and run.curves["loss"][0] == (3, fmean([1, 2, 3]))
    assert run.curves["loss"][-1] == (250, 250.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log.jsonl": '{"step": 11, "seconds": 1}\n'}, "run0 is not finished; continue it with"),
        ({"eval.jsonl": '{"step": 6}\n'}, "run0 is not finished"),
        ({"starts.jsonl": ""}, "run0 is not finished"),
        ({"eval/retrieval.json": "{}"}, "retrieval.json is not a readable result"),
    ],
)
def test_unfinished_and_damaged_runs_are_refused(runs, change, message):
    for name, text in change.items():
        (runs[0] / name).write_text(text)
    with pytest.raises(UserError, match=message):
        make_record(runs)


def test_runs_that_differ_in_more_than_the_seed_are_refused(runs, tmp_path):
    other = write_run(tmp_path / "other", replace(toy(), seed=7, optim=replace(toy().optim, lr=1.0)))
    with pytest.raises(UserError, match="other and .*run0 differ in optim.lr; name runs that differ only in the seed"):
        make_record([*runs, other])


def test_same_seed_twice_is_refused(runs, tmp_path):
    again = write_run(tmp_path / "again", replace(toy(), seed=3))
    with pytest.raises(UserError, match="again and .*run3 have the same seed 3"):
        make_record([*runs, again])


def test_metric_that_a_seed_lacks_is_refused(runs):
    path = runs[1] / "eval" / "retrieval.json"
    result = json.loads(path.read_text())
    del result["metrics"]["r@5"]
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"run3 has no retrieval/r@5, which other seeds have"):
        make_record(runs)
    assert make_record(runs, metrics=["retrieval/r@1"]).metrics == ("retrieval/r@1",)
    with pytest.raises(UserError, match="no run measured retrieval/r@9; the runs have retrieval/r@1, retrieval/r@5"):
        make_record(runs, metrics=["retrieval/r@9"])


def test_seeds_that_were_measured_differently_are_refused(runs):
    path = runs[1] / "eval" / "retrieval.json"
    path.write_text(path.read_text().replace('"cosine"', '"re-ranked"'))
    with pytest.raises(UserError, match="retrieval/r@1 was not measured in the same way for every seed"):
        make_record(runs)


@pytest.mark.parametrize("commit", ["", "0123456789abcdef+changes"])
def test_commit_that_does_not_say_what_ran_is_marked(runs, tmp_path, commit):
    folder = write_run(tmp_path / "dirty", toy(), commit=commit)
    said = []
    record = make_record([folder], warn=said.append)
    assert len(said) == 1 and "1 of the commits are unknown, or had changes" in said[0]
    marked = "commit not recorded" if not commit else "commit 0123456789ab **with changes that are not committed**"
    assert marked in section("dirty", record)


def test_path_of_this_machine_is_refused(runs, tmp_path):
    folder = write_run(tmp_path / "own", toy(), command=["vlp", "train", CONFIG, "data.train=/mnt/shards"])
    with pytest.raises(UserError, match="a command names data.train=/mnt/shards, which only this machine has"):
        make_record([folder])
    inside = write_run(tmp_path / "inside", toy(), command=["vlp", "train", f"{ROOT}/{CONFIG}"])
    assert make_record([inside]).commands[0] == f"vlp train {CONFIG}"


def test_data_outside_of_the_checkout_are_named_without_their_path(runs):
    path = runs[0] / "eval" / "retrieval.json"
    path.write_text(path.read_text().replace("data/openmoji/val", "/mnt/user/flickr8k/val"))
    ((run,),) = make_record(runs[:1]).variants.values()
    assert run.evaluations["retrieval"].data == "flickr8k-val"


def test_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run nor the folder of an ablation"):
        make_record([tmp_path])
    with pytest.raises(UserError, match="no folder"):
        make_record([tmp_path / "nothing"])


def test_command_writes_record_page_and_figure(runs, tmp_path, capsys):
    page, figure = tmp_path / "docs" / "results.md", tmp_path / "docs" / "figures" / "toy.png"
    figure.parent.mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "by_hand.md").write_text("## By hand\n")
    record = ["record", "toy", *map(str, runs), "--curves", "loss", "--title", "Toy"]
    assert main(record, tmp_path) == 0
    text = page.read_text()
    assert '<a id="toy"></a>' in text and "figures/toy.png" in text and text.endswith("## By hand\n")
    drawn = figure.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    figure.write_bytes(drawn + b"kept")
    assert main([], tmp_path) == 0 and page.read_text() == text
    assert figure.read_bytes() == drawn + b"kept"  # of the same record
    assert main(["record", "A/B", str(runs[0])], tmp_path) == 2
    assert "is not a name" in capsys.readouterr().err


def test_name_of_the_record_of_a_run_is_a_part_of_a_link():
    assert all(NAME.fullmatch(name) for name in ("demo", "albef-world.2"))
    assert not any(NAME.fullmatch(name) for name in ("A", "a b", "../a", ""))
