"""Tables of results of several runs: which folders are runs, and which results may be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlp.errors import UserError
from vlp.tasks.metrics import Interval


@dataclass
class Table:
    """Results of one protocol on one data set.

    Args:
        results: Run name -> its newest result, see `vlp.report.results.read_results`.
    """

    task: str
    data: str
    protocol: str
    results: dict[str, dict]

    @property
    def title(self) -> str:
        return f"{self.task}: {self.data}"

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
        return (folder / "experiment.json").is_file() or any(folder.glob("eval/*.json"))

    for folder in folders:
        if not folder.exists():
            raise UserError(f"no folder {folder}; name runs, or a folder of runs")
    found = [
        run for folder in folders for run in ([folder] if is_run(folder) else sorted(filter(is_run, folder.glob("*/"))))
    ]
    if not found:
        raise UserError(f"{folders[0]} is not a run: it has no experiment.json, and no evaluations")
    if len({folder.resolve() for folder in found}) < len(found):
        raise UserError("a run is given twice; name each once")
    return found


def tabulate(results: dict[str, list[dict]]) -> list[Table]:
    """Group results by task, data and protocol. Of several results of a run the newest counts."""
    tables: dict[tuple, Table] = {}
    for name, found in results.items():
        for result in sorted(found, key=lambda r: r["time"]):
            key = result["task"], result["data"], result["protocol"]
            tables.setdefault(key, Table(*key, {})).results[name] = result
    return sorted(tables.values(), key=lambda table: (-len(table.results), table.task, table.data))
