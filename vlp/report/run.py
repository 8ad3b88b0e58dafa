"""RUN/report.html: one self-contained file with the metrics and their intervals, curves, retrieval examples and the commands."""

from __future__ import annotations

import base64
import shlex
from pathlib import Path

import numpy as np
from jinja2 import Environment

from vlp.config import Experiment, load_without_code
from vlp.errors import UserError
from vlp.files import write_atomically
from vlp.report.examples import MACROS, captions_with_images, wrong_with_images
from vlp.report.examples import STYLE as EXAMPLES_STYLE
from vlp.report.figures import png
from vlp.report.results import metric_label, read_results
from vlp.specs.json import Foreign
from vlp.tasks.base import Task
from vlp.training.logging import read_log

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
<h2>{{ result.task }}: {{ result.data }}</h2>
<table><tr><th>metric</th><th>value</th><th>95 % interval</th></tr>
{% for metric, i in result.metrics.items() %}
<tr><td>{{ label(metric) }}</td>{% with value, low, high = i.texts() %}<td>{{ value }}</td><td>{{ low }} to {{ high }}</td>{% endwith %}</tr>
{% endfor %}</table>
<p class="quiet">{{ result.protocol }}; {% for what, n in result.n.items() %}{{ "{:,}".format(n) }} {{ what }}{{ ", " if not loop.last }}{% endfor %}{% if result.choices %};
 a random answer is correct in {{ "%.2f"|format(100 / result.choices) }} %{% endif %}. Step {{ result.step }}, weights {{ result.checkpoint_sha256[:16] }}, seed {{ result.seed }};
 {{ result.bad|length }} samples skipped.</p>
{% if result.details.confused %}
<h3>Confusions</h3>
{{ confusions(result.details.confused[:10]) }}
{% endif %}
{% if result.wrong %}
<h3>Wrong predictions</h3>
{{ wrong_predictions(result.wrong) }}
{% endif %}
{% endfor %}
<h2>Training</h2><img class="plot" alt="curves" src="data:image/png;base64,{{ curves }}">
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


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html``.

    Raises:
        UserError: if the folder is not a run, or its log is empty.
    """
    if not (folder / "experiment.json").is_file():
        raise UserError(f"{folder} is not a run: it has no experiment.json")
    experiment, log = load_without_code(folder / "experiment.json"), read_log(folder / "log.jsonl")
    if not log:
        raise UserError(f"{folder} has no step in its log yet; train it first")
    results = read_results(folder)
    starts = read_log(folder / "starts.jsonl")
    html = TEMPLATE.render(
        style=STYLE,
        examples=EXAMPLES_STYLE,
        name=experiment.name,
        summary=_summary(experiment, log, starts),
        results=[result | {"wrong": wrong_with_images(result)} for result in results],
        label=metric_label,
        curves=_curves(log, read_log(folder / "eval.jsonl"), experiment.evaluate),
        queries=[q for result in results for q in captions_with_images(result, "text_to_image")],
        commands=[shlex.join(start["command"]) for start in starts],
        quarantined=len(read_log(folder / "quarantine.jsonl")),
    )
    path = folder / "report.html"
    write_atomically(path, html.encode())
    return path


def _summary(experiment: Experiment, log: list[dict], starts: list[dict]) -> str:
    seconds = sum(line["seconds"] for line in log)
    wait = sum(line["seconds"] * line["data_wait"] for line in log) / seconds
    last = log[-1]
    machine = f" on {starts[-1]['machine']}" if starts else ""
    return (
        f"{last['step']:,} steps of {experiment.data.batch_size} samples ({last['epoch']:.1f} epochs) in {seconds / 60:.1f} min "
        f"of training{machine}; {wait:.1%} of it waiting for data; peak memory {max(x['memory_mib'] for x in log) / 1024:.1f} GiB"
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


def _curves(log: list[dict], evals: list[dict], tasks: dict[str, Task | Foreign]) -> str:
    """Plot loss, metrics, learning rate, temperature and geometry against the step, as base64 PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (loss, metrics), (rate, geometry) = figure.subplots(2, 2)
    steps = np.array([line["step"] for line in log])
    values = np.array([line["loss"] for line in log], dtype=float)
    loss.plot(steps, values, color="#c6d3e1", linewidth=0.8)
    loss.plot(steps, _smooth(values, min(len(values), 25)), color="#1f5c99")
    loss.set_title("loss (nats; bold: mean of 25 steps)")
    for name in _plotted(tasks, evals):
        key, _, metric = name.partition("/")
        _draw(metrics, evals, name, f"{key}: {metric_label(metric)}", scale=100, marker="o", markersize=3)
    metrics.set_title("evaluation metrics x 100")
    _draw(rate, log, "lr", "learning rate", color="#1f5c99")
    rate.set_title("learning rate")
    if any("temperature" in line for line in log):
        rate.set_title("learning rate, and temperature (red, right axis)")
        _draw(rate.twinx(), log, "temperature", "temperature", color="#b2182b")
    for name in sorted({name for line in log for name in line if name.startswith("geometry/")}):
        _draw(geometry, log, name, name.removeprefix("geometry/").replace("_", " "))
    geometry.set_title("alignment, uniformity and modality gap of a batch")
    for axis in (metrics, geometry):
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in (loss, metrics, rate, geometry):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return base64.b64encode(png(figure)).decode()


def _draw(axis, records: list[dict], name: str, label: str, scale: float = 1, **style) -> None:
    """Draw a line through the records that have a value of this name."""
    measured = [r for r in records if r.get(name) is not None]
    axis.plot([r["step"] for r in measured], [scale * r[name] for r in measured], label=label, **style)
