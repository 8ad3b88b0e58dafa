"""Results of evaluations as the reports read them, also those that earlier versions of vlp wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlp.tasks.find import find_task, shipped_tasks
from vlp.tasks.metrics import Interval

# earlier names of the entries of a wrong prediction
EARLIER = {"asked": "text", "said": "prediction", "true": "truth", "pictures": "images"}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the newest result of each evaluation of a run, see `vlp.tasks.base.Result`. Metrics become Intervals."""
    results = []
    for path in sorted((folder / "eval").glob("*.json")):
        result = json.loads(path.read_text())
        if "headline" not in result:
            result = _from_earlier(result)
        result["metrics"] = {metric: Interval(**interval) for metric, interval in result["metrics"].items()}
        results.append(result)
    return results


def _from_earlier(result: dict[str, Any]) -> dict[str, Any]:
    """Convert a result from before results described their metrics, and of the names of that time."""
    details, n = dict(result["details"]), result["n"]
    if "pictures" in details:
        details["images"] = details.pop("pictures")
    if "wrong" in details:
        details["wrong"] = [{EARLIER.get(key, key): value for key, value in line.items()} for line in details["wrong"]]
    declared = {"headline": "", "lower_is_better": ()}
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
            "name": result.get("name", ""),
            "choices": n.get("classes") or (n["images"] if result["task"] == "retrieval" else None),
        }
    )


def metric_label(metric: str) -> str:
    """Return the name of a metric for a reader: ``i2t_r@1`` is "image -> text R@1"."""
    for short, long in (("i2t_", "image -> text "), ("t2i_", "text -> image "), ("r@", "R@")):
        metric = re.sub(rf"(?<![a-z]){short}", long, metric)
    return metric.replace("_", " ")
