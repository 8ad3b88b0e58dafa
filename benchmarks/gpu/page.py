"""The results as one page for a person: a single HTML file without anything from outside."""

from __future__ import annotations

from jinja2 import Environment

from benchmarks.gpu.parts import failed

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>vlp on {{ card }}</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
 h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.25rem; margin-top: 2.4rem } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
 table { border-collapse: collapse; width: 100%; margin: .4rem 0 1rem; font-variant-numeric: tabular-nums }
 th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; vertical-align: top }
 th { font-weight: 600; border-bottom: 2px solid #bbb } td.n, th.n { text-align: right; white-space: nowrap }
 code { font-size: .86em; overflow-wrap: anywhere } .plain { color: #666 }
 .good { color: #17692f; font-weight: 600 } .bad { color: #b3261e; font-weight: 600 } .none { color: #777 }
 .note { background: #fff4d6; border-left: 4px solid #d9a400; padding: .6rem .9rem }
 pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: 12.5px } summary { cursor: pointer }
 svg text { font-size: 11px; fill: #555 }
</style></head><body>
{% macro verdict(text) %}<span class="{{ {'met': 'good', 'ok': 'good', 'not met': 'bad', 'failed': 'bad', 'over its limit': 'bad'}.get(text, 'none') }}">{{ text }}</span>{% endmacro %}
<h1>vlp on {{ card }}</h1>
<p class="plain">{{ run.date }} &middot; commit <code>{{ run.commit }}</code> &middot; torch {{ run.torch }} &middot; {{ run.cores }} cores
&middot; {{ run.seconds }} s in all<br><code>{{ run.command }}</code></p>
{% if run.small %}<p class="note">Tiny sizes: this shows that every part runs. It measures nothing.</p>{% endif %}
{% if not run.gpu %}<p class="note">No GPU: times and comparisons are those of the CPU with itself.</p>{% endif %}

<h2>Goals</h2>
<table><tr><th>goal, for an H100<th>wanted<th class="n">measured{% if before %}<th class="n">before{% endif %}<th></tr>
{% for row in goals %}<tr><td>{{ row.goal }}<td>{{ row.wanted }}<td class="n">{{ '–' if row.measured is none else row.measured }}
{% if before %}<td class="n">{{ before.get(row.goal) or '–' }}{% endif %}<td>{{ verdict(row.verdict) }}</tr>{% endfor %}
</table>
{% if before %}<p class="plain">Before: {{ before_run }}.</p>{% endif %}

<h2>Parts</h2>
<table><tr><th>part<th>what<th class="n">seconds<th class="n">limit<th class="n">checks<th></tr>
{% for name, part in parts.items() %}<tr><td><a href="#{{ name }}">{{ name }}</a><td>{{ part.what }}<td class="n">{{ part.seconds or '–' }}
<td class="n">{{ part.limit or '–' }}<td class="n">{{ part.checks|length }}{% set bad = part.checks|select('failed')|list|length %}{% if bad %}, {{ bad }} failed{% endif %}
<td>{{ verdict(part.status) }}</tr>{% endfor %}
</table>

{% for name, part in parts.items() %}
<h2 id="{{ name }}">{{ name }}: {{ part.what }}</h2>
{% for check in part.checks if check.error %}<p><span class="bad">failed</span> {{ check.check }}: <code>{{ check.error }}</code></p>{% endfor %}
{% if part.last_lines %}<details><summary>last lines that it printed</summary><pre>{{ part.last_lines|join('\n') }}</pre></details>{% endif %}
{% if name == 'right-steps' %}
 <p class="plain">Errors are relative: the loss's, and the worst gradient's (float32) or the whole gradient's (bf16). Refused pairs of
 objective and model are left out.</p>
 <details{{ ' open' if part.status != 'ok' else '' }}><summary>{{ part.checks|worst_first|length }} checks, the worst first</summary>
 <table><tr><th>check<th class="n">loss<th class="n">gradient<th class="n">bf16 loss<th class="n">bf16 gradient<th></tr>
 {% for check in part.checks|worst_first %}<tr><td>{{ check.check }}
 {% for key in ('loss_error', 'gradient_error', 'bf16_loss_error', 'bf16_whole_gradient_error') %}<td class="n">{{ check[key]|small if key in check else '' }}{% endfor %}
 <td>{{ verdict('failed' if check is failed else 'ok') }}</tr>{% endfor %}</table></details>
{% else %}{% for check in part.checks %}
 <h3>{{ check.check }}{% if check is failed %} <span class="bad">failed</span>{% endif %}</h3>
 {% set facts = check|facts %}
 {% if facts %}<p>{% for key, value in facts %}{{ key }}: <b>{{ value }}</b>{{ '' if loop.last else ' &middot; '|safe }}{% endfor %}</p>{% endif %}
 {% if check.ways %}<table><tr><th>way<th class="n">ms a step, median<th class="n">spread<th class="n">steps<th class="n">peak MiB</tr>
 {% for way, each in check.ways.items() %}<tr><td>{{ way }}<td class="n">{{ '%.2f' % (1000 * each.seconds) }}<td class="n">{{ '%.1f' % (100 * each.spread) }} %
 <td class="n">{{ each.steps }}<td class="n">{{ each.peak_mib or '–' }}</tr>{% endfor %}</table>{% endif %}
 {% if check.utilisation %}<p>utilisation: {{ check.utilisation.tflops }} TFLOP/s, {{ '%.1f' % (100 * check.utilisation.of_datasheet) }} % of the datasheet,
 {{ '%.1f' % (100 * check.utilisation.of_matrix_product) }} % of a large matrix product</p>{% endif %}
 {% if check.kernels %}<details><summary>the ten most expensive kernels</summary><table><tr><th>kernel<th class="n">calls<th class="n">ms<th class="n">share</tr>
 {% for each in check.kernels %}<tr><td><code>{{ each.kernel }}</code><td class="n">{{ each.calls }}<td class="n">{{ each.ms }}<td class="n">{{ '%.1f' % (100 * each.share) }} %</tr>{% endfor %}</table></details>{% endif %}
 {% if check.places %}<table><tr><th>place<th>phase<th class="n">waits</tr>
 {% for each in check.places %}<tr><td><code>{{ each.place }}</code><td>{{ each.phase }}<td class="n">{{ each.times }}</tr>{% endfor %}</table>{% endif %}
 {% if check.points %}{{ check|curve }}{% endif %}
{% endfor %}{% endif %}{% endfor %}
</body></html>
"""
SHOWN_ELSEWHERE = {"check", "took_seconds", "ways", "kernels", "places", "points", "utilisation", "error", "ok"}


def render(results: dict, before: dict | None = None) -> str:
    """The page.

    Args:
        results: what gpu.json has.
        before: an earlier run's, whose goals stand next to these.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["failed"] = failed
    environment.filters |= {"facts": facts, "small": lambda x: f"{x:.1e}", "curve": curve}
    environment.filters["worst_first"] = worst_first
    earlier = before and {row["goal"]: row["measured"] for row in before["goals"]}
    told = before and f"{before['run']['card']}, commit {before['run']['commit'][:12]}, {before['run']['date']}"
    return environment.from_string(TEMPLATE).render(
        card=results["run"]["card"], before=earlier, before_run=told, **results
    )


def worst_first(checks: list[dict]) -> list[dict]:
    """Failed checks, then by the error of gradients; without those that were refused, as the matrix says."""
    kept = [check for check in checks if "refused" not in check]
    return sorted(kept, key=lambda check: (not failed(check), -check.get("gradient_error", 0)))


def facts(check: dict) -> list[tuple[str, str]]:
    """What a check says in single values."""
    shown = []
    for key, value in check.items():
        if key not in SHOWN_ELSEWHERE and value is not None:
            value = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            shown.append((key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)))
    return shown


def curve(check: dict):
    """The held-out metric by step, as a drawing; the dashed line is chance."""
    from markupsafe import Markup, escape

    width, height, left, bottom = 520, 190, 44, 24
    last, most = max(step for step, _ in check["points"]), max(value for _, value in check["points"])
    most = max(most, check["chance"]) * 1.1 or 1

    def place(step: float, value: float) -> str:
        return f"{left + (width - left - 10) * step / last:.1f},{height - bottom - (height - bottom - 10) * value / most:.1f}"

    path = " ".join(place(*point) for point in check["points"])
    dots = "".join('<circle cx="{}" cy="{}" r="3" fill="#1f5fa8"/>'.format(*each.split(",")) for each in path.split())
    y = place(0, check["chance"]).split(",")[1]
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(check["metric"])} by step">'
        f'<line x1="{left}" x2="{width - 10}" y1="{y}" y2="{y}" stroke="#999" stroke-dasharray="4"/>'
        f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="2"/>{dots}'
        f'<text x="0" y="14">{100 * most:.0f} %</text><text x="0" y="{height - bottom}">0 %</text>'
        f'<text x="{width - 80}" y="{height - 6}">step {last}</text><text x="{left}" y="{height - 6}">'
        f"{escape(check['metric'])}, chance dashed</text></svg>"
    )
