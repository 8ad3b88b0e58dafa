"""The record of one result: what was measured, by which commands, at which commit, on which machine."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from vlp.commands.configs import Entry, read_entries
from vlp.config import Experiment, changed_keys, load_without_code
from vlp.errors import UserError
from vlp.files import read_log
from vlp.report.results import read_numbers, read_result
from vlp.tasks.metrics import Interval
from vlp.tasks.naming import data_name
from vlp.training.logging import is_evaluated

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
OF_SEED = re.compile(r"(.+)-seed\d+")  # name of a run folder of `vlp ablate`
TRAINS = re.compile(r"vlp (train|ablate) |accelerate |make ")
POINTS = 100  # of a curve, at most
Chain = list[Path]  # run folders that were trained one after the other; the last one is evaluated


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run: see `vlp.tasks.base.Result`.

    Args:
        metrics: The recorded metrics by name, those of the evaluation with other samples' images as ``blind_METRIC``.
    """

    task: str
    data: str
    protocol: str
    n: dict[str, int]
    choices: int | None
    trained_on: int | None
    step: int | None
    metrics: dict[str, Interval]


@dataclass(frozen=True)
class Run:
    """One seed.

    Args:
        seed: Seed of the experiment.
        steps: Optimizer steps, over all stages.
        minutes: Duration of all training steps, with the wait for data and without evaluations.
        processes: Number of processes.
        threads: CPU threads of each process, None if the run did not record it.
        machine: Processor, GPU and version of torch.
        vlp: Version of vlp.
        commits: Each commit that trained a part of the run, with ``+changes`` if files differed from it. An empty one was not
            recorded.
        evaluations: Name of the result file -> evaluation.
        curves: Name in eval.jsonl or log.jsonl -> (step, value).
    """

    seed: int
    steps: int
    minutes: float
    processes: int
    threads: int | None
    machine: str
    vlp: str
    commits: tuple[str, ...]
    evaluations: dict[str, Evaluation]
    curves: dict[str, list[tuple[int, float]]]

    def metric(self, name: str) -> Interval | None:
        """Return the metric ``EVALUATION/METRIC``, None if it was not measured."""
        evaluation, _, metric = name.partition("/")
        found = self.evaluations.get(evaluation)
        return found.metrics.get(metric) if found else None


@dataclass(frozen=True)
class Record:
    """A result that the page shows.

    Args:
        title: What was trained on what, for a reader.
        commands: Commands that repeat the result, in order.
        variants: Name -> its runs, which differ in nothing but the seed. A record of one variant names it "".
        metrics: ``EVALUATION/METRIC`` in the order of the table.
        note: Remark for the reader: what the numbers do not say.
    """

    title: str
    commands: tuple[str, ...]
    variants: dict[str, tuple[Run, ...]]
    metrics: tuple[str, ...]
    note: str = ""

    @property
    def config(self) -> str:
        """Config of the first training command, ``FILE.py`` or ``FILE.py:NAME``. Empty without one."""
        return next(filter(None, map(_config_of, self.commands)), "")

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_record(path: Path) -> Record:
    """Read the record that `Record.dump` wrote."""
    plain = json.loads(path.read_text())
    variants = {name: tuple(map(_read_run, runs)) for name, runs in plain["variants"].items()}
    lists = {name: tuple(plain[name]) for name in ("commands", "metrics")}
    return Record(**plain | lists | {"variants": variants})


def _read_run(plain: dict[str, Any]) -> Run:
    evaluations = {
        name: Evaluation(**given | {"metrics": {m: Interval(**i) for m, i in given["metrics"].items()}})
        for name, given in plain["evaluations"].items()
    }
    curves = {name: [(step, value) for step, value in points] for name, points in plain["curves"].items()}
    return Run(**plain | {"evaluations": evaluations, "curves": curves, "commits": tuple(plain["commits"])})


