"""Draw docs/figure.svg, the data flow of a training step: ``python docs/figure.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "vlp", "font.family": "DejaVu Sans"})  # the same file every time

from matplotlib import pyplot as plt  # noqa: E402  (after the choice of the backend)
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#4f86c6", "#d98c3f", "#5a9a4a", "#6b7280"
BOXES = {  # name -> (x, y, width, height), title, lines, colour
    "data": ((0, 1.55, 2.3, 1.5), "sources", ["shards, annotations,", "texts"], BLUE),
    "batch": ((3.1, 1.55, 2.3, 1.5), "Batch", ["image, input_ids,", "image_id, views"], BLUE),
    "forward": ((6.2, 1.35, 3.1, 1.9), "Forward", ["image, text, fused", "views, momentum", "all: rows of all processes"], ORANGE),
    "objectives": ((10.1, 1.55, 2.3, 1.5), "objectives", ["itc, itm, mlm, ...", "pure losses"], GREEN),
    "step": ((13.2, 1.55, 2.3, 1.5), "step", ["sum of weight x loss,", "backward, optimizer"], GREEN),
    "model": ((6.2, 4.2, 3.1, 1.1), "model", ["towers, fusion, heads"], ORANGE),
    "state": ((9.75, 4.2, 3.1, 1.1), "state", ["momentum encoder, queues"], ORANGE),
    "run": ((13.2, 4.2, 2.3, 1.1), "run folder", ["checkpoints, logs"], GREY),
    "tasks": ((16.1, 4.2, 2.3, 1.1), "tasks", ["results, report"], GREY),
}  # fmt: skip
ARROWS = [  # from (x, y) to (x, y), label
    ((2.3, 2.3), (3.1, 2.3), "order"),
    ((5.4, 2.3), (6.2, 2.3), ""),
    ((9.3, 2.3), (10.1, 2.3), ""),
    ((12.4, 2.3), (13.2, 2.3), ""),
    ((7.75, 4.2), (7.75, 3.25), ""),
    ((10.2, 4.2), (8.9, 3.25), ""),
    ((13.6, 3.05), (12.5, 4.2), ""),
    ((14.35, 3.05), (14.35, 4.2), ""),
    ((15.5, 4.75), (16.1, 4.75), ""),
]


def main() -> None:
    figure, axis = plt.subplots(figsize=(13.2, 3.8))
    for (x, y, width, height), title, lines, colour in BOXES.values():
        style = {"facecolor": colour + "22", "edgecolor": colour, "linewidth": 1.6}
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", **style))
        top, centre = y + height - 0.32, x + width / 2
        axis.text(centre, top, title, ha="center", va="center", fontsize=11.5, fontweight="bold")
        for number, line in enumerate(lines, start=1):
            axis.text(centre, top - 0.42 * number, line, ha="center", va="center", fontsize=9.2)
    for start, end, label in ARROWS:
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=GREY, linewidth=1.4))
        if label:
            axis.text((start[0] + end[0]) / 2, start[1] + 0.2, label, ha="center", fontsize=8.5, color=GREY)
    axis.text(1.15, 1.2, "a function of seed,\nepoch and position", ha="center", va="top", fontsize=8.5, color=GREY)
    axis.text(7.75, 1.15, "each network runs at most once", ha="center", va="top", fontsize=8.5, color=GREY)
    axis.text(14.35, 1.3, "then EMA and queues\nare updated", ha="center", va="top", fontsize=8.5, color=GREY)
    axis.set(xlim=(-0.1, 18.5), ylim=(0.3, 5.45), aspect="equal")
    axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).with_name("figure.svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
