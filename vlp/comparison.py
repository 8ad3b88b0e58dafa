"""Several runs on one page: their newest numbers beside each other, and where their embeddings lie.

Only what was measured by the same protocol on the same data shares a table.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from vlp.data.shards import write_atomically
from vlp.errors import UserError
from vlp.logging import read_log
from vlp.metrics import Interval
from vlp.report import STYLE, png, read_results

TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ names|join(", ") }}</title>
<style>{{ style|safe }}
 .wide { overflow-x: auto } .wide td { white-space: nowrap } small { color: #5b6570; display: block } td.best { font-weight: 600 }
</style></head><body>
<h1>{{ names|length }} runs</h1><p class="quiet">The newest evaluations of {{ names|join(", ") }}. Small: 95 % bootstrap interval; bold: best of the column.</p>
{% for table in tables %}
<h2>{{ table.task }}: {{ table.data }}</h2>
<div class="wide"><table><tr><th>run</th>{% for metric in table.metrics %}<th>{{ metric }}</th>{% endfor %}<th>n</th><th>step</th><th>weights</th></tr>
{% for name, result in table.results.items() %}
<tr><td>{{ name }}</td>
{% for metric in table.metrics %}{% with i = result.metrics.get(metric) %}
{% if i %}{% with value, low, high = i.texts() %}<td{% if table.best(metric) == name %} class="best"{% endif %}>{{ value }}<small>{{ low }} to {{ high }}</small></td>{% endwith %}{% else %}<td></td>{% endif %}
{% endwith %}{% endfor %}
<td>{% for what, n in result.n.items() %}{{ "{:,}".format(n) }} {{ what }}{{ ", " if not loop.last }}{% endfor %}</td><td>{{ result.step }}</td><td>{{ result.checkpoint_sha256[:8] }}</td></tr>
{% endfor %}</table></div>
<p class="quiet">{{ table.protocol }}.</p>
{% endfor %}
{% if without %}<p class="quiet">Not evaluated: {{ without|join(", ") }}.</p>{% endif %}
{% if plane %}
<h2>Alignment and uniformity</h2>
<p class="quiet">Lower is better on both axes (Wang &amp; Isola 2020; drawn as in SimCSE's figure 3). Colour and brackets: the score named beside the bar; grey runs have none. Also in <code>plane.png</code>.</p>
<img class="plot" alt="alignment-uniformity plane" src="data:image/png;base64,{{ plane }}">
{% endif %}
</body></html>
""")

HEADLINES = {"retrieval": "mean_recall", "zero-shot": "top1", "knn": "top1", "probe": "top1", "sts": "mean"}
LOWER_IS_BETTER = ("alignment", "uniformity")
MEASURES = 10  # logged batches that a point is the mean of


@dataclass
class Table:
    """One protocol on one data set.

    Args:
        results: run name -> its newest result, as `vlp.report.read_results` reads it.
    """

    task: str
    data: str
    protocol: str
    results: dict[str, dict]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for result in self.results.values() for metric in result["metrics"]))

    def best(self, metric: str) -> str | None:
        """The run with the best value; None where there is nothing to compare."""
        values = {name: r["metrics"][metric].value for name, r in self.results.items() if metric in r["metrics"]}
        if len(values) < 2:
            return None
        return (min if metric in LOWER_IS_BETTER else max)(values, key=values.get)

    def headline(self) -> tuple[str, dict[str, Interval]]:
        """What the score is called, and its value for each run."""
        metric = HEADLINES.get(self.task, self.metrics[0])
        found = {name: r["metrics"][metric] for name, r in self.results.items() if metric in r["metrics"]}
        return f"{self.task} {metric}", found


@dataclass
class Plane:
    """Runs by what their embeddings look like on the same kind of data.

    Args:
        points: run name -> (uniformity, alignment).
        task: that measured it; None = training did.
    """

    title: str
    points: dict[str, tuple[float, float]]
    task: str | None = None


