"""Files of run folders as the reports read them, also those of earlier versions, and damaged ones as far as they go.

Whoever made a run folder wrote its files, so nothing in them is relied upon: a value of another type counts as missing, and
a result without the values that a report needs is skipped with a note.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlp.errors import UserError
from vlp.files import RESULT_BYTES, read_log, read_regular, write_atomically
from vlp.tasks.find import find_task, shipped_tasks
from vlp.tasks.metrics import Interval

# earlier names of the entries of a wrong prediction
EARLIER = {"asked": "text", "said": "prediction", "true": "truth", "pictures": "images"}
LARGEST = 1e30  # a plot of larger numbers overflows
LARGEST_STEP = 1 << 53
# Types of the values of a result, see `vlp.tasks.base.Result`. [T] is a list of T, {str: T} a dict to T.
NEEDED = {"task": str, "protocol": str, "data": str, "n": {str: int}, "metrics": {str: dict}, "time": str}
OPTIONAL = {
    "details": ({}, dict),
    "bad": ([], list),
    "name": ("", str),
    "choices": (None, int),
    "split": ("", str),
    "headline": ("", str),
    "lower_is_better": ([], [str]),
    "data_id": ("", str),
    "trained_on": (None, int),
    "blind": ({}, {str: dict}),
    "seed": (None, int),
    "step": (None, int),
    "checkpoint_sha256": ("", str),
    "command": ([], [str]),
}
DETAILS = {
    "confused": [{"true": str, "guessed": str, "count": int, "of": int}],
    "images": str,
    "wrong": [{"images": [str], "text": str, "prediction": str, "truth": str}],
    "text_to_image": [{"query": str, "answer": int, "found": [int], "rank": int}],
    "hardest_text_to_image": [{"query": str, "answer": int, "found": [int], "rank": int}],
    "hardest_image_to_text": [{"query": int, "answers": [str], "found": [str], "rank": int}],
}
START = {"command": [str], "machine": str}


def read_results(folder: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the newest result of each evaluation of a run, see `vlp.tasks.base.Result`. Metrics become Intervals.

    Args:
        folder: Folder of the run, or of evaluated weights.
        notes: Receives a line for each file or metric that is skipped.
    """
    results: dict[tuple, dict[str, Any]] = {}
    notes = [] if notes is None else notes
    for path in sorted((folder / "eval").glob("*.json")):
        try:
            result = read_result(path, notes)
        except UserError as e:
            notes.append(str(e))
            continue
        # one evaluation that was repeated under two names is one result
        values = tuple((name, interval.value) for name, interval in result["metrics"].items())
        same = ("task", "data_id", "data", "protocol", "checkpoint_sha256", "step")
        key = (*(result[name] for name in same), values)
        if key not in results or results[key]["time"] <= result["time"]:
            results[key] = result
    return list(results.values())


