"""Parts that both reports draw besides tables: wrong predictions and retrieval examples with their images, and recall bars."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlp.data.image import decode
from vlp.data.reading.index import peek_index
from vlp.data.reading.locations import list_shards
from vlp.data.reading.named_images import NamedImages, open_images
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError
from vlp.files import local_path
from vlp.report.figures import label
from vlp.report.results import metric_label
from vlp.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 112  # pixels of a thumbnail
MAX_PLOTS = 50  # of the bars, whose image has at most 65,536 pixels a side
MAX_BARS = 40
STYLE = f"""
 .row {{ display: flex; align-items: center; gap: .5rem; margin: .35rem 0 }}
 .row .query {{ width: 15rem }} .row img {{ width: {SIDE * 3 // 4}px; height: {SIDE * 3 // 4}px; object-fit: contain; border: 3px solid #dde2e7; border-radius: 6px; background: #fff }}
 .row img.apart {{ margin-left: 1rem }} .row img.correct {{ border-color: #1a9850 }} .row .rank {{ width: 5rem; text-align: right; color: #5b6570 }}
 .row ol {{ margin: 0; padding-left: 1.4rem; width: 24rem }} .row .truth {{ width: 17rem; color: #1a9850 }}
 .row .prediction {{ width: 12rem; color: #b2182b; font-size: .8rem }}
 .row li, .row .truth {{ font-size: .8rem; line-height: 1.3 }}
"""
# macros of jinja for the templates of both reports
MACROS = """
{% macro caption_queries(queries) %}{% for q in queries %}
<div class="row"><div class="query">{{ q.query }}</div>
{% for f in q.found %}<img class="{{ "correct" if f.correct }}" alt="result {{ loop.index }}" src="data:image/png;base64,{{ f.png }}">{% endfor %}
{% if q.own %}<img class="correct apart" alt="own image" src="data:image/png;base64,{{ q.own }}">{% endif %}
<div class="rank">rank {{ q.rank }}</div></div>
{% endfor %}{% endmacro %}
{% macro image_queries(queries) %}{% for q in queries %}
<div class="row"><img alt="query" src="data:image/png;base64,{{ q.png }}">
<ol>{% for text in q.found %}<li>{{ text }}</li>{% endfor %}</ol>
<div class="truth">{{ q.answers|join("; ") }}</div><div class="rank">rank {{ q.rank }}</div></div>
{% endfor %}{% endmacro %}
{% macro confusions(pairs) %}<table><tr><th>true class</th><th>predicted</th><th>count</th></tr>
{% for pair in pairs %}<tr><td>{{ pair.true }}</td><td>{{ pair.guessed }}</td><td>{{ pair.count }} of {{ pair.of }}</td></tr>
{% endfor %}</table>
{% endmacro %}
{% macro wrong_predictions(lines) %}<p class="quiet">Text, wrong prediction (red) and correct answer (green).</p>
{% for line in lines %}
<div class="row">{% for png in line.pngs %}<img alt="image" src="data:image/png;base64,{{ png }}">{% endfor %}
<div class="query">{{ line.text }}</div><div class="prediction">{{ line.prediction }}</div><div class="truth">{{ line.truth }}</div></div>
{% endfor %}{% endmacro %}
"""


def wrong_with_images(result: dict, most: int = 12) -> list[dict]:
    """Return the first wrong predictions, one for each image, with the images if they still exist."""
    details = result["details"]
    first_of: dict[tuple, dict] = {}
    for line in details.get("wrong", ()) if "images" in details else ():  # early results did not name their images
        first_of.setdefault(tuple(line["images"]), line)
    lines = list(first_of.values())[:most]
    try:
        images = open_local_images(details["images"]) if lines else None
        return [line | {"pngs": [small_png(images.read(name)) for name in line["images"]]} for line in lines]
    except (UserError, BadSample):
        return [line | {"pngs": []} for line in lines]


def captions_with_images(result: dict, entry: str) -> list[dict]:
    """Return caption queries with the images they retrieve, none if the shards no longer exist.

    The hardest queries also have their own image, which is hardly ever among those they retrieve.

    Args:
        entry: Entry of the details, ``text_to_image`` or ``hardest_text_to_image``.
    """
    examples = result["details"].get(entry, [])
    try:
        reader = open_local_shards(result["data"]) if examples else None
        return [
            {
                "query": example["query"],
                "rank": example["rank"],
                "own": thumbnail(reader, example["answer"]) if entry.startswith("hardest") else None,
                "found": [{"correct": n == example["answer"], "png": thumbnail(reader, n)} for n in example["found"]],
            }
            for example in examples
        ]
    except (UserError, BadSample):
        return []


def images_with_captions(result: dict, entry: str) -> list[dict]:
    """Return image queries with the captions they retrieve, like `captions_with_images`."""
    examples = result["details"].get(entry, [])
    try:
        reader = open_local_shards(result["data"]) if examples else None
        return [example | {"png": thumbnail(reader, example["query"])} for example in examples]
    except (UserError, BadSample):
        return []


def open_local_shards(location: str) -> ShardReader:
    """Open shards that a result names, if that neither reaches another machine nor writes an index next to them.

    Raises:
        UserError: if they are remote, missing, or have no index.
    """
    listing = list_shards(_local(location))
    if any(peek_index(Path(shard)) is None for shard in listing.shards):
        raise UserError(f"{location} has a shard without an index; evaluate it again")
    return ShardReader(location, listing=listing)


def open_local_images(location: str) -> NamedImages:
    """Open a folder of images, or shards as `open_local_shards` does."""
    folder = local_path(_local(location))
    if location.startswith("pip:") or folder.is_dir() and not any(folder.glob("*.tar")):
        return open_images(location)
    open_local_shards(location)
    return open_images(location)


def _local(location: str) -> str:
    """Return a location. Raises UserError if it is on another machine: a report must not fetch what a file names."""
    if "://" in location.removeprefix("file://"):
        raise UserError(f"{location} is not opened, as it is remote")
    return location


def thumbnail(reader: ShardReader, number: int) -> str:
    """Return the base64 PNG of a sample's image.

    Raises:
        BadSample: if there is no such sample, or it cannot be decoded.
    """
    if not 0 <= number < len(reader):
        raise BadSample(f"there is no sample {number}")
    return small_png(reader.read(*reader.locate(number)).image)


def small_png(encoded: bytes) -> str:
    """Return the base64 PNG of an encoded image, scaled down to `SIDE` pixels."""
    image = Image.fromarray(decode(encoded))
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def recall_bars(tables: list[Table]) -> Figure | None:
    """Draw a plot for each table with recalls: bars of every run with their intervals. None if no table has recalls."""
    from matplotlib.figure import Figure

    recalls = [(table, [m for m in table.metrics if m.startswith(("i2t_r@", "t2i_r@"))]) for table in tables]
    shown = [(table, metrics[:MAX_BARS]) for table, metrics in recalls if metrics][:MAX_PLOTS]
    if not shown:
        return None
    figure = Figure(figsize=(11, 3.4 * len(shown)), layout="constrained")
    for axis, (table, metrics) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown):
        positions, width = np.arange(len(metrics)), 0.8 / len(table.results)
        for n, (name, result) in enumerate(table.results.items()):
            found = [result["metrics"].get(metric) for metric in metrics]
            at = [p + (n - (len(table.results) - 1) / 2) * width for p, interval in zip(positions, found) if interval]
            found = [interval for interval in found if interval]
            values = np.array([i.value for i in found])
            spread = [values - [i.low for i in found], np.array([i.high for i in found]) - values]
            axis.bar(at, 100 * values, width * 0.9, yerr=100 * np.abs(spread), capsize=2, label=label(name))
        axis.set_xticks(positions, [label(metric_label(metric)) for metric in metrics])
        axis.set_ylim(0, 100)
        axis.set_ylabel("%")
        axis.set_title(label(table.title), fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    return figure
