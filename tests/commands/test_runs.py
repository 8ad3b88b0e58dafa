"""`vlp runs` lists the runs of a folder with their state, also of damaged and of running ones."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vlp.cli import main
from vlp.commands.runs import find_runs, summarize

LOCK = """
import sys, time
from pathlib import Path
from vlp.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.acquire()
    print("locked", flush=True)
    time.sleep(60)
"""


def write(folder: Path, steps: int = 3, total: int | None = 3, best: dict | None = None, **results) -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "experiment.json").write_text("{}")
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": n + 1}) + "\n" for n in range(steps)))
    if total is not None:
        (folder / "starts.jsonl").write_text(json.dumps({"step": 0, "total_steps": total}) + "\n")
    if best:
        (folder / "checkpoints" / "best.json").write_text(json.dumps(best))
    for name, result in results.items():
        (folder / "eval" / f"{name}.json").write_text(json.dumps(result))
    return folder


RETRIEVAL = {
    "headline": "mean_recall",
    "metrics": {"r@1": {"value": 0.1}, "mean_recall": {"value": 0.25, "percent": True}},
}
STS = {"headline": "mean", "metrics": {"mean": {"value": 0.26251, "percent": False}}}


@pytest.mark.parametrize(
    ("steps", "total", "state", "shown"),
    [
        (3, 3, "finished", "3 / 3"),
        (3, 1200, "stopped", "3 / 1,200"),
        (0, 3, "not started", "0 / 3"),
        (3, None, "stopped", "3"),
    ],
)
def test_state_and_step(tmp_path, steps, total, state, shown):
    summary = summarize(write(tmp_path / "a", steps, total), tmp_path)
    assert (summary.name, summary.state, summary.cells()[2]) == ("a", state, shown)
    assert (summary.age is None) == (steps == 0)


def test_run_that_a_process_trains_is_running_until_the_process_ends(tmp_path):
    folder = write(tmp_path / "a", 1)
    process = subprocess.Popen([sys.executable, "-c", LOCK, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        assert summarize(folder, tmp_path).state == "running"
        assert summarize(folder, tmp_path).state == "running"  # asking does not take the lock away
    finally:
        process.kill()  # leaves the file of the lock behind
        process.wait()
    assert (folder / "train.lock").exists() and summarize(folder, tmp_path).state == "stopped"


def test_best_is_that_of_the_best_checkpoint_else_the_headline_of_an_evaluation(tmp_path):
    best = {"step": 1200, "metric": "retrieval/mean_recall", "value": 0.5}
    write(tmp_path / "a", best=best, retrieval=RETRIEVAL)
    write(tmp_path / "b", retrieval=RETRIEVAL, sts=STS)
    write(tmp_path / "c", sts=STS)
    write(tmp_path / "d", sts=STS, best=best | {"metric": "sts/mean", "value": 0.3})
    write(tmp_path / "e")
    assert [summarize(tmp_path / name, tmp_path).best for name in "abcde"] == [
        "retrieval/mean_recall 50.0% at step 1,200",
        "retrieval/mean_recall 25.0%",
        "sts/mean 0.263",
        "sts/mean 0.300 at step 1,200",
        "",
    ]


def test_size_is_that_of_all_files(tmp_path):
    folder = write(tmp_path / "a")
    before = summarize(folder, tmp_path).size
    (folder / "checkpoints" / "step-00000003").mkdir()
    (folder / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(bytes(3 << 20))
    summary = summarize(folder, tmp_path)
    assert summary.size == before + (3 << 20) and summary.cells()[4] == "3.0 MiB"


def test_age_is_that_of_the_last_step(tmp_path):
    folder = write(tmp_path / "a")
    then = time.time() - 3 * 3600 - 10
    os.utime(folder / "log.jsonl", (then, then))
    assert summarize(folder, tmp_path).cells()[5] == "3 hours ago"


def test_runs_are_found_at_any_depth_but_not_inside_a_run(tmp_path):
    for name in ("b", "sweep/plain-seed0", "sweep/staged-seed0/1-images", "a"):
        write(tmp_path / name)
    write(tmp_path / "a" / "code" / "inner")
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert sorted(found) == ["a", "b", "sweep/plain-seed0", "sweep/staged-seed0/1-images"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"metrics": 3}', '{"metrics": {"a": 3}}', "[" * 100_000, "\xff"])
def test_damaged_files_count_as_missing(tmp_path, text):
    folder = write(tmp_path / "a", retrieval=RETRIEVAL)
    for name in ("eval/retrieval.json", "checkpoints/best.json", "starts.jsonl", "log.jsonl", "experiment.json"):
        (folder / name).write_text(text)
    summary = summarize(folder, tmp_path)
    assert (summary.state, summary.best, summary.total) == ("not started", "", None)


def test_list_is_aligned_and_prints_each_run(tmp_path, capsys):
    write(tmp_path / "a", retrieval=RETRIEVAL)
    write(tmp_path / "longer-name", 2)
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "best", "size", "last", "step"]
    assert lines[1].startswith("a            finished  3 / 3  retrieval/mean_recall 25.0%")
    assert lines[2].startswith("longer-name  stopped   2 / 3  ")


def test_folder_without_runs_is_refused_in_one_line(tmp_path, capsys):
    for folder, message in ((tmp_path, "has no run"), (tmp_path / "none", "no folder")):
        assert main(["runs", str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_list_imports_no_torch(tmp_path):
    write(tmp_path / "a", retrieval=RETRIEVAL)
    code = f"import sys; from vlp.cli import main; main(['runs', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
