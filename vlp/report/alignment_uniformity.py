"""The alignment-uniformity plane (Wang & Isola 2020): where the embeddings of runs lie, coloured by what they are worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlp.report.tables import Table, tabulate
from vlp.tasks.metrics import Interval
from vlp.training.logging import read_log

MEASURES = 10  # logged batches that a point is the mean of


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
