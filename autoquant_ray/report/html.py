"""``report.html``: the same content as one self-contained page, no script, no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from autoquant_ray.report.audit import HEADS as AUDIT_HEADS
from autoquant_ray.report.content import ReportContent, format_score
from autoquant_ray.report.domains import DOMAIN_HEADS
from autoquant_ray.report.measured import HEADS

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #8884; padding: .25rem .6rem; text-align: left; }
td.number { font-variant-numeric: tabular-nums; text-align: right; }
thead th { background: Canvas; position: sticky; top: 0; }
dl { display: grid; gap: .2rem 1rem; grid-template-columns: max-content 1fr; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.wrap { overflow-x: auto; }
"""


def render_html(content: ReportContent) -> str:
    """Lay the content out as HTML; every string is escaped."""
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in content.facts)
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in content.warnings)
    notes = f"<h2>To know</h2><ul>{warnings}</ul>" if warnings else ""
    layers = (
        (
            layer.name,
            f"{layer.num_bits:.3f}",
            "-" if layer.sensitivity is None else f"{layer.sensitivity:.4e}",
            f"{layer.size_bytes / 2**20:.3f} MiB",
            layer.chosen if layer.note is None else f"{layer.chosen} ({layer.note})",
        )
        for layer in content.layers
    )
    scores = (
        (group, *(format_score(s.get(name)) for name in content.formats))
        for group, s in content.scores.items()
    )
    measured = "".join(
        f"<h2>Predicted against measured</h2><p>{escape(section.title)}.</p>"
        f"<p>{escape(section.verdict)}</p>{_table(HEADS, section.rows)}"
        for section in content.measured
    )
    if content.audit is not None:
        found = content.audit
        measured += f"<h2>Scores against measured</h2><p>{escape(found.title)}.</p>"
        measured += f"<p>{escape(found.verdict)}</p>{_table(AUDIT_HEADS, found.rows)}"
    if content.domains is not None:
        table = _table(DOMAIN_HEADS, content.domains.rows)
        measured = f"<h2>Who pays</h2><p>{escape(content.domains.text)}</p>{table}{measured}"
    title = escape(content.title)
    heads = ("Layer", "Num Bits", "Sensitivity", "Size Cost", "Chosen")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1><dl>{facts}</dl>{notes}"
        f"{measured}"
        f"<h2>Layers</h2>{_table(heads, layers)}"
        f"<h2>Scores by group and format ({escape(content.unit)})</h2>"
        f"{_table(('Group', *content.formats), scores)}</main></body></html>\n"
    )


def _table(heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wrap">{table}</div>'
