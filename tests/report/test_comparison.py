"""The page that compares runs: which results share a table, which are the newest, and the alignment-uniformity plots."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tasks.fakes import BlindModel, eval_model
from vlp.cli import main
from vlp.config import Data
from vlp.data.reading.annotated import Annotated
from vlp.errors import UserError
from vlp.report.alignment_uniformity import AlignmentUniformityPlot, draw_plots, find_plots
from vlp.report.comparison import write_comparison
from vlp.report.results import metric_label, read_results
from vlp.report.tables import asked, find_runs, tabulate
from vlp.tasks.base import EvalModel, Result
from vlp.tasks.details import answer_confusions, wrong_predictions
from vlp.tasks.metrics import Interval
from vlp.tasks.retrieval import Retrieval


def plain(value: float) -> Interval:
    return Interval(value, value - 0.01, value + 0.01, percent=False)


def sts(mean: float, alignment: float, uniformity: float, data: str = "data/sts") -> Result:
    metrics = {"mean": plain(mean), "alignment": plain(alignment), "uniformity": plain(uniformity)}
    declared = {"task": "sts", "headline": "mean", "lower_is_better": ("alignment", "uniformity")}
    return Result("Spearman", data, {"pairs": 1379}, metrics, **declared)


def knn(top1: float, protocol: str = "kNN, k=200") -> Result:
    metrics = {"top1": Interval(top1, 0.1, 0.9)}
    return Result(protocol, "imagenette", {"images": 1000, "classes": 10}, metrics, task="knn", headline="top1")


def write(folder: Path, *results: Result, log: tuple[dict, ...] = (), step: int = 7) -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "experiment.json").write_text("{}")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    subject = EvalModel(torch.nn.Identity(), None, Data(train=()), torch.device("cpu"), checkpoint="a1b2c3d4e5")
    for n, result in enumerate(results):
        result.write(folder / "eval" / f"{result.task}-{n}.json", subject, step)
    return folder


def all_results(*folders: Path) -> dict[str, list[dict]]:
    return {folder.name: read_results(folder) for folder in folders}


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs evaluated on sentences, one of them also on images, one with a log, and one without results."""
    logged = [
        {"step": n, "loss": 1.0, "geometry/alignment": 0.1 * n, "geometry/uniformity_view_0": -1.0} for n in range(20)
    ]
    logged = [line | {"geometry/uniformity_view_1": -3.0} for line in logged]
    return [
        write(tmp_path / "simcse", sts(0.76, 0.2, -2.4)),
        write(tmp_path / "esimcse", sts(0.78, 0.21, -2.6), knn(0.5)),
        write(tmp_path / "moco", knn(0.6), log=(*logged, {"step": 20, "loss": 1.0})),
        write(tmp_path / "fresh"),
    ]


def test_page_is_one_file_with_all_metrics_intervals_and_the_plot(runs, tmp_path):
    path = write_comparison(runs, tmp_path / "out")
    html = path.read_text()
    assert path == tmp_path / "out" / "report.html"
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    (image,) = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert base64.b64decode(image) == (tmp_path / "out" / "alignment_uniformity.png").read_bytes()
    for text in ("0.780<small>0.770 to 0.790", "-2.600", "60.0%<small>10.0% to 90.0%", "1,379 pairs", "kNN, k=200."):
        assert text in html
    assert "Not evaluated: fresh" in html and "a1b2c3d4" in html


def test_blind_baseline_stands_beside_its_metric(tmp_path):
    blind = {"top1": Interval(0.503, 0.4, 0.6)}
    folder = write(tmp_path / "a", replace(knn(0.971), blind=blind), replace(sts(0.7, 0.2, -2.0), blind={"mean": None}))
    path = folder / "eval" / "sts-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blind": 7}))  # damaged
    results = {result["task"]: result["blind"] for result in read_results(folder)}
    assert results == {"knn": blind, "sts": {}}
    html = write_comparison([folder], tmp_path / "out").read_text()
    assert "<td>97.1% (blind 50.3%)</td>" in html and "10.0% to 90.0%; blind 50.3%</small>" in html
    assert "<td>0.700</td>" in html


