"""``vlp runs``: list run folders with their state, step, best number and size. Reads no checkpoint and imports no torch."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.errors import UserError
from vlp.files import RESULT_BYTES, local_path, read_log, read_regular

UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


@dataclass(frozen=True)
class RunSummary:
    """One line of the list.

    Args:
        name: Path of the run below the listed folder.
        state: "running", "finished", "stopped", or "not started" without a step in its log.
        step: Last logged step.
        total: Steps of the whole run, None if it is not known.
        best: The metric that selects the best checkpoint with its value and step, else the headline of the newest evaluation.
        size: Bytes of all files.
        age: Seconds since the last step was logged, None without a step.
    """

    name: str
    state: str
    step: int
    total: int | None
    best: str
    size: int
    age: float | None

    def cells(self) -> list[str]:
        step = f"{self.step:,} / {self.total:,}" if self.total is not None else f"{self.step:,}"
        age = "" if self.age is None else _age(self.age)
        return [self.name, self.state, step, self.best, _size(self.size), age]


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "runs",
        help="list runs: state, step, best number, size",
        epilog="example: vlp runs runs/albef-table1",
    )
    parser.add_argument(
        "folder", nargs="?", type=local_path, default=Path("runs"), help="folder of runs, at any depth (default: runs)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        raise UserError(f"no folder {options.folder}; name a folder of runs")
    summaries = [summarize(folder, options.folder) for folder in find_runs(options.folder)]
    if not summaries:
        raise UserError(f"{options.folder} has no run; name a folder in which runs are")
    rows = [["run", "state", "step", "best", "size", "last step"], *(summary.cells() for summary in summaries)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run folders in a folder, itself included, by name. Folders inside a run are not searched."""
    for path, folders, files in os.walk(folder):
        folders.sort()
        if "experiment.json" in files:
            folders.clear()
            yield Path(path)


def summarize(folder: Path, root: Path) -> RunSummary:
    """Read the summary of a run. Files that are damaged count as missing."""
    from vlp.training.run_lock import is_training

    steps = [line["step"] for line in read_log(folder / "log.jsonl") if type(line.get("step")) is int]
    totals = [
        start["total_steps"] for start in read_log(folder / "starts.jsonl") if type(start.get("total_steps")) is int
    ]
    step, total = (steps or [0])[-1], (totals or [None])[-1]
    if is_training(folder):
        state = "running"
    elif not steps:
        state = "not started"
    else:
        state = "finished" if step == total else "stopped"
    return RunSummary(
        name=folder.name if folder == root else str(folder.relative_to(root)),
        state=state,
        step=step,
        total=total,
        best=_best(folder),
        size=sum(_file_size(Path(path) / name) for path, _, names in os.walk(folder) for name in names),
        age=time.time() - (folder / "log.jsonl").stat().st_mtime if steps else None,
    )


def _file_size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # removed by the training meanwhile
        return 0


def _best(folder: Path) -> str:
    from vlp.weights import checkpoints

    results = {path.stem: _read_result(path) for path in sorted((folder / "eval").glob("*.json"))}
    if best := checkpoints.best(folder / "checkpoints"):
        task, _, metric = best["metric"].partition("/")
        percent = results.get(task, {}).get(metric, {}).get("percent", True)
        return f"{best['metric']} {_number(best['value'], percent)} at step {best['step']:,}"
    for task, metrics in results.items():
        for metric, interval in metrics.items():
            return f"{task}/{metric} {_number(interval['value'], interval.get('percent', True))}"
    return ""


def _read_result(path: Path) -> dict[str, dict[str, Any]]:
    """Return the metrics of a result that have a value, the headline first. Empty for a damaged file."""
    try:
        result = json.loads(read_regular(path, RESULT_BYTES))
        metrics = {name: interval for name, interval in result["metrics"].items() if _is_number(interval["value"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    headline = result.get("headline")
    return dict(sorted(metrics.items(), key=lambda item: item[0] != headline))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3f}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _age(seconds: float) -> str:
    for length, unit in UNITS:
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return "now"
