"""A page that compares runs: their newest results, confusions and wrong predictions, and alignment-uniformity plots.

Results share a table only if they have the same protocol and data. The first table lists all of them.
"""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment

from vlp.errors import UserError
from vlp.files import write_atomically
from vlp.report.alignment_uniformity import draw_plots, find_plots
from vlp.report.examples import MACROS, captions_with_images, images_with_captions, recall_bars, wrong_with_images
from vlp.report.examples import STYLE as EXAMPLES_STYLE
from vlp.report.figures import png
from vlp.report.results import metric_label, read_results, write_html
from vlp.report.run import STYLE
from vlp.report.tables import Table, find_runs, tabulate

TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    MACROS
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ names|join(", ") }}</title>
<style>{{ style|safe }}
{{ examples|safe }}
 .wide { overflow-x: auto } .wide td { white-space: nowrap } .all { font-size: .85rem } .all td { white-space: normal } small { color: #5b6570; display: block } td.best { font-weight: 600 }
</style></head><body>
<h1>{{ names|length }} runs</h1><p class="quiet">The newest evaluations of {{ names|join(", ") }}. Small: 95 % bootstrap interval. Bold: best of the column. Trained on: evaluated images that are among the training images of the run, "?" where this is not known. Blind: the same evaluation with the images of other samples.</p>
<h2>All evaluations</h2>
<div class="wide"><table class="all"><tr><th>run</th><th>evaluation</th><th>metric</th><th>value</th><th>95 % interval</th><th>n</th><th>trained on</th><th>step</th><th>weights</th></tr>
{% for line in lines %}{% with value, low, high = line.interval.texts() %}
<tr><td>{{ line.run }}</td><td title="{{ line.protocol }}">{{ line.evaluation }}</td><td>{{ line.metric }}</td><td>{{ value }}{% if line.blind %} (blind {{ line.blind }}){% endif %}</td><td>{{ low }} to {{ high }}</td><td>{{ line.n }}</td><td>{{ line.trained_on }}</td><td>{{ line.step if line.step is not none }}</td><td>{{ line.weights }}</td></tr>
{% endwith %}{% endfor %}</table></div>
{% if bars %}
<h2>Recall</h2><img class="plot" alt="recall with intervals" src="data:image/png;base64,{{ bars }}">
{% endif %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="wide"><table><tr><th>run</th>{% for metric in table.metrics %}<th>{{ label(metric) }}</th>{% endfor %}<th>n</th><th>trained on</th><th>step</th><th>weights</th></tr>
{% for name, result in table.results.items() %}
<tr><td>{{ name }}</td>
{% for metric in table.metrics %}{% with i = result.metrics.get(metric) %}
{% if i %}{% with value, low, high = i.texts() %}<td{% if table.best(metric) == name %} class="best"{% endif %}>{{ value }}<small>{{ low }} to {{ high }}{% if metric in result.blind %}; blind {{ result.blind[metric] }}{% endif %}</small></td>{% endwith %}{% else %}<td></td>{% endif %}
{% endwith %}{% endfor %}
<td>{% for what, n in result.n.items() %}{{ "{:,}".format(n) }} {{ what }}{{ ", " if not loop.last }}{% endfor %}</td><td>{{ trained_on(result) }}</td><td>{{ result.step if result.step is not none }}</td><td>{{ result.checkpoint_sha256[:8] }}</td></tr>
{% endfor %}</table></div>
<p class="quiet">{{ table.protocol }}.</p>
{% endfor %}
{% for note in notes %}
<p class="quiet">{{ note }}.</p>
{% endfor %}
{% if without %}<p class="quiet">Not evaluated: {{ without|join(", ") }}.</p>{% endif %}
{% if plot %}
<h2>Alignment and uniformity</h2>
<p class="quiet">Lower is better on both axes (Wang &amp; Isola 2020, drawn as in SimCSE's figure 3). Colour and brackets: the metric at the colour bar. Grey: runs without it. Also in <code>alignment_uniformity.png</code>.</p>
<img class="plot" alt="alignment-uniformity plot" src="data:image/png;base64,{{ plot }}">
{% endif %}
{% for part in confused %}
<h2>Confusions: {{ part.title }}</h2>
{{ confusions(part.pairs) }}
{% endfor %}
{% for part in wrong %}
<h2>Wrong predictions: {{ part.title }}</h2>
{{ wrong_predictions(part.lines) }}
{% endfor %}
{% for part in hardest %}
<h2>Hardest queries: {{ part.title }}</h2>
<p class="quiet">Captions whose own image (green) has the lowest rank, and the five most similar images.</p>
{{ caption_queries(part.captions) }}
<p class="quiet">Images whose own captions (green) have the lowest rank, and the five most similar captions.</p>
{{ image_queries(part.images) }}
{% endfor %}
</body></html>
"""
)


def write_comparison(folders: list[Path], output: Path, notes: list[str] | None = None) -> Path:
    """Write ``output/report.html``, and ``output/alignment_uniformity.png`` if a run has alignment and uniformity.

    Args:
        folders: Folders of runs, of evaluated weights (runs/eval/NAME), or folders of these. Others are ignored.
        output: Folder of the page.
        notes: Receives a line for each result that cannot be read. The page has them, too.

    Raises:
        UserError: if there is no run, one is given twice, or no run has anything to compare.
    """
    runs = _names(find_runs(folders))
    notes = [] if notes is None else notes
    results = {name: read_results(folder, notes) for name, folder in runs.items()}
    tables, plots = tabulate(results), find_plots(runs, results)
    if not tables and not plots:
        none = f"none of {', '.join(runs)} was evaluated or has its geometry in the log; run vlp eval on them"
        raise UserError("; ".join([*notes, none]))
    plot, bars = png(draw_plots(plots, tables)) if plots else b"", recall_bars(tables)
    html = TEMPLATE.render(
        style=STYLE,
        examples=EXAMPLES_STYLE,
        names=list(runs),
        lines=_lines(tables),
        tables=tables,
        label=metric_label,
        trained_on=_trained_on,
        notes=notes,
        without=[name for name, found in results.items() if not found],
        plot=base64.b64encode(plot).decode(),
        bars=bars and base64.b64encode(png(bars)).decode(),
        confused=_confused(tables),
        wrong=_wrong(tables),
        hardest=_hardest(tables),
    )
    page = write_html(output / "report.html", html)
    if plot:
        write_atomically(output / "alignment_uniformity.png", plot)
    return page


def _trained_on(result: dict) -> str:
    """Return the number of evaluated images that are training images, "?" if unknown, and "" for evaluations of texts."""
    if result["trained_on"] is None:
        return "?" if "images" in result["n"] else ""
    return f"{result['trained_on']:,}"


def _names(folders: list[Path]) -> dict[str, Path]:
    """Name runs by their folder's name, or by the whole path if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return {name if unique else str(folder): folder for name, folder in zip(names, folders)}


def _lines(tables: list[Table]) -> list[dict]:
    """Return a line for each evaluation of each run, with its headline metric."""
    lines = []
    for table in tables:
        metric, values = table.headline()
        for run, interval in values.items():
            result = table.results[run]
            lines.append(
                {
                    "run": run,
                    "evaluation": _evaluation(table, result),
                    "protocol": table.protocol,
                    "metric": metric_label(metric),
                    "interval": interval,
                    "blind": result["blind"].get(metric.removeprefix(f"{table.task} ")),
                    "n": ", ".join(f"{n:,} {what}" for what, n in result["n"].items()),
                    "trained_on": _trained_on(result),
                    "step": result["step"],
                    "weights": result["checkpoint_sha256"][:8],
                }
            )
    return sorted(lines, key=lambda line: line["run"])


def _evaluation(table: Table, result: dict) -> str:
    if not result["name"]:
        return table.title
    return f"{result['name']} ({table.data_id[:8]})" if table.data_id else result["name"]


def _confused(tables: list[Table], most: int = 10) -> list[dict]:
    """Return the most frequent confusions of each run in each classification."""
    return [
        {"title": f"{run}, {table.title}", "pairs": pairs[:most]}
        for table in tables
        for run, result in table.results.items()
        if (pairs := result["details"].get("confused"))
    ]


def _wrong(tables: list[Table], most: int = 6) -> list[dict]:
    """Return the first wrong predictions of each run on annotations."""
    return [
        {"title": f"{run}, {table.title}", "lines": lines}
        for table in tables
        for run, result in table.results.items()
        if (lines := wrong_with_images(result, most))
    ]


def _hardest(tables: list[Table], most: int = 6) -> list[dict]:
    """Return the hardest queries of each retrieval, if the images still exist."""
    found = []
    for table in tables:
        for run, result in table.results.items():
            captions = captions_with_images(result, "hardest_text_to_image")[:most]
            images = images_with_captions(result, "hardest_image_to_text")[:most]
            if captions or images:
                found.append({"title": f"{run}, {table.title}", "captions": captions, "images": images})
    return found