def test_best_is_the_lowest_of_metrics_that_declare_it_and_the_highest_of_others(runs):
    (table,) = [t for t in tabulate(all_results(*runs)) if t.task == "sts"]
    assert {m: table.best(m) for m in table.metrics} == {
        "mean": "esimcse",
        "alignment": "simcse",
        "uniformity": "esimcse",
    }
    (single,) = tabulate(all_results(runs[0]))
    assert single.best("mean") is None


def test_each_protocol_and_data_set_has_its_own_table(tmp_path):
    a = write(tmp_path / "a", knn(0.5), knn(0.6, "kNN, k=20"), sts(0.7, 0.2, -2.0))
    b = write(tmp_path / "b", knn(0.7), sts(0.8, 0.2, -2.0, data="elsewhere"))
    tables = tabulate(all_results(a, b))
    assert [(t.task, t.protocol, t.data, list(t.results)) for t in tables] == [
        ("knn", "kNN, k=200", "imagenette", ["a", "b"]),
        ("knn", "kNN, k=20", "imagenette", ["a"]),
        ("sts", "Spearman", "data/sts", ["a"]),
        ("sts", "Spearman", "elsewhere", ["b"]),
    ]


def test_newest_result_of_a_run_counts(tmp_path):
    folder = write(tmp_path / "a", knn(0.5), knn(0.6), knn(0.7))
    for n, time in enumerate(("2026-01-02", "2026-03-01", "2026-01-31")):
        path = folder / "eval" / f"knn-{n}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": time}))
    (table,) = tabulate(all_results(folder))
    assert table.results["a"]["metrics"]["top1"].value == 0.6


def test_points_are_the_measured_uniformity_and_alignment(runs):
    plots = find_plots({run.name: run for run in runs}, all_results(*runs))
    assert plots[0] == AlignmentUniformityPlot("sts: sts", {"simcse": (-2.4, 0.2), "esimcse": (-2.6, 0.21)}, "sts")
    # mean of the last ten measured batches, steps 10 to 19, and of both views
    (point,) = plots[1].points.values()
    assert plots[1].points.keys() == {"moco"} and point == pytest.approx((-2.0, 1.45))


def test_plot_has_uniformity_to_the_right_alignment_upwards_and_scores_as_colours(runs):
    plots = find_plots({run.name: run for run in runs}, all_results(*runs))
    figure = draw_plots(plots, tabulate(all_results(*runs)))
    sentences, batches, *bars = figure.axes
    assert "uniformity" in sentences.get_xlabel() and "alignment" in sentences.get_ylabel()
    (drawn,) = sentences.collections
    assert drawn.get_offsets().tolist() == [[-2.4, 0.2], [-2.6, 0.21]] and drawn.get_array().tolist() == [0.76, 0.78]
    assert {t.get_text() for t in sentences.texts} == {"simcse (0.760)", "esimcse (0.780)"}
    assert {t.get_text() for t in batches.texts} == {"moco (60.0%)"}
    assert {bar.get_ylabel() for bar in bars} == {"sts mean", "knn top1"}


def test_runs_without_a_score_are_grey(tmp_path):
    line = {"step": 1, "loss": 1.0, "geometry/alignment": 0.5, "geometry/uniformity_image": -1.0}
    runs = [write(tmp_path / "a", knn(0.5), log=(line,)), write(tmp_path / "b", log=(line,))]
    plots = find_plots({run.name: run for run in runs}, all_results(*runs))
    axis = draw_plots(plots, tabulate(all_results(*runs))).axes[0]
    assert {t.get_text() for t in axis.texts} == {"a (50.0%)", "b"} and len(axis.collections) == 2
    # without any evaluation, all runs are grey
    axis = draw_plots(plots, []).axes[0]
    assert {t.get_text() for t in axis.texts} == {"a", "b"} and len(axis.collections) == 1
    assert write_comparison(runs[1:], tmp_path / "out").is_file()


