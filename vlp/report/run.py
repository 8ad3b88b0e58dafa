"""RUN/report.html: one self-contained file with the metrics and their intervals, curves, retrieval examples and the commands."""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jinja2 import Environment

from vlp.config import Data, Experiment, load_without_code
from vlp.errors import UserError
from vlp.files import read_log
from vlp.report.examples import MACROS, captions_with_images, wrong_with_images
from vlp.report.examples import STYLE as EXAMPLES_STYLE
from vlp.report.figures import label as plain_label
from vlp.report.figures import png
from vlp.report.results import (
    contamination,
    metric_label,
    read_chance,
    read_numbers,
    read_results,
    read_starts,
    write_html,
)
from vlp.report.tables import asked, described
from vlp.specs.json import Foreign
from vlp.specs.types import check_types
from vlp.tasks.base import Task

MAX_LINES = 20  # of a plot
STYLE = """
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
 h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .quiet { color: #5b6570 }
 table { border-collapse: collapse } td, th { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #dde2e7 }
 td:first-child, th:first-child { text-align: left } pre { background: #f4f6f8; padding: .8rem; overflow-x: auto }
 img.plot { width: 100% }
"""
TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    MACROS
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>{{ style|safe }}
{{ examples|safe }}
</style></head><body>
<h1>{{ name }}</h1><p class="quiet">{{ summary }}</p>
{% for result in results %}
<h2>{{ asked(result) }}: {{ described(result.data, result.split) }}</h2>
<table><tr><th>metric</th><th>value</th><th>95 % interval</th>{% if result.blind %}<th>blind</th>{% endif %}</tr>
{% for metric, i in result.metrics.items() %}
<tr><td>{{ label(metric) }}</td>{% with value, low, high = i.texts() %}<td>{{ value }}</td><td>{{ low }} to {{ high }}</td>{% endwith %}{% if result.blind %}<td>{{ result.blind.get(metric, "") }}</td>{% endif %}</tr>
{% endfor %}</table>
<p class="quiet">{{ result.protocol }}; {% for what, n in result.n.items() %}{{ "{:,}".format(n) }} {{ what }}{{ ", " if not loop.last }}{% endfor %}{% if result.choices %};
 a random answer is correct in {{ "%.2f"|format(100 / result.choices) }} %{% endif %}. Step {{ result.step }}, weights {{ result.checkpoint_sha256[:16] }}, seed {{ result.seed }};
 {{ result.bad|length }} samples skipped.{% if result.blind %} Blind: the same with the images of other samples.{% endif %}{% if contamination(result) %} {% if result.trained_on %}<strong>{{ contamination(result) }}</strong>{% else %}{{ contamination(result) }}{% endif %}{% endif %}</p>
{% if result.details.confused %}
<h3>Confusions</h3>
{{ confusions(result.details.confused[:10]) }}
{% endif %}
{% if result.wrong %}
<h3>Wrong predictions</h3>
{{ wrong_predictions(result.wrong) }}
{% endif %}
{% endfor %}
{% for note in notes %}
<p class="quiet">{{ note }}.</p>
{% endfor %}
<h2>Training</h2><img class="plot" alt="curves" src="data:image/png;base64,{{ curves }}">
{% for line in at_chance %}
<p>{{ line }}.</p>
{% endfor %}
{% if queries %}
<h2>Image retrieval</h2><p class="quiet">Random captions of the evaluated data, and the five most similar images. The caption's own image has a green frame.</p>
{{ caption_queries(queries) }}
{% endif %}
<h2>Commands</h2><pre>{% for line in commands %}{{ line }}
{% endfor %}</pre>
<p class="quiet">The resolved experiment is in <code>experiment.json</code> in the same folder.{% if quarantined %} {{ quarantined }} samples could not be used, see <code>quarantine.jsonl</code>.{% endif %}</p>
</body></html>
"""
)


def write_report(folder: Path, notes: list[str] | None = None) -> Path:
    """Write ``folder/report.html``.

    Args:
        folder: Folder of the run.
        notes: Receives a line for each file or line that cannot be read. The page has them, too.

    Raises:
        UserError: if the folder is not a run, or its log is empty.
    """
    if not os.path.isfile(folder / "experiment.json"):
        raise UserError(f"{folder} is not a run: it has no experiment.json")
    notes = [] if notes is None else notes
    experiment = load_without_code(folder / "experiment.json")
    tasks = _tasks(experiment, folder / "experiment.json")
    log = read_numbers(folder / "log.jsonl", notes)
    if not log:
        raise UserError("; ".join([*notes, f"{folder} has no step in its log yet; train it first"]))
    results = read_results(folder, notes)
    starts = read_starts(folder / "starts.jsonl")
    html = TEMPLATE.render(
        style=STYLE,
        examples=EXAMPLES_STYLE,
        name=experiment.name,
        summary=_summary(experiment, log, starts),
        results=[result | {"wrong": wrong_with_images(result)} for result in results],
        label=metric_label,
        asked=asked,
        described=described,
        contamination=contamination,
        notes=notes,
        curves=_curves(log, read_numbers(folder / "eval.jsonl", notes), tasks, experiment.objectives),
        at_chance=read_chance(folder / "log.jsonl"),
        queries=[q for result in results for q in captions_with_images(result, "text_to_image")],
        commands=[shlex.join(start["command"]) for start in starts],
        quarantined=len(read_log(folder / "quarantine.jsonl")),
    )
    return write_html(folder / "report.html", html)


def _tasks(experiment: Experiment, path: Path) -> dict[str, Task | Foreign]:
    """Return the tasks of an experiment.

    Raises:
        UserError: if a value that the report reads is of another type.
    """
    for name, kind in (("name", str), ("data", Data), ("evaluate", dict), ("objectives", dict)):
        if not isinstance(vars(experiment)[name], kind):
            raise UserError(f"{path} is damaged: its {name} is of another type")
    for name, task in experiment.evaluate.items():
        if not isinstance(task, (Task, Foreign)):
            raise UserError(f"{path} is damaged: evaluate.{name} is not a task")
        try:
            check_types(task, f"evaluate.{name}")
        except UserError as e:
            raise UserError(f"{path} is damaged: {e}") from None
    return experiment.evaluate


def _summary(experiment: Experiment, log: list[dict], starts: list[dict]) -> str:
    seconds = sum(line.get("seconds", 0) for line in log)
    wait = sum(line.get("seconds", 0) * line.get("data_wait", 0) for line in log) / (seconds or 1)
    last = log[-1]
    machine = f" on {starts[-1]['machine']}" if starts else ""
    return (
        f"{last['step']:,} steps of {experiment.data.batch_size} samples ({last.get('epoch', 0):.1f} epochs) in "
        f"{seconds / 60:.1f} min of training{machine}; {wait:.1%} of it waiting for data; peak memory "
        f"{max(line.get('memory_mib', 0) for line in log) / 1024:.1f} GiB"
    )


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return a running mean whose window shrinks at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _plotted(tasks: dict[str, Task | Foreign], evals: list[dict]) -> list[str]:
    """Return the metrics that are plotted over the steps: those that a task declares, else its first."""
    measured = list(evals[-1]) if evals else []
    names = []
    for key, task in tasks.items():
        of_task = [name for name in measured if name.startswith(f"{key}/")]
        # a task whose code is not at hand is plotted by its first metric
        declared = [] if isinstance(task, Foreign) else [f"{key}/{metric}" for metric in task.plotted]
        names += [name for name in of_task if name in declared] if declared else of_task[:1]
    return names


def _curves(log: list[dict], evals: list[dict], tasks: dict[str, Task | Foreign], objectives: Iterable[str]) -> str:
    """Plot loss, metrics, learning rate, temperature, geometry and measures of objectives against the step, as base64 PNG."""
    from matplotlib.figure import Figure

    measuring = tuple(f"{name}/" for name in set(objectives) - {"loss", "geometry"})
    measures = sorted({name for line in log for name in line if name.startswith(measuring)})
    figure = Figure(figsize=(11, 9.6 if measures else 6.4), layout="constrained")
    grid = figure.add_gridspec(3 if measures else 2, 2)
    loss, metrics, rate, geometry = (figure.add_subplot(grid[n // 2, n % 2]) for n in range(4))
    steps = np.array([line["step"] for line in log])
    values = np.array([line.get("loss", np.nan) for line in log])
    loss.plot(steps, values, color="#c6d3e1", linewidth=0.8)
    loss.plot(steps, _smooth(values, min(len(values), 25)), color="#1f5c99")
    loss.set_title("loss (nats; bold: mean of 25 steps)")
    for name in _plotted(tasks, evals)[:MAX_LINES]:
        key, _, metric = name.partition("/")
        label = f"{key}: {metric_label(metric)}"
        _draw(metrics, evals, name, plain_label(label), scale=100, marker="o", markersize=3)
        if any(f"{key}/blind_{metric}" in line for line in evals):
            style = {"color": metrics.lines[-1].get_color(), "linestyle": "--"}
            _draw(metrics, evals, f"{key}/blind_{metric}", plain_label(f"{label}, blind"), scale=100, **style)
    metrics.set_title("evaluation metrics x 100")
    _draw(rate, log, "lr", "learning rate", color="#1f5c99")
    rate.set_title("learning rate")
    if any("temperature" in line for line in log):
        rate.set_title("learning rate, and temperature (red, right axis)")
        _draw(rate.twinx(), log, "temperature", "temperature", color="#b2182b")
    for name in sorted({name for line in log for name in line if name.startswith("geometry/")})[:MAX_LINES]:
        _draw(geometry, log, name, plain_label(name.removeprefix("geometry/").replace("_", " ")))
    geometry.set_title("alignment, uniformity and modality gap of a batch")
    geometry.set_visible(bool(geometry.lines))
    axes = [loss, metrics, rate, geometry]
    if measures:
        axes.append(figure.add_subplot(grid[2, :]))
        axes[-1].set_title("measures of the training batches x 100 (mean of 25 steps)")
    for name in measures[:MAX_LINES]:
        objective, _, measure = name.partition("/")
        points = [(line["step"], 100 * line[name]) for line in log if name in line]
        at, values = np.array(points).T
        axes[-1].plot(at, _smooth(values, min(len(at), 25)), label=plain_label(f"{objective}: {metric_label(measure)}"))
    for axis in (metrics, geometry, *axes[4:]):
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return base64.b64encode(png(figure)).decode()


def _draw(axis, records: list[dict], name: str, label: str, scale: float = 1, **style) -> None:
    """Draw a line through the records that have a value of this name."""
    measured = [r for r in records if name in r]
    axis.plot([r["step"] for r in measured], [scale * r[name] for r in measured], label=label, **style)
