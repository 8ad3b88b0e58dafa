"""Alignment-uniformity plots (Wang & Isola 2020): alignment against uniformity of runs, coloured by their score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.report.figures import label as plain_label
from vlp.report.results import read_numbers
from vlp.report.tables import Table, tabulate
from vlp.tasks.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PLOTS = 16
LOGGED = 10  # last logged batches that a point is the mean of


@dataclass
class AlignmentUniformityPlot:
    """Runs by alignment and uniformity on the same data.

    Args:
        points: Run name -> (uniformity, alignment).
        task: Task that measured them, None for measurements of the training.
    """

    title: str
    points: dict[str, tuple[float, float]]
    task: str | None = None


def find_plots(runs: dict[str, Path], results: dict[str, list[dict]]) -> list[AlignmentUniformityPlot]:
    """Return a plot for each protocol that measured sentences, and one for measurements of the training.

    Values of different plots are not comparable.
    """
    plots = []
    for table in tabulate(results):
        points = {
            name: (r["metrics"]["uniformity"].value, r["metrics"]["alignment"].value)
            for name, r in table.results.items()
            if "alignment" in r["metrics"] and "uniformity" in r["metrics"]
        }
        if points:
            plots.append(AlignmentUniformityPlot(f"{table.task}: {Path(table.data).name}", points, table.task))
    logged = {name: _logged_geometry(folder) for name, folder in runs.items()}
    if points := {name: point for name, point in logged.items() if point}:
        plots.append(AlignmentUniformityPlot("last training batches", points))
    return plots[:MAX_PLOTS]


def _logged_geometry(folder: Path) -> tuple[float, float] | None:
    """Average the last measured batches, and the uniformities of images and texts, as in Wang & Isola."""
    lines = [line for line in read_numbers(folder / "log.jsonl") if "geometry/alignment" in line][-LOGGED:]
    uniformities = [v for line in lines for k, v in line.items() if k.startswith("geometry/uniformity")]
    if not uniformities:
        return None
    return sum(uniformities) / len(uniformities), sum(line["geometry/alignment"] for line in lines) / len(lines)


def draw_plots(plots: list[AlignmentUniformityPlot], tables: list[Table]) -> Figure:
    """Draw a scatter plot for each: uniformity to the right, alignment upwards, each run coloured by its score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(plots), 5), layout="constrained")
    for axis, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots):
        label, scores = _scores(plot, tables)
        across = [x for x, _ in plot.points.values()]
        middle = (min(across) + max(across)) / 2
        for name, (x, y) in plot.points.items():
            text = plain_label(name) + (f" ({scores[name]})" if name in scores else "")
            side = {"ha": "right", "xytext": (-7, 5)} if x > middle else {"xytext": (7, 5)}  # towards the middle
            axis.annotate(text, (x, y), textcoords="offset points", fontsize=8, **side).set_in_layout(False)
        grey = [point for name, point in plot.points.items() if name not in scores]
        if grey:
            axis.scatter(*zip(*grey), color="#9aa4ae", s=45)
        if scores:
            points = axis.scatter(
                *zip(*(plot.points[name] for name in scores)),
                c=[i.value for i in scores.values()],
                cmap="viridis",
                s=45,
            )
            figure.colorbar(points, ax=axis, label=plain_label(label))
        axis.set_xlabel("uniformity (lower is more uniform)")
        axis.set_ylabel("alignment (lower is closer)")
        axis.set_title(plain_label(plot.title))
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    return figure


def _scores(plot: AlignmentUniformityPlot, tables: list[Table]) -> tuple[str, dict[str, Interval]]:
    """Return the headline that most runs of the plot have. A tie goes to the task that measured the plot."""
    found: list[tuple[str, dict[str, Interval], bool]] = [("", {}, False)]
    for table in tables:
        label, scores = table.headline()
        own = {name: interval for name, interval in scores.items() if name in plot.points}
        found.append((label, own, table.task == plot.task))
    label, scores, _ = max(found, key=lambda f: (len(f[1]), f[2]))
    return label, scores
