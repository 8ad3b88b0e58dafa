"""What reports show of evaluations besides tables: recalls as bars, and queries with the pictures and captions that they found."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from vlp.data.image import decode
from vlp.data.reading.named_images import open_images
from vlp.data.reading.shards import ShardReader
from vlp.errors import BadSample, UserError
from vlp.report.tables import Table

SIDE = 112  # pixels of a thumbnail
STYLE = f"""
 .row {{ display: flex; align-items: center; gap: .5rem; margin: .35rem 0 }}
 .row .query {{ width: 15rem }} .row img {{ width: {SIDE * 3 // 4}px; height: {SIDE * 3 // 4}px; object-fit: contain; border: 3px solid #dde2e7; border-radius: 6px; background: #fff }}
 .row img.apart {{ margin-left: 1rem }} .row img.right {{ border-color: #1a9850 }} .row .rank {{ width: 5rem; text-align: right; color: #5b6570 }}
 .row ol {{ margin: 0; padding-left: 1.4rem; width: 24rem }} .row .own {{ width: 17rem; color: #1a9850 }}
 .row .said {{ width: 12rem; color: #b2182b; font-size: .8rem }}
 .row li, .row .own {{ font-size: .8rem; line-height: 1.3 }}
"""
# jinja's macros, for the templates of both reports
MACROS = """
{% macro captions(queries) %}{% for q in queries %}
<div class="row"><div class="query">{{ q.query }}</div>
{% for f in q.found %}<img class="{{ "right" if f.right }}" alt="result {{ loop.index }}" src="data:image/png;base64,{{ f.png }}">{% endfor %}
{% if q.own %}<img class="right apart" alt="own" src="data:image/png;base64,{{ q.own }}">{% endif %}
<div class="rank">{{ "found %d." | format(q.rank) }}</div></div>
{% endfor %}{% endmacro %}
{% macro pictures(queries) %}{% for q in queries %}
<div class="row"><img alt="query" src="data:image/png;base64,{{ q.png }}">
<ol>{% for text in q.found %}<li>{{ text }}</li>{% endfor %}</ol>
<div class="own">{{ q.answers|join("; ") }}</div><div class="rank">{{ "found %d." | format(q.rank) }}</div></div>
{% endfor %}{% endmacro %}
{% macro mixed_up(pairs) %}<table><tr><th>true</th><th>taken for</th><th>times</th></tr>
{% for pair in pairs %}<tr><td>{{ pair.true }}</td><td>{{ pair.guessed }}</td><td>{{ pair.count }} of {{ pair.of }}</td></tr>
{% endfor %}</table>
{% endmacro %}
{% macro mistakes(lines) %}<p class="quiet">What was asked, what was said (red), and what is true (green).</p>
{% for line in lines %}
<div class="row">{% for png in line.pngs %}<img alt="picture" src="data:image/png;base64,{{ png }}">{% endfor %}
<div class="query">{{ line.asked }}</div><div class="said">{{ line.said }}</div><div class="own">{{ line.true }}</div></div>
{% endfor %}{% endmacro %}
"""


def wrong_with_pictures(result: dict, most: int = 12) -> list[dict]:
    """The first kept lines that a model has wrong, of as many pictures as can be, with those that are still at hand."""
    details = result["details"]
    first_of = {}
    for line in details["wrong"] if "pictures" in details else ():  # the first versions kept no pictures
        first_of.setdefault(tuple(line["pictures"]), line)
    lines = list(first_of.values())[:most]
    try:
        pictures = open_images(details["pictures"]) if lines else None
        return [line | {"pngs": [encoded(pictures.read(name)) for name in line["pictures"]]} for line in lines]
    except (UserError, BadSample):
        return [line | {"pngs": []} for line in lines]


def captions_with_pictures(result: dict, which: str) -> list[dict]:
    """The kept examples of text-to-image retrieval with their pictures; none where the shards are no longer at hand.

    Of the hardest, whose own picture is hardly among those found, that is there too.
    """
    examples = result["details"].get(which, [])
    try:
        reader = ShardReader(result["data"]) if examples else None
        return [
            {
                "query": example["query"],
                "rank": example["rank"],
                "own": thumbnail(reader, example["answer"]) if which.startswith("hardest") else None,
                "found": [{"right": n == example["answer"], "png": thumbnail(reader, n)} for n in example["found"]],
            }
            for example in examples
        ]
    except (UserError, BadSample):
        return []


def pictures_with_captions(result: dict, which: str) -> list[dict]:
    """As `captions_with_pictures`, of image-to-text retrieval."""
    examples = result["details"].get(which, [])
    try:
        reader = ShardReader(result["data"]) if examples else None
        return [example | {"png": thumbnail(reader, example["query"])} for example in examples]
    except (UserError, BadSample):
        return []


def thumbnail(reader: ShardReader, number: int) -> str:
    """Base64 PNG of a sample's picture."""
    return encoded(reader.read(*reader.locate(number)).image)


def encoded(picture: bytes) -> str:
    """Base64 PNG, small."""
    image = Image.fromarray(decode(picture))
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def recall_bars(tables: list[Table]):
    """A figure with a plot a table: recalls of every run side by side, with their intervals. None where none has recalls."""
    from matplotlib.figure import Figure

    shown = [(table, [m for m in table.metrics if m.startswith(("i2t_r@", "t2i_r@"))]) for table in tables]
    shown = [(table, metrics) for table, metrics in shown if metrics]
    if not shown:
        return None
    figure = Figure(figsize=(11, 3.4 * len(shown)), layout="constrained")
    for axis, (table, metrics) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown):
        places, width = np.arange(len(metrics)), 0.8 / len(table.results)
        for n, (name, result) in enumerate(table.results.items()):
            found = [result["metrics"].get(metric) for metric in metrics]
            at = [place + (n - (len(table.results) - 1) / 2) * width for place, i in zip(places, found) if i]
            found = [i for i in found if i]
            values = np.array([i.value for i in found])
            spread = [values - [i.low for i in found], np.array([i.high for i in found]) - values]
            axis.bar(at, 100 * values, width * 0.9, yerr=100 * np.abs(spread), capsize=2, label=name)
        axis.set_xticks(places, metrics)
        axis.set_ylim(0, 100)
        axis.set_ylabel("%")
        axis.set_title(f"{table.task}: {table.data}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    return figure
