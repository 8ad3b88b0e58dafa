"""Tables of results of several runs: which folders are runs, and which results may be compared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vlp.errors import UserError
from vlp.tasks.find import find_task, shipped_tasks
from vlp.tasks.metrics import Interval
from vlp.tasks.naming import minor_fields

OF_DATA = {"data", "image", "split"}  # fields of tasks, which the title gives as the description of the data


@dataclass
class Table:
    """Results of one protocol on one data set.

    Args:
        results: Run name -> its newest result, see `vlp.report.results.read_results`.
        split: Split of the data, if ``data`` does not say it.
        data_id: Identity of the data where another data set has the same location, else "".
    """

    task: str
    data: str
    protocol: str
    results: dict[str, dict]
    split: str = ""
    data_id: str = ""

    @property
    def title(self) -> str:
        task = asked(next(iter(self.results.values()))) if self.results else self.task
        return f"{task}: {described(self.data, self.split)}{f' ({self.data_id[:8]})' if self.data_id else ''}"

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for result in self.results.values() for metric in result["metrics"]))

    def best(self, metric: str) -> str | None:
        """Return the run with the best value, None if fewer than two runs have one."""
        values = {name: r["metrics"][metric].value for name, r in self.results.items() if metric in r["metrics"]}
        if len(values) < 2:
            return None
        lower = any(metric in result["lower_is_better"] for result in self.results.values())
        return (min if lower else max)(values, key=lambda name: values[name])

    def headline(self) -> tuple[str, dict[str, Interval]]:
        """Return the task and its headline metric, and the metric's value for each run.

        There is no value where the data have no answers, as the test sets of VQA.
        """
        named = (r["headline"] for r in self.results.values() if r["headline"])
        metric = next(named, next(iter(self.metrics), ""))
        values = {name: r["metrics"][metric] for name, r in self.results.items() if metric in r["metrics"]}
        return f"{self.task} {metric}", values


def find_runs(folders: list[Path]) -> list[Path]:
    """Return the folders that are runs or evaluated weights, and those of the other folders' subfolders that are.

    Raises:
        UserError: if there is none, or a run is given twice.
    """

    def is_run(folder: Path) -> bool:
        return os.path.isfile(folder / "experiment.json") or any(folder.glob("eval/*.json"))

    for folder in folders:
        if not os.path.exists(folder):  # False also for a name that no folder can have
            raise UserError(f"no folder {folder}; name runs, or a folder of runs")
    found = [
        run for folder in folders for run in ([folder] if is_run(folder) else sorted(filter(is_run, folder.glob("*/"))))
    ]
    if not found:
        raise UserError(f"{folders[0]} is not a run: it has no experiment.json, and no evaluations")
    if len({folder.resolve() for folder in found}) < len(found):
        raise UserError("a run is given twice; name each once")
    return found


def asked(result: dict) -> str:
    """Return a result's task with the settings that it was asked with and that change it, apart from the data: "rerank k=16"."""
    command, task = result["command"], result["task"]
    # find_task would import the file or module that somebody's result names
    if command[:2] != ["vlp", "eval"] or task not in shipped_tasks():
        return task
    unnamed = OF_DATA | minor_fields(find_task(task))
    return " ".join([task, *(text for text in command[4:] if "=" in text and text.partition("=")[0] not in unnamed)])


def described(data: str, split: str) -> str:
    """Return the location of data and their split, for a reader."""
    return f"{data}, split {split}" if split else data


def tabulate(results: dict[str, list[dict]]) -> list[Table]:
    """Group results by task, data and protocol. Of several results of a run the newest counts.

    Data are the same if they have the same identity, wherever they lie. A result of an earlier version of vlp, which did not
    record it, is of the data that others have found at its location.
    """
    every = [result for found in results.values() for result in found]
    ids: dict[tuple[str, str], list[str]] = {}  # of the data that were found at a location
    for result in every:
        known = ids.setdefault((result["data"], result["split"]), [])
        if result["data_id"] and result["data_id"] not in known:
            known.append(result["data_id"])
    tables: dict[tuple, Table] = {}
    for name, found in results.items():
        for result in sorted(found, key=lambda r: r["time"]):
            data, split = result["data"], result["split"]
            known = ids[data, split]
            identity = result["data_id"] or (known[0] if len(known) == 1 else f"{data}, split {split}")
            shown_id = result["data_id"] if len(known) > 1 else ""
            table = Table(result["task"], data, result["protocol"], {}, split, shown_id)
            tables.setdefault((result["task"], identity, result["protocol"]), table).results[name] = result
    return sorted(tables.values(), key=lambda table: (-len(table.results), table.task, table.data))