def make_record(
    folders: Sequence[Path],
    title: str = "",
    metrics: Sequence[str] = (),
    curves: Sequence[str] = (),
    commands: Sequence[str] = (),
    note: str = "",
    warn: Callable[[str], None] = print,
) -> Record:
    """Make the record of finished runs.

    Args:
        folders: Runs of one experiment with different seeds, or the folder of an ablation.
        title: Title. The default is the first sentence of the config's docstring.
        metrics: ``EVALUATION/METRIC``, where an evaluation is the name of a file in RUN/eval. The default is the metrics of
            the ablation, or all.
        curves: Names of numbers of eval.jsonl or log.jsonl to record over the steps.
        commands: Commands that repeat the result. The default is those that the runs and their evaluations name, after the
            commands of the config's docstring that prepare the data.
        note: Remark for the reader.
        warn: Receives a line for each fact that the runs did not record.

    Raises:
        UserError: If a run is not finished or lacks a metric, or runs of one variant differ in more than the seed.
    """
    variants = find_variants(folders)
    for chains in variants.values():
        check_seeds(chains)
    runs = {name: tuple(read_run(chain, curves) for chain in chains) for name, chains in variants.items()}
    every = [run for of_variant in runs.values() for run in of_variant]
    metrics = tuple(metrics or metrics_of_ablation(folders[0]) or all_metrics(every))
    if unknown := [name for name in metrics if not any(run.metric(name) for run in every)]:
        raise UserError(
            f"no run measured {unknown[0]}; the runs have {', '.join(all_metrics(every)) or 'no evaluation'}"
        )
    for of_variant, chains in zip(runs.values(), variants.values()):
        check_metrics(of_variant, chains, metrics)
    if bad := [commit for run in every for commit in run.commits if not commit or commit.endswith("+changes")]:
        warn(f"{len(bad)} of the commits are unknown, or had changes of vlp or configs that are not committed")
    kept = {name: tuple(select(run, metrics) for run in of_variant) for name, of_variant in runs.items()}
    if not commands:
        evaluations = {name.partition("/")[0] for name in metrics}
        commands = commands_of([chain for chains in variants.values() for chain in chains], evaluations, warn)
    record = Record(title, tuple(commands), kept, metrics, note)
    if title:
        return record
    entry = _entry(record.config)
    if entry is None:
        raise UserError("the runs do not come from a config of this repository; give --title TEXT")
    return replace(record, title=entry.summary.removesuffix("."))


def find_variants(folders: Sequence[Path]) -> dict[str, list[Chain]]:
    """Return the run folders of each seed of each variant.

    Raises:
        UserError: If a folder is neither a run nor the folder of an ablation.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; name run folders, or the folder of an ablation")
    if all(_is_run(folder) for folder in folders):
        return {"": [[folder] for folder in folders]}
    variants: dict[str, list[Chain]] = {}
    for folder in sorted(folders[0].iterdir()) if len(folders) == 1 else ():
        stages = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.glob("*/")))
        if stages and (found := OF_SEED.fullmatch(folder.name)):
            variants.setdefault(found[1], []).append(stages)
    if not variants:
        raise UserError(f"{folders[0]} is neither a run nor the folder of an ablation; name runs of one experiment")
    order = list(_table(folders[0]))
    return dict(sorted(variants.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _is_run(folder: Path) -> bool:
    return (folder / "experiment.json").is_file()


def _table(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return the table of an ablation: variant -> metric -> value of each seed. Empty for another folder."""
    path = folder / "table.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def metrics_of_ablation(folder: Path) -> list[str]:
    return list(dict.fromkeys(metric for by_metric in _table(folder).values() for metric in by_metric))


def all_metrics(runs: Sequence[Run]) -> list[str]:
    names = (f"{name}/{metric}" for run in runs for name, found in run.evaluations.items() for metric in found.metrics)
    return list(dict.fromkeys(names))


def check_seeds(chains: list[Chain]) -> None:
    """Check that the runs of a variant differ in their seed and in nothing else.

    Raises:
        UserError: If they do not.
    """
    first = [load_without_code(folder / "experiment.json") for folder in chains[0]]
    seeds = {first[-1].seed: chains[0][-1]}
    for chain in chains[1:]:
        experiments = [load_without_code(folder / "experiment.json") for folder in chain]
        changed = [key for a, b in zip(first, experiments) for key in _changed(a, b)]
        if changed or len(first) != len(experiments):
            raise UserError(
                f"{chain[-1]} and {chains[0][-1]} differ in {', '.join(changed[:5]) or 'their stages'}; name runs that "
                f"differ only in the seed, or the folder of an ablation"
            )
        if (same := seeds.setdefault(experiments[-1].seed, chain[-1])) != chain[-1]:
            raise UserError(f"{chain[-1]} and {same} have the same seed {experiments[-1].seed}; name one of them")


def _changed(a: Experiment, b: Experiment) -> list[str]:
    """Return the keys other than the seed that differ. A stage starts from the stage before of the same seed."""
    keys = [key for key in changed_keys(a, b) if key != "seed"]
    weights = [re.sub(r"-seed\d+", "", str(vars(e.model).get("weights"))) for e in (a, b)]
    return [key for key in keys if key != "model.weights" or weights[0] != weights[1]]


def check_metrics(runs: Sequence[Run], chains: list[Chain], metrics: Sequence[str]) -> None:
    """Check that all seeds have the same metrics, measured by the same protocol on equally many samples.

    Raises:
        UserError: If they do not.
    """
    for name in metrics:
        having = [run for run in runs if run.metric(name)]
        for run, chain in zip(runs, chains):
            if having and run not in having:
                raise UserError(f"{chain[-1]} has no {name}, which other seeds have; evaluate it, or choose --metrics")
        key = name.partition("/")[0]
        measured = [(found.protocol, found.n) for found in (run.evaluations[key] for run in having)]
        if any(other != measured[0] for other in measured):
            raise UserError(f"{name} was not measured in the same way for every seed; evaluate the runs again")


