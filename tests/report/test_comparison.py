"""Several runs on one page: what shares a table, which numbers are the newest, and where the points lie."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tasks.fakes import Blind, subject
from vlp.cli import main
from vlp.config import Data
from vlp.data.reading.annotated import Annotated
from vlp.errors import UserError
from vlp.report.alignment_uniformity import Plane, draw_planes, find_planes
from vlp.report.comparison import write_comparison
from vlp.report.run import read_results
from vlp.report.tables import find_runs, tabulate
from vlp.tasks.base import EvalModel, Result
from vlp.tasks.metrics import Interval
from vlp.tasks.mistakes import mistakes, mixed_up
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
    """Two that were evaluated on sentences, one of them on pictures too, one that was only trained, one without anything."""
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


def test_page_is_one_file_with_every_number_its_interval_and_the_plane(runs, tmp_path):
    path = write_comparison(runs, tmp_path / "out")
    html = path.read_text()
    assert path == tmp_path / "out" / "report.html"
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert base64.b64decode(picture) == (tmp_path / "out" / "plane.png").read_bytes()
    for text in ("0.780<small>0.770 to 0.790", "-2.600", "60.0%<small>10.0% to 90.0%", "1,379 pairs", "kNN, k=200."):
        assert text in html
    assert "Not evaluated: fresh" in html and "a1b2c3d4" in html


def test_best_of_a_column_is_marked_the_lowest_of_alignment_and_uniformity(runs):
    (table,) = [t for t in tabulate(all_results(*runs)) if t.task == "sts"]
    assert {m: table.best(m) for m in table.metrics} == {
        "mean": "esimcse",
        "alignment": "simcse",
        "uniformity": "esimcse",
    }
    (alone,) = tabulate(all_results(runs[0]))
    assert alone.best("mean") is None


def test_other_data_and_other_protocols_get_tables_of_their_own(tmp_path):
    a = write(tmp_path / "a", knn(0.5), knn(0.6, "kNN, k=20"), sts(0.7, 0.2, -2.0))
    b = write(tmp_path / "b", knn(0.7), sts(0.8, 0.2, -2.0, data="elsewhere"))
    tables = tabulate(all_results(a, b))
    assert [(t.task, t.protocol, t.data, list(t.results)) for t in tables] == [
        ("knn", "kNN, k=200", "imagenette", ["a", "b"]),
        ("knn", "kNN, k=20", "imagenette", ["a"]),
        ("sts", "Spearman", "data/sts", ["a"]),
        ("sts", "Spearman", "elsewhere", ["b"]),
    ]


def test_newest_of_a_runs_results_counts(tmp_path):
    folder = write(tmp_path / "a", knn(0.5), knn(0.6), knn(0.7))
    for n, time in enumerate(("2026-01-02", "2026-03-01", "2026-01-31")):
        path = folder / "eval" / f"knn-{n}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": time}))
    (table,) = tabulate(all_results(folder))
    assert table.results["a"]["metrics"]["top1"].value == 0.6


def test_points_are_where_the_measures_say(runs):
    planes = find_planes({run.name: run for run in runs}, all_results(*runs))
    assert planes[0] == Plane("sts: sts", {"simcse": (-2.4, 0.2), "esimcse": (-2.6, 0.21)}, "sts")
    # of the last ten measured batches, steps 10 to 19, and over both views
    (point,) = planes[1].points.values()
    assert planes[1].points.keys() == {"moco"} and point == pytest.approx((-2.0, 1.45))


def test_plane_has_uniformity_to_the_right_alignment_upwards_and_scores_as_colours(runs):
    planes = find_planes({run.name: run for run in runs}, all_results(*runs))
    figure = draw_planes(planes, tabulate(all_results(*runs)))
    sentences, batches, *bars = figure.axes
    assert "uniformity" in sentences.get_xlabel() and "alignment" in sentences.get_ylabel()
    (drawn,) = sentences.collections
    assert drawn.get_offsets().tolist() == [[-2.4, 0.2], [-2.6, 0.21]] and drawn.get_array().tolist() == [0.76, 0.78]
    assert {t.get_text() for t in sentences.texts} == {"simcse (0.760)", "esimcse (0.780)"}
    assert {t.get_text() for t in batches.texts} == {"moco (60.0%)"}
    assert {bar.get_ylabel() for bar in bars} == {"sts mean", "knn top1"}


def test_run_without_a_score_is_drawn_grey(tmp_path):
    line = {"step": 1, "loss": 1.0, "geometry/alignment": 0.5, "geometry/uniformity_image": -1.0}
    runs = [write(tmp_path / "a", knn(0.5), log=(line,)), write(tmp_path / "b", log=(line,))]
    planes = find_planes({run.name: run for run in runs}, all_results(*runs))
    axis = draw_planes(planes, tabulate(all_results(*runs))).axes[0]
    assert {t.get_text() for t in axis.texts} == {"a (50.0%)", "b"} and len(axis.collections) == 2
    # and where nothing was evaluated, all are
    axis = draw_planes(planes, []).axes[0]
    assert {t.get_text() for t in axis.texts} == {"a", "b"} and len(axis.collections) == 1
    assert write_comparison(runs[1:], tmp_path / "out").is_file()


def test_no_plane_without_geometry(tmp_path):
    path = write_comparison([write(tmp_path / "a", knn(0.5)), write(tmp_path / "b", knn(0.6))], tmp_path / "out")
    assert "plane" not in path.read_text() and not (tmp_path / "out" / "plane.png").exists()


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [write(tmp_path / "x" / "a", knn(0.5)), write(tmp_path / "y" / "a", knn(0.6))]
    html = write_comparison(runs, tmp_path / "out").read_text()
    assert str(runs[0]) in html and str(runs[1]) in html


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys):
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


def test_a_glob_of_everything_finds_runs_weights_and_nothing_else(runs, tmp_path):
    (tmp_path / "bench.json").write_text("{}")
    (tmp_path / "comparison").mkdir()
    weights = write(tmp_path / "eval" / "ALBEF", knn(0.4))
    (weights / "experiment.json").unlink()
    found = find_runs(sorted(tmp_path.iterdir()))
    assert {run.name for run in found} == {"simcse", "esimcse", "moco", "fresh", "ALBEF"}
    assert find_runs([tmp_path]) == sorted(runs)  # one level down, no further
    with pytest.raises(UserError, match="no folder .*nothing; name runs"):
        find_runs([*runs, tmp_path / "nothing"])


def test_page_shows_recalls_what_is_mixed_up_and_what_is_hardest(world, tmp_path):
    given = subject(Blind(), str(world / "shards"))
    retrieved = Retrieval(resamples=5, examples=2)(given)
    mixed = knn(0.5)
    mixed.details = {"confused": [{"true": "tench", "guessed": "church", "count": 3, "of": 50}]}
    run = write(tmp_path / "blind", replace(retrieved, name="toy-zero-shot@blind"), mixed)
    html = write_comparison([run], tmp_path / "out").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "<td>toy-zero-shot@blind</td>".replace("<td>", ">") in html and "mean_recall" in html
    assert "<td>tench</td><td>church</td><td>3 of 50</td>" in html
    assert 'alt="recalls with intervals"' in html and "plane.png" not in html
    assert (
        html.count('alt="result ') == 2 * 5
        and html.count('alt="query"') == html.count('alt="own"') == 2
        and html.count("<li>") == 2 * 5
    )
    hardest = retrieved.details["hardest_text_to_image"][0]
    assert hardest["query"] in html and f"found {hardest['rank']}." in html


def test_command_writes_where_it_is_told(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "simcse", "esimcse"]) == 0
    assert capsys.readouterr().out == "wrote runs/comparison/report.html\n"
    assert main(["report", "simcse", "moco", "--output", "there"]) == 0
    assert (tmp_path / "there" / "report.html").is_file()


def test_what_is_wrong_and_mixed_up_is_shown_with_its_picture(tmp_path):
    """Of annotations: in one run's report, and beside others'."""
    (tmp_path / "photos").mkdir()
    for n in range(2):
        Image.new("RGB", (20, 10), (200, 30 * n, 0)).save(tmp_path / f"photos/{n}.png")
    lines = [
        {"image": f"{n % 3}.png", "text": f"question {n}?", "answers": ["red"]} for n in range(4)
    ]  # of the third picture there is no file
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Annotated(str(tmp_path / "vqa.jsonl"), images=str(tmp_path / "photos"), answers="answers")
    reader = source.open()
    wrong = [(reader.annotation(n), "<blue>", "red") for n in range(4)]
    for run, some in (("there", [wrong[0], wrong[3], wrong[1]]), ("gone", wrong)):
        details = mistakes(source, some) | {"confused": mixed_up(["<blue>", "red"], ["red", "red"])}
        result = Result(
            "ranked", source.path, {"questions": 4}, {"accuracy": Interval(0.5, 0.4, 0.6)}, details, task="vqa"
        )
        write(tmp_path / run, result)
    html = write_comparison([tmp_path / "there", tmp_path / "gone"], tmp_path / "out").read_text()
    assert html.count("&lt;blue&gt;</td><td>1 of 2</td>") == 2 and "<blue>" not in html
    shown, unseen = html.split("<h2>Wrong: ")[1:]
    assert "question 0?" in shown and "question 3?" not in shown  # the same picture again
    assert shown.count('alt="picture"') == 2
    assert all(f"question {n}?" in unseen for n in range(3)) and 'alt="picture"' not in unseen
