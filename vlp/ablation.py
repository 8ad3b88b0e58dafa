"""Several experiments over several seeds, and what each change is worth: ``vlp ablate CONFIG [key=value ...]``.

FOLDER/VARIANT-seed0/ ...   the runs, each an ordinary run folder
FOLDER/table.md, table.json, plot.png
"""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from vlp import checkpoint
from vlp.config import Experiment, changed_keys, dump, load_json, override
from vlp.data.shards import write_atomically
from vlp.errors import UserError
from vlp.logging import read_log
from vlp.report import png
from vlp.validation import validate

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Ablation:
    """What to compare.

    Args:
        variants: name -> experiment, in the order of the table; usually each adds one thing to the one before.
        metrics: ``task/metric`` as eval.jsonl has them; the first one is drawn.
        seeds: of each variant; three or more give an interval worth the name.
        output: folder that the ablation's folder is made in.
    """

    name: str
    variants: dict[str, Experiment]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    output: str = "runs"

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def runs(self) -> dict[str, list[Experiment]]:
        """Variant -> its experiment for every seed."""
        return {
            variant: [
                replace(experiment, seed=seed, name=f"{variant}-seed{seed}", output=str(self.folder))
                for seed in self.seeds
            ]
            for variant, experiment in self.variants.items()
        }


def load_ablation(path: str, overrides: list[str]) -> Ablation:
    """The ablation of a Python file with ``def config() -> Ablation``.

    Args:
        overrides: ``seeds=0,1``, ``name=...`` and ``output=...`` are of the ablation, every other key of all experiments.

    Raises:
        UserError: if there is no such file, or it holds no ablation.
    """
    if not Path(path).is_file():
        raise UserError(f"no config file {path}; configs/albef/table1.py is an ablation")
    try:
        config = runpy.run_path(path).get("config")
    except (SyntaxError, ImportError) as e:
        raise UserError(f"{path}: {e}") from None
    ablation = config() if callable(config) else None
    if not isinstance(ablation, Ablation):
        raise UserError(f"config() of {path} must return a vlp.ablation.Ablation; to train one run use vlp train")
    own = [o for o in overrides if o.partition("=")[0] in ("seeds", "name", "output")]
    rest = [o for o in overrides if o not in own]
    ablation = override(ablation, own)
    return replace(ablation, variants={name: override(e, rest) for name, e in ablation.variants.items()})


def ablate(ablation: Ablation, say=print) -> None:
    """Trains what is not trained yet, each run in a process of its own, and writes table and plot after every one.

    Called again it goes on where it was stopped, within a run too.

    Raises:
        UserError: if an experiment is not valid, a folder holds another one, or a run fails.
    """
    if not ablation.seeds or not ablation.metrics:
        raise UserError("an ablation needs at least one seed and one metric")
    runs = ablation.runs()
    for experiment in (e for each in runs.values() for e in each):
        validate(experiment)
        _check_same(experiment)
    ablation.folder.mkdir(parents=True, exist_ok=True)
    for experiment in (e for each in runs.values() for e in each):
        if not (experiment.folder / "eval.jsonl").exists() or not _finished(experiment):
            say(f"{experiment.folder}")
            _train(experiment)
            write(ablation)
    write(ablation)


def _check_same(experiment: Experiment) -> None:
    saved = experiment.folder / "experiment.json"
    if saved.exists() and (changed := changed_keys(load_json(saved), experiment.resolved())):
        raise UserError(
            f"{experiment.folder} was started with other values of {', '.join(changed[:5])}; give another name=..., or "
            f"remove the folder"
        )


def _finished(experiment: Experiment) -> bool:
    """Whether the newest evaluation is that of the last step."""
    steps = [line["step"] for line in read_log(experiment.folder / "eval.jsonl")]
    logged = [line["step"] for line in read_log(experiment.folder / "log.jsonl")]
    total = experiment.train.steps
    return bool(steps) and steps[-1] == (total if total is not None else max(logged, default=-1))


def _train(experiment: Experiment) -> None:
    """In a process of its own: an engine is set up once in a process."""
    begun = (experiment.folder / "experiment.json").exists() and checkpoint.all_steps(experiment.folder / "checkpoints")
    if begun:
        arguments = ["--resume", str(experiment.folder)]
    else:
        written = experiment.folder.with_suffix(".json")
        write_atomically(written, dump(experiment).encode())
        arguments = [str(written)]
        # one that died before its first checkpoint has nothing to lose
        (experiment.folder / "experiment.json").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "vlp.train", *arguments])
    if done.returncode:
        raise UserError(f"{experiment.folder} ended with exit code {done.returncode}; run the command again to go on")
    if not _finished(experiment):
        raise UserError(f"{experiment.folder} was interrupted; run the command again to go on")


def results(ablation: Ablation) -> dict[str, dict[str, list[float]]]:
    """Variant -> metric -> its value at the last step, one for each seed that is done."""
    found: dict[str, dict[str, list[float]]] = {}
    for variant, experiments in ablation.runs().items():
        lines = [read_log(e.folder / "eval.jsonl")[-1] for e in experiments if _finished(e)]
        for metric in ablation.metrics:
            if lines and metric not in lines[0]:
                known = ", ".join(k for k in lines[0] if k != "step")
                raise UserError(f"{variant} has no metric {metric!r}; its evaluations have {known}")
        found[variant] = {metric: [line[metric] for line in lines] for metric in ablation.metrics}
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval of the mean by Student's t); nan where there are fewer than two values."""
    if len(values) < 2:
        return fmean(values) if values else math.nan, math.nan
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def write(ablation: Ablation) -> None:
    """table.md, table.json and plot.png of what is done so far."""
    found = results(ablation)
    rows = [["variant", "seeds", *ablation.metrics], ["---"] * (2 + len(ablation.metrics))]
    for variant, by_metric in found.items():
        cells = [_cell(*interval(by_metric[metric])) for metric in ablation.metrics]
        rows.append([variant, str(len(by_metric[ablation.metrics[0]])), *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    note = "Mean over seeds, with the half-width of its 95 % interval (Student's t)."
    write_atomically(ablation.folder / "table.md", f"{table}\n\n{note}\n".encode())
    write_atomically(ablation.folder / "table.json", json.dumps(found, indent=1).encode())
    write_atomically(ablation.folder / "plot.png", _plot(found, ablation.metrics[0]))


def _cell(mean: float, half: float) -> str:
    if math.isnan(mean):
        return ""
    return f"{mean:.1%}" if math.isnan(half) else f"{mean:.1%} ± {100 * half:.1f}"


def _plot(found: dict[str, dict[str, list[float]]], metric: str) -> bytes:
    """Every run as a dot, the mean and its interval over them, a variant a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.55 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(v[metric] for v in found.values()):
        mean, half = interval(values)
        axes.plot(values, [place] * len(values), "o", color="#9aa5b1", markersize=5)
        if not math.isnan(mean):
            axes.errorbar(
                [mean], [place], xerr=None if math.isnan(half) else [half], fmt="D", color="#1f5fa8", capsize=4
            )
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(f"{metric} (dots: seeds; bar: mean and its 95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    return png(figure)
