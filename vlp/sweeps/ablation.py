"""Train variants of an experiment over several seeds and tabulate their metrics: ``vlp ablate CONFIG [key=value ...]``.

FOLDER/VARIANT-seed0/ ...   the runs: ordinary run folders, or folders of stages
FOLDER/table.md, table.json, plot.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from vlp.config import Experiment, load_config
from vlp.errors import UserError
from vlp.files import local_path, read_log, write_atomically
from vlp.report.figures import png
from vlp.report.results import contamination, read_result
from vlp.specs.overrides import override
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.sweeps.run_queue import RunQueue, check_same, is_finished
from vlp.sweeps.stages import Stages
from vlp.training.validation import validate, validate_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Ablation:
    """Variants to compare.

    Args:
        name: Name of the ablation's folder.
        variants: Name -> experiment or stages, in the order of the table. Usually each adds one thing to the one before.
            Stages are compared by their last run.
        metrics: ``task/metric`` as in eval.jsonl. The plot shows the first one.
        seeds: Seeds of each variant. Three or more give a useful confidence interval.
        output: Folder in which the ablation's folder is created.
    """

    name: str
    variants: dict[str, Experiment | Stages]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    output: str = "runs"

    @property
    def folder(self) -> Path:
        return local_path(self.output) / self.name

    def overridden(self, assignments: list[str]) -> Ablation:
        """Return the ablation with each ``dotted.key=value`` applied in turn.

        ``seeds``, ``name`` and ``output`` are fields of the ablation. Every other key is one of all experiments.

        Raises:
            UserError: For an unknown key or a value of a wrong type.
        """
        own = [a for a in assignments if a.partition("=")[0] in ("seeds", "name", "output")]
        rest = [a for a in assignments if a not in own]
        variants = {
            name: variant.overridden(rest) if isinstance(variant, Stages) else override(variant, rest)
            for name, variant in self.variants.items()
        }
        return replace(override(self, own), variants=variants)

    def chains(self) -> dict[str, list[list[Experiment]]]:
        """Return, for each variant and seed, the runs that are trained one after the other."""
        return {
            variant: [_seeded(spec, f"{variant}-seed{seed}", str(self.folder), seed) for seed in self.seeds]
            for variant, spec in self.variants.items()
        }

    def runs(self) -> dict[str, list[Experiment]]:
        """Return, for each variant and seed, the run whose evaluation is tabulated."""
        return {variant: [chain[-1] for chain in chains] for variant, chains in self.chains().items()}


def _seeded(spec: Experiment | Stages, name: str, output: str, seed: int) -> list[Experiment]:
    if isinstance(spec, Experiment):
        return [replace(spec, seed=seed, name=name, output=output)]
    stages = {stage: replace(experiment, seed=seed) for stage, experiment in spec.stages.items()}
    return Stages(name, stages, output).runs()


def load_ablation(config: str, overrides: list[str]) -> Ablation:
    """Return the ablation of a config, ``FILE.py`` or ``FILE.py:NAME``, with overrides: see `Ablation.overridden`.

    Raises:
        UserError: If there is no such file or function, or it does not return an ablation.
    """
    return load_config(config, Ablation).overridden(overrides)


def ablate(ablation: Ablation, log: Callable[[str], None] = print, code: UserCode = NO_CODE) -> bool:
    """Train the runs that are not finished, each in its own process, and write table and plot after each of them.

    Called again it continues where it was stopped, also within a run.

    Args:
        ablation: The variants.
        log: Receives the folder of each run before it is trained.
        code: The user's own code that the experiments are made of.

    Returns:
        False if it was asked to stop before the end.

    Raises:
        UserError: If an experiment is not valid, a folder contains another one, or a run fails.
    """
    if not ablation.seeds or not ablation.metrics:
        raise UserError("an ablation needs at least one seed and one metric")
    experiments = [e for chains in ablation.chains().values() for chain in chains for e in chain]
    for experiment in experiments:
        validate(experiment)
        check_same(experiment)
        if not is_finished(experiment):
            validate_tasks(experiment)
    with RunQueue(code) as queue:
        for experiment in experiments:
            if not is_finished(experiment):
                log(f"{experiment.folder}")
                if not queue.train(experiment):
                    return False
                write_tables(ablation)
    write_tables(ablation)
    return True


def read_results(ablation: Ablation) -> dict[str, dict[str, list[float]]]:
    """Return variant -> metric -> its value at the last step of each finished seed.

    The list is empty for a metric that a variant does not measure.

    Raises:
        UserError: If no variant measures one of the metrics.
    """
    lines = {
        variant: [(read_log(e.folder / "eval.jsonl") or [{}])[-1] for e in experiments if is_finished(e)]
        for variant, experiments in ablation.runs().items()
    }
    known = {name for each in lines.values() for line in each for name in line if name != "step"}
    if all(lines.values()) and (unknown := [metric for metric in ablation.metrics if metric not in known]):
        raise UserError(f"no variant has a metric {unknown[0]!r}; the evaluations have {', '.join(sorted(known))}")
    return {
        variant: {metric: [line[metric] for line in each if metric in line] for metric in ablation.metrics}
        for variant, each in lines.items()
    }


def confidence_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % confidence interval by Student's t.

    The half-width of fewer than two values is nan, and so is the mean of no values.
    """
    if len(values) < 2:
        return fmean(values) if values else math.nan, math.nan
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def write_tables(ablation: Ablation) -> None:
    """Write table.md, table.json and plot.png of the finished runs."""
    results = read_results(ablation)
    rows = [["variant", "seeds", "minutes", *ablation.metrics], ["---"] * (3 + len(ablation.metrics))]
    for (variant, by_metric), chains in zip(results.items(), ablation.chains().values()):
        cells = [_cell(*confidence_interval(by_metric[metric])) for metric in ablation.metrics]
        rows.append([variant, str(max(map(len, by_metric.values()))), _minutes(chains), *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    note = (
        "Mean over seeds, with the half-width of its 95 % interval (Student's t). Minutes are those of one seed's training "
        "steps, with the wait for data and without evaluation."
    )
    parts = [table, note, *_contamination(ablation)]
    write_atomically(ablation.folder / "table.md", ("\n\n".join(parts) + "\n").encode())
    write_atomically(ablation.folder / "table.json", json.dumps(results, indent=1).encode())
    first = ablation.metrics[0]
    figure = draw({variant: by_metric[first] for variant, by_metric in results.items()}, first)
    write_atomically(ablation.folder / "plot.png", png(figure))


def _contamination(ablation: Ablation) -> list[str]:
    """Return a sentence for each task of the metrics that evaluated training images."""
    folders = [e.folder for experiments in ablation.runs().values() for e in experiments if is_finished(e)]
    found = {}
    for task in dict.fromkeys(metric.partition("/")[0] for metric in ablation.metrics):
        for folder in folders:
            with suppress(UserError):
                result = read_result(folder / "eval" / f"{task}.json", [])
                if result["trained_on"]:
                    found[task] = f"{task}: {contamination(result)}"
    return list(found.values())


def _minutes(chains: list[list[Experiment]]) -> str:
    """Return the mean training time of the finished seeds."""
    done = [chain for chain in chains if all(map(is_finished, chain))]
    seconds = [line["seconds"] for chain in done for e in chain for line in read_log(e.folder / "log.jsonl")]
    return f"{sum(seconds) / 60 / len(done):.1f}" if done else ""


def _cell(mean: float, half_width: float) -> str:
    if math.isnan(mean):
        return ""
    return f"{mean:.1%}" if math.isnan(half_width) else f"{mean:.1%} ± {100 * half_width:.1f}"


def draw(results: dict[str, list[float]], metric: str) -> Figure:
    """Draw one row for each variant: a dot for each seed, and their mean with its interval.

    Args:
        results: Variant -> value of each seed.
        metric: Name of the metric.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 0.55 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(results.values()):
        mean, half_width = confidence_interval(values)
        axes.plot(values, [row] * len(values), "o", color="#9aa5b1", markersize=5)
        if not math.isnan(mean):
            error = None if math.isnan(half_width) else [half_width]
            axes.errorbar([mean], [row], xerr=error, fmt="D", color="#1f5fa8", capsize=4)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel(f"{metric} (dots: seeds; bar: mean and its 95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    return figure