def read_run(chain: Chain, curves: Sequence[str] = ()) -> Run:
    """Read one seed.

    Raises:
        UserError: If a run is not finished, an evaluation is damaged, or a curve was not logged.
    """
    starts = []
    steps, seconds = 0, 0.0
    for folder in chain:
        log, of_run = read_numbers(folder / "log.jsonl"), read_log(folder / "starts.jsonl")
        experiment = load_without_code(folder / "experiment.json")
        total = of_run[-1]["total_steps"] if of_run else None
        if not log or log[-1]["step"] != total or (experiment.evaluate and not is_evaluated(folder, total)):
            raise UserError(f"{folder} is not finished; continue it with: vlp train --resume {folder}")
        starts += of_run
        steps += total
        seconds += sum(line["seconds"] for line in log)
    folder, last = chain[-1], starts[-1]
    return Run(
        seed=experiment.seed,
        steps=steps,
        minutes=round(seconds / 60, 2),
        processes=last["processes"],
        threads=last.get("threads"),
        machine=last["machine"],
        vlp=last["vlp"],
        commits=tuple(dict.fromkeys(start.get("commit", "") for start in starts)),
        evaluations={path.stem: _read_evaluation(path) for path in sorted((folder / "eval").glob("*.json"))},
        curves={name: _read_curve(folder, name) for name in curves},
    )


def _read_evaluation(path: Path) -> Evaluation:
    result = read_result(path, [])
    data = " + ".join(_shown_path(part) or data_name(part) for part in result["data"].split("::"))
    if result["split"]:
        data += f", split {result['split']}"
    metrics = result["metrics"] | {f"blind_{name}": interval for name, interval in result["blind"].items()}
    same = ("task", "protocol", "n", "choices", "trained_on", "step")
    return Evaluation(data=data, metrics=metrics, **{name: result[name] for name in same})


def _shown_path(path: str) -> str | None:
    """Return the path as any reader can have it, relative to the current folder. None for one outside of it."""
    if not os.path.isabs(path):
        return path
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else None


def _read_curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value), as the mean of windows if there are more than `POINTS` steps."""
    for file in ("eval.jsonl", "log.jsonl"):
        points = [(int(line["step"]), line[name]) for line in read_numbers(folder / file) if name in line]
        if points:
            width = -(-len(points) // POINTS)
            windows = [points[start : start + width] for start in range(0, len(points), width)]
            return [(window[-1][0], fmean(value for _, value in window)) for window in windows]
    raise UserError(f"{folder} has no number {name} in eval.jsonl or log.jsonl; see its log for the names")


def select(run: Run, metrics: Sequence[str]) -> Run:
    """Return the run with only these metrics."""
    kept: dict[str, Evaluation] = {}
    for name in metrics:
        key, _, metric = name.partition("/")
        if interval := run.metric(name):
            evaluation = kept.get(key) or replace(run.evaluations[key], metrics={})
            kept[key] = replace(evaluation, metrics=evaluation.metrics | {metric: interval})
    return replace(run, evaluations=kept)


def commands_of(chains: list[Chain], evaluations: set[str], warn: Callable[[str], None]) -> list[str]:
    """Return the commands that prepare the data, and those that trained and evaluated the runs, in order.

    Args:
        evaluations: Names of the files in RUN/eval whose commands are returned.
        warn: Receives a line if an evaluation does not name its command.

    Raises:
        UserError: If a command names a path that only this machine has.
    """
    folders = [folder for chain in chains for folder in chain]
    starts = [start for folder in folders for start in read_log(folder / "starts.jsonl")]
    paths = [path for chain in chains for path in (chain[-1] / "eval").glob("*.json") if path.stem in evaluations]
    results = sorted((json.loads(path.read_text()) for path in paths), key=lambda result: result["time"])
    if any("command" not in result for result in results):
        warn("some evaluations do not name their command; give them by --commands LINE ... unless training made them")
    typed = [made["command"] for made in [*starts, *results] if "command" in made]
    lines = list(dict.fromkeys(_shown(words) for words in typed if "--resume" not in words))
    entry = _entry(next(filter(None, map(_config_of, lines)), ""))
    prepared = takewhile(lambda line: not TRAINS.match(line), entry.sections.get("Command", [])) if entry else ()
    return [*prepared, *lines]


def _shown(words: list[str]) -> str:
    """Return a command as anybody can type it in the checkout."""
    root = f"{Path.cwd()}/"
    words = [word.replace(root, "") for word in words]
    if outside := [word for word in words if re.search(r"(^|[=,])[/~]", word)]:
        raise UserError(
            f"a command names {outside[0]}, which only this machine has; give what others type by --commands LINE ..."
        )
    return shlex.join(words)


def _config_of(command: str) -> str | None:
    found = re.search(r"(?:vlp|vlp\.cli) (?:train|ablate) (\S+\.py\S*)|vlp\.train (\S+\.py\S*)", command)
    return found and (found[1] or found[2])


def _entry(config: str) -> Entry | None:
    """Return the docstring of a config of this repository."""
    path = Path(config.partition(":")[0])
    entries = read_entries(path.resolve()) if config and path.is_file() else ()
    return next((entry for entry in entries if entry.config == config), None)