def test_no_plot_without_geometry(tmp_path):
    path = write_comparison([write(tmp_path / "a", knn(0.5)), write(tmp_path / "b", knn(0.6))], tmp_path / "out")
    assert "uniformity" not in path.read_text() and not (tmp_path / "out" / "alignment_uniformity.png").exists()


def test_runs_of_equal_name_are_called_by_their_paths(tmp_path):
    runs = [write(tmp_path / "x" / "a", knn(0.5)), write(tmp_path / "y" / "a", knn(0.6))]
    html = write_comparison(runs, tmp_path / "out").read_text()
    assert str(runs[0]) in html and str(runs[1]) in html


def test_mistakes_are_user_errors(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run"):
        write_comparison([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(UserError, match="given twice"):
        write_comparison([runs[0], tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="given twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "out")
    with pytest.raises(UserError, match="none of fresh was evaluated"):
        write_comparison(runs[3:], tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert main(["report", str(runs[0]), str(runs[1]), "--output", str(tmp_path / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_find_runs_returns_runs_and_evaluated_weights_of_a_glob(runs, tmp_path):
    (tmp_path / "bench.json").write_text("{}")
    (tmp_path / "comparison").mkdir()
    weights = write(tmp_path / "eval" / "ALBEF", knn(0.4))
    (weights / "experiment.json").unlink()
    found = find_runs(sorted(tmp_path.iterdir()))
    assert {run.name for run in found} == {"simcse", "esimcse", "moco", "fresh", "ALBEF"}
    assert find_runs([tmp_path]) == sorted(runs)  # only one level down
    with pytest.raises(UserError, match="no folder .*nothing; name runs"):
        find_runs([*runs, tmp_path / "nothing"])


def test_page_shows_recalls_confusions_and_hardest_queries(world, tmp_path):
    given = eval_model(BlindModel(), str(world / "shards"))
    retrieved = Retrieval(resamples=5, examples=2)(given)
    mixed = knn(0.5)
    mixed.details = {"confused": [{"true": "tench", "guessed": "church", "count": 3, "of": 50}]}
    run = write(tmp_path / "blind", replace(retrieved, name="toy-zero-shot@blind"), mixed)
    html = write_comparison([run], tmp_path / "out").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert (
        "<td>toy-zero-shot@blind</td>".replace("<td>", ">") in html
        and "mean recall" in html
        and "image -&gt; text R@1" in html
    )
    assert "<td>tench</td><td>church</td><td>3 of 50</td>" in html
    assert 'alt="recall with intervals"' in html and "alignment_uniformity.png" not in html
    assert (
        html.count('alt="result ') == 2 * 5
        and html.count('alt="query"') == html.count('alt="own image"') == 2
        and html.count("<li>") == 2 * 5
    )
    hardest = retrieved.details["hardest_text_to_image"][0]
    assert hardest["query"] in html and f"rank {hardest['rank']}<" in html


def test_command_writes_to_its_output_folder(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "simcse", "esimcse"]) == 0
    assert capsys.readouterr().out == "wrote runs/comparison/report.html\n"
    assert main(["report", "simcse", "moco", "--output", "there"]) == 0
    assert (tmp_path / "there" / "report.html").is_file()


def test_wrong_predictions_are_shown_with_their_images_while_these_exist(tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(2):
        Image.new("RGB", (20, 10), (200, 30 * n, 0)).save(tmp_path / f"photos/{n}.png")
    lines = [
        {"image": f"{n % 3}.png", "text": f"question {n}?", "answers": ["red"]} for n in range(4)
    ]  # the third image has no file
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Annotated(str(tmp_path / "vqa.jsonl"), images=str(tmp_path / "photos"), answers="answers")
    reader = source.open()
    wrong = [(reader.annotation(n), "<blue>", "red") for n in range(4)]
    for run, some in (("there", [wrong[0], wrong[3], wrong[1]]), ("gone", wrong)):
        details = wrong_predictions(source, some) | {"confused": answer_confusions(["<blue>", "red"], ["red", "red"])}
        result = Result(
            "ranked", source.path, {"questions": 4}, {"accuracy": Interval(0.5, 0.4, 0.6)}, details, task="vqa"
        )
        write(tmp_path / run, result)
    html = write_comparison([tmp_path / "there", tmp_path / "gone"], tmp_path / "out").read_text()
    assert html.count("&lt;blue&gt;</td><td>1 of 2</td>") == 2 and "<blue>" not in html
    shown, without = html.split("<h2>Wrong predictions: ")[1:]
    assert "question 0?" in shown and "question 3?" not in shown  # the same image again
    assert shown.count('alt="image"') == 2
    assert all(f"question {n}?" in without for n in range(3)) and 'alt="image"' not in without


def test_results_of_earlier_versions_are_read_under_their_old_names(tmp_path):
    """A result as it was written before it described its metrics."""
    interval = {"value": 0.5, "low": 0.4, "high": 0.6, "percent": True}
    line = {"line": "1", "asked": "is it red?", "said": "no", "true": "yes", "pictures": ["0.png"]}
    old = {
        "task": "classification",
        "protocol": "the classifier's highest score, of 2 classes",
        "data": "x.jsonl",
        "n": {"lines": 4, "pictures": 3, "classes": 2},
        "metrics": {"accuracy": interval, "text_only": interval},
        "details": {"classes": ["no", "yes"], "pictures": str(tmp_path / "gone"), "wrong": [line]},
        "bad": [],
        "seconds": 1.0,
        "name": "",
        "trained_on": None,
        "seed": 0,
        "checkpoint_sha256": "a1b2c3d4e5",
        "step": 7,
        "vlp": "0.1.0",
        "time": "2026-01-01",
    }
    reranked = old | {
        "task": "rerank",
        "protocol": "any caption of a picture counts",
        "details": {},
        "n": {"images": 3},
    }
    similarity = old | {"task": "sts", "details": {}, "n": {"pairs": 4, "cut sentences": 1}}
    run = write(tmp_path / "old")
    for n, result in enumerate((old, reranked, similarity)):
        (run / "eval" / f"{n}.json").write_text(json.dumps(result))
    first, second, third = read_results(run)
    assert (
        first["headline"] == "accuracy"
        and first["n"] == {"lines": 4, "images": 3, "classes": 2}
        and first["choices"] == 2
    )
    assert first["details"]["wrong"] == [
        {"line": "1", "text": "is it red?", "prediction": "no", "truth": "yes", "images": ["0.png"]}
    ]
    assert second["protocol"] == "any caption of an image counts" and second["headline"] == "mean_recall"
    assert second["choices"] is None and third["n"] == {"pairs": 4, "truncated sentences": 1}
    assert third["lower_is_better"] == ("alignment", "uniformity")
    html = write_comparison([run], tmp_path / "out").read_text()
    assert "is it red?" in html and "<th>text only</th>" in html


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("i2t_r@1", "image -> text R@1"),
        ("itc_t2i_r@10", "itc text -> image R@10"),
        ("mean_r@5", "mean R@5"),
        ("mean_recall", "mean recall"),
        ("accuracy_order", "accuracy order"),
        ("mrr", "mrr"),
    ],
)
def test_metric_labels_are_plain(metric, label):
    assert metric_label(metric) == label


@pytest.mark.parametrize(
    ("command", "title"),
    [
        (["vlp", "eval", "runs/a", "minimal-pairs", "score=itc", "data=w", "blind=false"], "minimal-pairs score=itc"),
        (["vlp", "eval", "runs/a", "minimal-pairs"], "minimal-pairs"),
        (["vlp", "train", "a.py", "x=y", "z=1"], "minimal-pairs"),
        ([], "minimal-pairs"),
    ],
)
def test_results_that_were_asked_differently_have_different_titles(command, title):
    assert asked({"task": "minimal-pairs", "command": command}) == title