def write_comparison(folders: list[Path], output: Path) -> Path:
    """Writes ``output/report.html``, and ``output/plane.png`` where a run has alignment and uniformity.

    Raises:
        UserError: if a folder is no run, is given twice, or no run has anything to compare.
    """
    runs = _named(folders)
    results = {name: read_results(folder) for name, folder in runs.items()}
    tables, planes = tabulate(results), find_planes(runs, results)
    if not tables and not planes:
        raise UserError(f"none of {', '.join(runs)} was evaluated or has its geometry in the log; run vlp eval on them")
    plane = png(draw_planes(planes, tables)) if planes else b""
    html = TEMPLATE.render(
        style=STYLE,
        names=list(runs),
        tables=tables,
        without=[name for name, found in results.items() if not found],
        plane=base64.b64encode(plane).decode(),
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
    for folder in folders:
        if not (folder / "experiment.json").is_file():
            raise UserError(f"{folder} is not a run: it has no experiment.json")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice; name each once")
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return {name if unique else str(folder): folder for name, folder in zip(names, folders)}


def tabulate(results: dict[str, list[dict]]) -> list[Table]:
    """Results of the same task, data and protocol together; of a run's several the newest."""
    tables: dict[tuple, Table] = {}
    for name, found in results.items():
        for result in sorted(found, key=lambda r: r["time"]):
            key = result["task"], result["data"], result["protocol"]
            tables.setdefault(key, Table(*key, {})).results[name] = result
    return sorted(tables.values(), key=lambda table: (-len(table.results), table.task, table.data))


def find_planes(runs: dict[str, Path], results: dict[str, list[dict]]) -> list[Plane]:
    """What was measured on the sentences of one protocol, and what was measured while training: these are not comparable."""
    planes = []
    for table in tabulate(results):
        points = {
            name: (r["metrics"]["uniformity"].value, r["metrics"]["alignment"].value)
            for name, r in table.results.items()
            if "alignment" in r["metrics"] and "uniformity" in r["metrics"]
        }
        if points:
            planes.append(Plane(f"{table.task}: {Path(table.data).name}", points, table.task))
    logged = {name: _logged_geometry(folder) for name, folder in runs.items()}
    if points := {name: point for name, point in logged.items() if point}:
        planes.append(Plane("last training batches", points))
    return planes


def _logged_geometry(folder: Path) -> tuple[float, float] | None:
    """Mean of the last measured batches; of several uniformities (of pictures, of texts) the mean, as in Wang & Isola."""
    lines = [line for line in read_log(folder / "log.jsonl") if line.get("geometry/alignment") is not None][-MEASURES:]
    if not lines:
        return None
    uniformities = [
        v for line in lines for k, v in line.items() if k.startswith("geometry/uniformity") and v is not None
    ]
    return sum(uniformities) / len(uniformities), sum(line["geometry/alignment"] for line in lines) / len(lines)


def draw_planes(planes: list[Plane], tables: list[Table]):
    """A scatter plot a plane: uniformity to the right, alignment upwards, each run coloured by its score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(planes), 5), layout="constrained")
    for axis, plane in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes):
        what, scores = _score_of(plane, tables)
        across = [x for x, _ in plane.points.values()]
        middle = (min(across) + max(across)) / 2
        for name, (x, y) in plane.points.items():
            text = f"{name} ({scores[name]})" if name in scores else name
            side = {"ha": "right", "xytext": (-7, 5)} if x > middle else {"xytext": (7, 5)}  # towards the middle
            axis.annotate(text, (x, y), textcoords="offset points", fontsize=8, **side).set_in_layout(False)
        grey = [point for name, point in plane.points.items() if name not in scores]
        if grey:
            axis.scatter(*zip(*grey), color="#9aa4ae", s=45)
        if scores:
            drawn = axis.scatter(
                *zip(*(plane.points[name] for name in scores)),
                c=[i.value for i in scores.values()],
                cmap="viridis",
                s=45,
            )
            figure.colorbar(drawn, ax=axis, label=what)
        axis.set_xlabel("uniformity (lower is more uniform)")
        axis.set_ylabel("alignment (lower is closer)")
        axis.set_title(plane.title)
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    return figure


def _score_of(plane: Plane, tables: list[Table]) -> tuple[str, dict[str, Interval]]:
    """The headline that most runs of the plane have; of equally many, that of the task that measured the plane."""
    found = [("", {}, False)]
    for table in tables:
        what, scores = table.headline()
        found.append((what, {n: i for n, i in scores.items() if n in plane.points}, table.task == plane.task))
    what, scores, _ = max(found, key=lambda f: (len(f[1]), f[2]))
    return what, scores
