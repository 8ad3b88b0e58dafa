"""Several runs on one page: their newest numbers beside each other, what they get wrong, and where their embeddings lie.

Only what was measured by the same protocol on the same data shares a table; the first table lists everything.
"""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment

from vlp.data.reading.shards import write_atomically
from vlp.errors import UserError
from vlp.report.alignment_uniformity import draw_planes, find_planes
from vlp.report.examples import (
    MACROS,
    captions_with_pictures,
    pictures_with_captions,
    recall_bars,
    wrong_with_pictures,
)
from vlp.report.examples import STYLE as EXAMPLES_STYLE
from vlp.report.run import STYLE, png, read_results
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
<h1>{{ names|length }} runs</h1><p class="quiet">The newest evaluations of {{ names|join(", ") }}. Small: 95 % bootstrap interval; bold: best of the column.</p>
<h2>All evaluations</h2>
<div class="wide"><table class="all"><tr><th>run</th><th>evaluation</th><th>measure</th><th>value</th><th>95 % interval</th><th>n</th><th>step</th><th>weights</th></tr>
{% for line in lines %}{% with value, low, high = line.interval.texts() %}
<tr><td>{{ line.name }}</td><td title="{{ line.protocol }}">{{ line.what }}</td><td>{{ line.metric }}</td><td>{{ value }}</td><td>{{ low }} to {{ high }}</td><td>{{ line.n }}</td><td>{{ line.step if line.step is not none }}</td><td>{{ line.weights }}</td></tr>
{% endwith %}{% endfor %}</table></div>
{% if bars %}
<h2>Recalls</h2><img class="plot" alt="recalls with intervals" src="data:image/png;base64,{{ bars }}">
{% endif %}
{% for table in tables %}
<h2>{{ table.task }}: {{ table.data }}</h2>
<div class="wide"><table><tr><th>run</th>{% for metric in table.metrics %}<th>{{ metric }}</th>{% endfor %}<th>n</th><th>step</th><th>weights</th></tr>
{% for name, result in table.results.items() %}
<tr><td>{{ name }}</td>
{% for metric in table.metrics %}{% with i = result.metrics.get(metric) %}
{% if i %}{% with value, low, high = i.texts() %}<td{% if table.best(metric) == name %} class="best"{% endif %}>{{ value }}<small>{{ low }} to {{ high }}</small></td>{% endwith %}{% else %}<td></td>{% endif %}
{% endwith %}{% endfor %}
<td>{% for what, n in result.n.items() %}{{ "{:,}".format(n) }} {{ what }}{{ ", " if not loop.last }}{% endfor %}</td><td>{{ result.step if result.step is not none }}</td><td>{{ result.checkpoint_sha256[:8] }}</td></tr>
{% endfor %}</table></div>
<p class="quiet">{{ table.protocol }}.</p>
{% endfor %}
{% if without %}<p class="quiet">Not evaluated: {{ without|join(", ") }}.</p>{% endif %}
{% if plane %}
<h2>Alignment and uniformity</h2>
<p class="quiet">Lower is better on both axes (Wang &amp; Isola 2020; drawn as in SimCSE's figure 3). Colour and brackets: the score named beside the bar; grey runs have none. Also in <code>plane.png</code>.</p>
<img class="plot" alt="alignment-uniformity plane" src="data:image/png;base64,{{ plane }}">
{% endif %}
{% for mixed in confused %}
<h2>Mixed up: {{ mixed.name }}, {{ mixed.what }}</h2>
{{ mixed_up(mixed.pairs) }}
{% endfor %}
{% for wrong in mistaken %}
<h2>Wrong: {{ wrong.name }}, {{ wrong.what }}</h2>
{{ mistakes(wrong.lines) }}
{% endfor %}
{% for hard in hardest %}
<h2>Hardest: {{ hard.name }}, {{ hard.what }}</h2>
<p class="quiet">Captions whose own picture (green) came last, behind the five that they found first.</p>
{{ captions(hard.captions) }}
<p class="quiet">Pictures whose own captions (green) came last, and the five captions that they found.</p>
{{ pictures(hard.pictures) }}
{% endfor %}
</body></html>
"""
)


def write_comparison(folders: list[Path], output: Path) -> Path:
    """Writes ``output/report.html``, and ``output/plane.png`` where a run has alignment and uniformity.

    Args:
        folders: of runs, of weights that were evaluated (runs/eval/NAME), or folders of these; what is none is passed over.

    Raises:
        UserError: if there is no run, one is given twice, or none has anything to compare.
    """
    runs = _named(find_runs(folders))
    results = {name: read_results(folder) for name, folder in runs.items()}
    tables, planes = tabulate(results), find_planes(runs, results)
    if not tables and not planes:
        raise UserError(f"none of {', '.join(runs)} was evaluated or has its geometry in the log; run vlp eval on them")
    plane, bars = png(draw_planes(planes, tables)) if planes else b"", recall_bars(tables)
    html = TEMPLATE.render(
        style=STYLE,
        examples=EXAMPLES_STYLE,
        names=list(runs),
        lines=_lines(tables),
        tables=tables,
        without=[name for name, found in results.items() if not found],
        plane=base64.b64encode(plane).decode(),
        bars=bars and base64.b64encode(png(bars)).decode(),
        confused=_confused(tables),
        mistaken=_mistaken(tables),
        hardest=_hardest(tables),
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        if plane:
            write_atomically(output / "plane.png", plane)
        write_atomically(output / "report.html", html.encode())
    except OSError as e:
        raise UserError(f"cannot write {output}: {e.strerror or e}; give --output FOLDER") from None
    return output / "report.html"


def _named(folders: list[Path]) -> dict[str, Path]:
    """Runs by the folder's name, or by the whole path where two have the same."""
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return {name if unique else str(folder): folder for name, folder in zip(names, folders)}


def _lines(tables: list[Table]) -> list[dict]:
    """One for each evaluation of each run, with its headline."""
    lines = []
    for table in tables:
        metric, values = table.headline()
        for name, interval in values.items():
            result = table.results[name]
            lines.append(
                {
                    "name": name,
                    "what": result.get("name") or f"{table.task}: {table.data}",
                    "protocol": table.protocol,
                    "metric": metric,
                    "interval": interval,
                    "n": ", ".join(f"{n:,} {what}" for what, n in result["n"].items()),
                    "step": result["step"],
                    "weights": result["checkpoint_sha256"][:8],
                }
            )
    return sorted(lines, key=lambda line: line["name"])


def _confused(tables: list[Table], most: int = 10) -> list[dict]:
    """The pairs of classes that each run mixes up most often, by its evaluations with classes."""
    return [
        {"name": name, "what": f"{table.task}: {table.data}", "pairs": pairs[:most]}
        for table in tables
        for name, result in table.results.items()
        if (pairs := result["details"].get("confused"))
    ]


def _mistaken(tables: list[Table], most: int = 6) -> list[dict]:
    """The first lines that each run has wrong, by its evaluations of annotations."""
    return [
        {"name": name, "what": f"{table.task}: {table.data}", "lines": lines}
        for table in tables
        for name, result in table.results.items()
        if (lines := wrong_with_pictures(result, most))
    ]


def _hardest(tables: list[Table], most: int = 6) -> list[dict]:
    """The queries of each retrieval whose answer came last, where the pictures are still at hand."""
    found = []
    for table in tables:
        for name, result in table.results.items():
            captions = captions_with_pictures(result, "hardest_text_to_image")[:most]
            pictures = pictures_with_captions(result, "hardest_image_to_text")[:most]
            if captions or pictures:
                what = f"{table.task}: {table.data}"
                found.append({"name": name, "what": what, "captions": captions, "pictures": pictures})
    return found
