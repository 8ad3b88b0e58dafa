"""RUN/report.html: one self-contained file with the curves, the numbers with their intervals, queries with what they found,
and the command that repeats it all. What a run has not (pictures, texts, a temperature, results) is left out."""

from __future__ import annotations

import base64
import io
import json
import shlex
from pathlib import Path

import numpy as np
from jinja2 import Environment

from vlp.config import Experiment, load_without_code
from vlp.data.reading.shards import write_atomically
from vlp.errors import UserError
from vlp.report.examples import MACROS, captions_with_pictures, wrong_with_pictures
from vlp.report.examples import STYLE as EXAMPLES_STYLE
from vlp.specs.json import Foreign
from vlp.tasks.base import Task
from vlp.tasks.find import find_task, shipped_tasks
from vlp.tasks.metrics import Interval
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
<tr><td>{{ metric }}</td>{% with value, low, high = i.texts() %}<td>{{ value }}</td><td>{{ low }} to {{ high }}</td>{% endwith %}</tr>
{% endfor %}</table>
<p class="quiet">{{ result.protocol }}; {% for what, n in result.n.items() %}{{ "{:,}".format(n) }} {{ what }}{{ ", " if not loop.last }}{% endfor %}{% if result.choices %};
 chance at one {{ "%.2f"|format(100 / result.choices) }} %{% endif %}. Step {{ result.step }}, weights {{ result.checkpoint_sha256[:16] }}, seed {{ result.seed }};
 {{ result.bad|length }} samples left out.</p>
{% if result.details.confused %}
<h3>Mixed up</h3>
{{ mixed_up(result.details.confused[:10]) }}
{% endif %}
{% if result.wrong %}
<h3>Wrong</h3>
{{ mistakes(result.wrong) }}
{% endif %}
{% endfor %}
<h2>Training</h2><img class="plot" alt="curves" src="data:image/png;base64,{{ curves }}">
{% if queries %}
<h2>What captions find</h2><p class="quiet">Captions drawn at random from the held-out part, and the five pictures nearest to each; the right one has a green frame.</p>
{{ captions(queries) }}
{% endif %}
<h2>To repeat it</h2><pre>{% for line in commands %}{{ line }}
{% endfor %}</pre>
<p class="quiet">The resolved experiment is in <code>experiment.json</code> beside this file.{% if quarantined %} {{ quarantined }} samples could not be used, see <code>quarantine.jsonl</code>.{% endif %}</p>
</body></html>
"""
)


def write_report(folder: Path) -> Path:
    """Writes ``folder/report.html``. Raises UserError if the folder is no run or has no log yet."""
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
        results=[result | {"wrong": wrong_with_pictures(result)} for result in results],
        curves=_curves(log, read_log(folder / "eval.jsonl"), experiment.evaluate),
        queries=[q for result in results for q in captions_with_pictures(result, "text_to_image")],
        commands=[shlex.join(start["command"]) for start in starts],
        quarantined=len(read_log(folder / "quarantine.jsonl")),
    )
    path = folder / "report.html"
    write_atomically(path, html.encode())
    return path


def read_results(folder: Path) -> list[dict]:
    """Read the newest result of each evaluation of a run, as `vlp.tasks.base.Result.write` wrote it.

    Metrics become Intervals. ``choices`` is the number of answers that a guess would be drawn from, None where that has no
    meaning.
    """
    results = []
    for path in sorted((folder / "eval").glob("*.json")):
        result = json.loads(path.read_text())
        if "headline" not in result:
            result |= _declared(result["task"])
        result["metrics"] = {metric: Interval(**i) for metric, i in result["metrics"].items()}
        result["choices"] = (
            result["n"].get("classes") or (result["task"] == "retrieval" and result["n"]["images"]) or None
        )
        results.append(result)
    return results


def _declared(task: str) -> dict:
    """Return what a task declares of its metrics, for results from before these were part of them."""
    if task not in shipped_tasks():  # find_task would import the file or module that somebody's result names
        return {"headline": "", "lower_is_better": ()}
    cls = find_task(task)
    return {"headline": cls.headline, "lower_is_better": cls.lower_is_better}


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
    """Running mean whose window shrinks at the ends."""
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
    """Loss, held-out numbers, learning rate and temperature, and geometry against the step; base64 PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (loss, held_out), (rate, geometry) = figure.subplots(2, 2)
    steps = np.array([line["step"] for line in log])
    values = np.array([line["loss"] for line in log], dtype=float)
    loss.plot(steps, values, color="#c6d3e1", linewidth=0.8)
    loss.plot(steps, _smooth(values, min(len(values), 25)), color="#1f5c99")
    loss.set_title("loss (nats; bold: mean of 25 steps)")
    for name in _plotted(tasks, evals):
        _draw(held_out, evals, name, name, scale=100, marker="o", markersize=3)
    held_out.set_title("held-out metrics x 100")
    _draw(rate, log, "lr", "learning rate", color="#1f5c99")
    rate.set_title("learning rate")
    if any("temperature" in line for line in log):
        rate.set_title("learning rate, and temperature (red, right)")
        _draw(rate.twinx(), log, "temperature", "temperature", color="#b2182b")
    for name in sorted({name for line in log for name in line if name.startswith("geometry/")}):
        _draw(geometry, log, name, name.removeprefix("geometry/").replace("_", " "))
    geometry.set_title("geometry of a batch")
    for axis in (held_out, geometry):
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in (loss, held_out, rate, geometry):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return base64.b64encode(png(figure)).decode()


def _draw(axis, records: list[dict], name: str, label: str, scale: float = 1, **style) -> None:
    """A line through the records that have a number of this name."""
    measured = [r for r in records if r.get(name) is not None]
    axis.plot([r["step"] for r in measured], [scale * r[name] for r in measured], label=label, **style)


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
