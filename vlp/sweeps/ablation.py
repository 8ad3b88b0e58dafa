"""Several experiments over several seeds, and what each change is worth: ``vlp ablate CONFIG [key=value ...]``.

FOLDER/VARIANT-seed0/ ...   the runs, each an ordinary run folder, or one of stages
FOLDER/table.md, table.json, plot.png
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from vlp.config import Experiment, load_config
from vlp.data.reading.shards import write_atomically
from vlp.errors import UserError
from vlp.report.run import png
from vlp.specs.overrides import override
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.sweeps.run_queue import RunQueue, check_same, finished
from vlp.sweeps.stages import Stages
from vlp.training.logging import read_log
from vlp.training.validation import validate

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Ablation:
    """What to compare.

    Args:
        variants: name -> experiment, in the order of the table; usually each adds one thing to the one before. Stages are
            judged by their last one.
        metrics: ``task/metric`` as eval.jsonl has them; the first one is drawn.
        seeds: of each variant; three or more give an interval worth the name.
        output: folder that the ablation's folder is made in.
    """

    name: str
    variants: dict[str, Experiment | Stages]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    output: str = "runs"

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

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
        """Variant -> for every seed what is trained, one after the other."""
        return {
            variant: [_seeded(what, f"{variant}-seed{seed}", str(self.folder), seed) for seed in self.seeds]
            for variant, what in self.variants.items()
        }

    def runs(self) -> dict[str, list[Experiment]]:
        """Variant -> for every seed the run whose evaluation counts."""
        return {variant: [chain[-1] for chain in chains] for variant, chains in self.chains().items()}


def _seeded(what: Experiment | Stages, name: str, output: str, seed: int) -> list[Experiment]:
    if isinstance(what, Experiment):
        return [replace(what, seed=seed, name=name, output=output)]
    stages = {stage: replace(experiment, seed=seed) for stage, experiment in what.stages.items()}
    return Stages(name, stages, output).runs()


def load_ablation(config: str, overrides: list[str]) -> Ablation:
    """Return the ablation of a config, ``FILE.py`` or ``FILE.py:NAME``, with overrides: see `Ablation.overridden`.

    Raises:
        UserError: If there is no such file or function, or it does not return an ablation.
    """
    return load_config(config, Ablation).overridden(overrides)


def ablate(ablation: Ablation, say=print, code: UserCode = NO_CODE) -> bool:
    """Trains what is not trained yet, each run in a process of its own, and writes table and plot after every one.

    Called again it goes on where it was stopped, within a run too.

    Args:
        code: The user's own code that the experiments are made of.

    Returns:
        False if it was asked to stop before its end.

    Raises:
        UserError: if an experiment is not valid, a folder holds another one, or a run fails.
    """
    if not ablation.seeds or not ablation.metrics:
        raise UserError("an ablation needs at least one seed and one metric")
    chains = [chain for each in ablation.chains().values() for chain in each]
    for experiment in (e for chain in chains for e in chain):
        validate(experiment)
        check_same(experiment)
    with RunQueue(code) as series:
        for experiment in (e for chain in chains for e in chain):
            if not finished(experiment):
                say(f"{experiment.folder}")
                if not series.train(experiment):
                    return False
                write(ablation)
    write(ablation)
    return True


def results(ablation: Ablation) -> dict[str, dict[str, list[float]]]:
    """Variant -> metric -> its value at the last step, one for each seed that is done; none where a variant has no such metric."""
    lines = {
        variant: [(read_log(e.folder / "eval.jsonl") or [{}])[-1] for e in experiments if finished(e)]
        for variant, experiments in ablation.runs().items()
    }
    known = {name for each in lines.values() for line in each for name in line if name != "step"}
    if all(lines.values()) and (unknown := [metric for metric in ablation.metrics if metric not in known]):
        raise UserError(f"no variant has a metric {unknown[0]!r}; the evaluations have {', '.join(sorted(known))}")
    return {
        variant: {metric: [line[metric] for line in each if metric in line] for metric in ablation.metrics}
        for variant, each in lines.items()
    }


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval of the mean by Student's t); nan where there are fewer than two values."""
    if len(values) < 2:
        return fmean(values) if values else math.nan, math.nan
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def write(ablation: Ablation) -> None:
    """table.md, table.json and plot.png of what is done so far."""
    found = results(ablation)
    rows = [["variant", "seeds", "minutes", *ablation.metrics], ["---"] * (3 + len(ablation.metrics))]
    for (variant, by_metric), chains in zip(found.items(), ablation.chains().values()):
        cells = [_cell(*interval(by_metric[metric])) for metric in ablation.metrics]
        rows.append([variant, str(max(map(len, by_metric.values()))), _minutes(chains), *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    note = (
        "Mean over seeds, with the half-width of its 95 % interval (Student's t); minutes: of a seed's training steps, "
        "waiting for data included, evaluation not."
    )
    write_atomically(ablation.folder / "table.md", f"{table}\n\n{note}\n".encode())
    write_atomically(ablation.folder / "table.json", json.dumps(found, indent=1).encode())
    write_atomically(ablation.folder / "plot.png", _plot(found, ablation.metrics[0]))


def _minutes(chains: list[list[Experiment]]) -> str:
    """Of training, on average over the seeds that are done."""
    done = [chain for chain in chains if all(map(finished, chain))]
    seconds = [line["seconds"] for chain in done for e in chain for line in read_log(e.folder / "log.jsonl")]
    return f"{sum(seconds) / 60 / len(done):.1f}" if done else ""


def _cell(mean: float, half: float) -> str:
    if math.isnan(mean):
        return ""
    return f"{mean:.1%}" if math.isnan(half) else f"{mean:.1%} ± {100 * half:.1f}"


def _plot(found: dict[str, dict[str, list[float]]], metric: str) -> bytes:
    """Every run as a dot, the mean and its interval over them, a variant a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

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
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel(f"{metric} (dots: seeds; bar: mean and its 95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    return png(figure)