def read_result(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a result. Metrics become Intervals.

    Args:
        notes: Receives a line if a metric is skipped.

    Raises:
        UserError: if the file is damaged, or is not a result.
    """
    try:
        result = _checked(json.loads(read_regular(path, RESULT_BYTES)))
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise UserError(f"{path} is not a readable result ({reason}); it is left out") from None
    metrics = {name: _interval(interval) for name, interval in result["metrics"].items()}
    blind = {name: interval for name, given in result["blind"].items() if (interval := _interval(given))}
    if wrong := [name for name, interval in metrics.items() if interval is None]:
        notes.append(f"{path}: the metric {wrong[0][:80]!r} is not a number; it is left out")
    return result | {"metrics": {name: interval for name, interval in metrics.items() if interval}, "blind": blind}


def _checked(result: Any) -> dict[str, Any]:
    """Return a result with a value of the right type for each entry, in the form of today.

    Raises:
        ValueError: if it is not a result.
    """
    if not isinstance(result, dict):
        raise ValueError("it is not an object")
    for name, kind in NEEDED.items():
        if not _fits(result.get(name), kind):
            raise ValueError(f"{name} is missing or of another type")
    optional = {name: result.get(name) for name in OPTIONAL}
    result |= {n: v if _fits(v, OPTIONAL[n][1]) else OPTIONAL[n][0] for n, v in optional.items()}
    if optional["headline"] is None:
        result = _from_earlier(result)
    result["details"] = {
        name: value for name, value in result["details"].items() if _fits(value, DETAILS.get(name, object))
    }
    if result["choices"] is not None and result["choices"] < 1:
        result["choices"] = None
    return result


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a JSON value has a type of `NEEDED`, `OPTIONAL`, `DETAILS` or `START`."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    if isinstance(kind, dict) and str in kind:
        return isinstance(value, dict) and all(_fits(item, kind[str]) for item in value.values())
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), inner) for name, inner in kind.items())
    if kind is int:
        return type(value) is int and abs(value) < LARGEST_STEP
    return isinstance(value, kind)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # False for NaN


def _interval(given: dict[str, Any]) -> Interval | None:
    """Return the interval of a metric, None if a bound is not a number."""
    bounds = [given.get(name) for name in ("value", "low", "high")]
    return Interval(*bounds, percent=given.get("percent") is not False) if all(map(_number, bounds)) else None


def _from_earlier(result: dict[str, Any]) -> dict[str, Any]:
    """Convert a result from before results described their metrics, and of the names of that time."""
    details, n = dict(result["details"]), result["n"]
    if "pictures" in details:
        details["images"] = details.pop("pictures")
    if _fits(details.get("wrong"), [dict]):
        details["wrong"] = [{EARLIER.get(key, key): value for key, value in line.items()} for line in details["wrong"]]
    declared = {}
    if result["task"] in shipped_tasks():  # find_task would import the file or module that somebody's result names
        task = find_task(result["task"])
        declared = {"headline": task.headline, "lower_is_better": task.lower_is_better}
    return (
        result
        | declared
        | {
            "details": details,
            "n": {name.replace("pictures", "images").replace("cut ", "truncated "): count for name, count in n.items()},
            # results are compared by their protocol
            "protocol": result["protocol"].replace("caption of a picture", "caption of an image"),
            "choices": n.get("classes") or (n.get("images") if result["task"] == "retrieval" else None),
        }
    )


def read_numbers(path: Path, notes: list[str] | None = None) -> list[dict[str, float]]:
    """Read the numbers of each line of log.jsonl or eval.jsonl, which has them by name together with ``step``.

    Args:
        notes: Receives a line if there are lines without a step.
    """
    records = read_log(path)
    lines = [
        {name: value for name, value in record.items() if _number(value)}
        for record in records
        if _fits(record.get("step"), int)
    ]
    if notes is not None and len(lines) < len(records):
        notes.append(f"{path}: {len(records) - len(lines):,} lines have no step; they are left out")
    return lines


def read_chance(path: Path) -> list[str]:
    """Read the lines of log.jsonl about losses that stayed at their chance level."""
    found = [record for record in read_log(path) if _fits(record, {"step": int, "at_chance": [str]})]
    return [f"Step {record['step']:,}: {line}" for record in found for line in record["at_chance"]]


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Read the starts of a run that have a command and a machine."""
    return [start for start in read_log(path) if _fits(start, START)]


def contamination(result: dict[str, Any]) -> str:
    """Return a sentence on whether the evaluated images are held out from the training. Empty for evaluations of texts."""
    if result["trained_on"]:
        return f"{result['trained_on']:,} of its images are training images, so this is not a held-out result."
    if result["trained_on"] == 0:
        return "None of its images are among the training images."
    return "Whether it has training images is not known." if "images" in result["n"] else ""


def metric_label(metric: str) -> str:
    """Return the name of a metric for a reader: ``i2t_r@1`` is "image -> text R@1"."""
    for short, long in (("i2t_", "image -> text "), ("t2i_", "text -> image "), ("r@", "R@")):
        metric = re.sub(rf"(?<![a-z]){short}", long, metric)
    return metric.replace("_", " ")


def write_html(path: Path, html: str) -> Path:
    """Write a page.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a lone surrogate, which JSON can contain, has no encoding
        write_atomically(path, html.encode(errors="replace"))
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; choose a folder that can be written") from None
    return path
