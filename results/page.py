"""Render all records to docs/results.md."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from results.record import Evaluation, Record, Run, read_record
from vlp.files import write_atomically
from vlp.report.figures import png
from vlp.report.results import contamination, metric_label
from vlp.sweeps.ablation import confidence_interval, draw
from vlp.tasks.metrics import Interval

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/results.md"
HEADINGS = {  # folder of the config -> heading, in the order of the page
    "clip": "CLIP",
    "align": "ALIGN",
    "siglip": "SigLIP",
    "albef": "ALBEF",
    "vlmo": "VLMo",
    "simclr": "SimCLR",
    "moco": "MoCo",
    "instance": "Instance discrimination",
    "two_views": "DCL, VICReg, Barlow Twins and BYOL",
    "pairwise": "Pairs, triplets and tuplets",
    "mim": "Masked image modelling",
    "imagenet": "Image classification",
    "mlm": "Masked language modelling",
    "simcse": "SimCSE",
    "esimcse": "ESimCSE",
    "cutoff": "Cutoff",
    "cert": "CERT",
}
OTHER = "Other"
INTRODUCTION = """# Results

This page is written by `make results` from the records in `results/`, and [Evaluation](evaluation.md#recording-a-result) says how a result
is recorded. Intervals are 95 %: of one run by a bootstrap over its evaluated samples, as *low to high*; of several seeds by Student's t, as
*mean ± half-width*. Minutes are those of training steps, with the wait for data and without evaluations."""


def read_records(root: Path = ROOT) -> dict[str, Record]:
    """Return the records of a checkout by name."""
    return {path.stem: read_record(path) for path in sorted((root / "results").glob("*.json"))}


def read_by_hand(root: Path = ROOT) -> str:
    return (root / "results" / "by_hand.md").read_text()


def figure_path(name: str, root: Path = ROOT) -> Path:
    return root / "docs" / "figures" / f"{name}.png"


def render(records: dict[str, Record], by_hand: str) -> str:
    """Return the page.

    Args:
        records: Name -> record.
        by_hand: Results from before there were records.
    """
    parts = [INTRODUCTION]
    for heading in [*HEADINGS.values(), OTHER]:
        of_method = {name: record for name, record in records.items() if heading_of(record) == heading}
        if of_method:
            parts += [f"## {heading}", *(section(name, record) for name, record in of_method.items())]
    return "\n\n".join([*parts, by_hand.strip()]) + "\n"


def heading_of(record: Record) -> str:
    found = re.match(r"configs/(\w+)/", record.config)
    return HEADINGS.get(found[1], OTHER) if found else OTHER


def section(name: str, record: Record) -> str:
    """Return the part of the page about one record."""
    parts = [f'<a id="{name}"></a>', f"### {record.title}", table(record)]
    if record.note:
        parts.append(record.note)
    if has_figure(record):
        parts.append(f"![{_figure_text(record)}](figures/{name}.png)")
    parts += ["\n".join(f"- {fact}" for fact in facts(record)), "\n".join(["```bash", *record.commands, "```"])]
    return "\n\n".join(parts)


def table(record: Record) -> str:
    """Return the numbers: variants as rows, or the metrics of a single variant as rows."""
    if len(record.variants) > 1:
        rows = [["variant", "seeds", "minutes", *map(_label, record.metrics)]]
        for variant, runs in record.variants.items():
            cells = [_summary([run.metric(metric) for run in runs]) for metric in record.metrics]
            rows.append([variant, str(len(runs)), _range([run.minutes for run in runs]), *cells])
        return _markdown(rows)
    (runs,) = record.variants.values()
    by_metric = {metric: [run.metric(metric) for run in runs] for metric in record.metrics}
    if len(runs) == 1:
        rows = [["metric", "value", "95 % interval"]]
        for metric, (interval,) in by_metric.items():
            value, low, high = _texts(interval)
            rows.append([_label(metric), value, f"{low} to {high}"])
        return _markdown(rows)
    rows = [["metric", "mean over seeds", *(f"seed {run.seed}" for run in runs)]]
    rows += [[_label(m), _summary(each), *(_texts(interval)[0] for interval in each)] for m, each in by_metric.items()]
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    lines = [
        " | ".join(cell.replace("|", "\\|") for cell in row) for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _label(metric: str) -> str:
    evaluation, _, name = metric.partition("/")
    return f"{evaluation}: {metric_label(name)}"


def _texts(interval: Interval) -> tuple[str, ...]:
    return tuple(text.replace("%", " %") for text in interval.texts())


def _summary(intervals: list[Interval | None]) -> str:
    """Return the mean over seeds with its interval, or the value of a single run with that of its bootstrap."""
    found = [interval for interval in intervals if interval]
    if not found:
        return "-"
    if len(found) == 1:
        value, low, high = _texts(found[0])
        return f"{value} ({low} to {high})"
    mean, half_width = confidence_interval([interval.value for interval in found])
    value, spread, _ = _texts(Interval(mean, half_width, math.nan, found[0].percent))
    return f"{value} ± {spread.removesuffix(' %')}"


def _range(numbers: Iterable[float]) -> str:
    """Return the smallest and the largest of numbers with one decimal."""
    shown = sorted({f"{number:,.1f}" for number in numbers}, key=lambda text: float(text.replace(",", "")))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def facts(record: Record) -> list[str]:
    """Return a line for the training, the code and each evaluation."""
    runs = [run for of_variant in record.variants.values() for run in of_variant]
    found = [_training(runs), _code(runs)]
    for key in dict.fromkeys(metric.partition("/")[0] for metric in record.metrics):
        described = [_evaluation(key, run) for run in runs if key in run.evaluations]
        found += dict.fromkeys(described)  # once, unless a variant is evaluated in another way
    return found


def _training(runs: list[Run]) -> str:
    steps = dict.fromkeys(f"{run.steps:,}" for run in runs)
    minutes = "" if len(runs) > 1 and len(steps) > 1 else f" in {_range(run.minutes for run in runs)} minutes"
    processes = dict.fromkeys(
        f"{run.processes} process{'es' * (run.processes > 1)}" + (f" of {run.threads} threads" if run.threads else "")
        for run in runs
    )
    machines = "; ".join(dict.fromkeys(run.machine for run in runs))
    seeds = list(dict.fromkeys(str(run.seed) for run in runs))
    of_seeds = f"Seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds: {', '.join(seeds)}"
    return f"Training: {' or '.join(steps)} steps{minutes}, {' or '.join(processes)}, {machines}. {of_seeds}."


def _code(runs: list[Run]) -> str:
    versions = " and ".join(dict.fromkeys(run.vlp for run in runs))
    commits = ", ".join(dict.fromkeys(_commit(commit) for run in runs for commit in run.commits))
    return f"Code: vlp {versions}, {commits}."


def _commit(commit: str) -> str:
    if not commit:
        return "commit not recorded"
    sha, changed, _ = commit.partition("+changes")
    return f"commit {sha[:12]}" + (" **with changes that are not committed**" if changed else "")


def _evaluation(key: str, run: Run) -> str:
    found: Evaluation = run.evaluations[key]
    counts = ", ".join(f"{n:,} {name}" for name, n in found.n.items())
    chance = f" A random answer is correct in {100 / found.choices:.2f} %." if found.choices else ""
    seen = contamination({"trained_on": found.trained_on, "n": found.n})
    blind = (
        " Blind: the same with the images of other samples."
        if any(m.startswith("blind_") for m in found.metrics)
        else ""
    )
    step = f" Weights of step {found.step:,}." if found.step not in (None, run.steps) else ""
    return f"{key}: {found.data}, {counts}; {found.protocol}.{chance}{blind}{step}{f' {seen}' if seen else ''}"


def has_figure(record: Record) -> bool:
    return bool(_curves(record)) or (
        len(record.variants) > 1 and any(len(runs) > 1 for runs in record.variants.values())
    )


def _curves(record: Record) -> list[str]:
    runs = next(iter(record.variants.values()))
    return list(runs[0].curves)


def _figure_text(record: Record) -> str:
    if curves := _curves(record):
        return f"{', '.join(curves)} over the steps"
    return f"{_label(record.metrics[0])} of each variant, with its interval over seeds"


def draw_figure(record: Record) -> bytes:
    """Return the curves of a record over the steps, or the first metric of each variant, as PNG with `digest` inside."""
    from matplotlib.figure import Figure

    curves = _curves(record)
    if not curves:
        values = {
            variant: [interval.value for run in runs if (interval := run.metric(record.metrics[0]))]
            for variant, runs in record.variants.items()
        }
        return png(draw(values, _label(record.metrics[0])), Description=digest(record))
    figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
    for name, axes in zip(curves, figure.subplots(1, len(curves), squeeze=False)[0]):
        for number, (variant, runs) in enumerate(record.variants.items()):
            for run in runs:
                label = variant if run is runs[0] else None
                axes.plot(*zip(*run.curves[name]), color=f"C{number}", label=label, marker=".", linewidth=1)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    if len(record.variants) > 1:
        axes.legend(fontsize=8)
    return png(figure, Description=digest(record))


def digest(record: Record) -> str:
    """Return the SHA-256 of a record, by which a figure names the record that it draws."""
    return hashlib.sha256(record.dump().encode()).hexdigest()


def write_page(root: Path = ROOT) -> None:
    """Write the page, and the figures of records that have none or were changed."""
    records = read_records(root)
    for name, record in records.items():
        path = figure_path(name, root)
        if has_figure(record) and not (path.exists() and digest(record).encode() in path.read_bytes()):
            write_atomically(path, draw_figure(record))
    write_atomically(root / PAGE, render(records, read_by_hand(root)).encode())
