"""``report.html``: a self-contained page; needs no network, and JavaScript only for the chart."""

from __future__ import annotations

from autoquant_ray.allocate.certainty.solution import CERTAIN, COIN_TOSS
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.audit import HEADS as AUDIT_HEADS
from autoquant_ray.report.charts.bokeh_js import bokeh_scripts
from autoquant_ray.report.charts.frontier_chart import Dot, chart_data, size_text, visible
from autoquant_ray.report.charts.sizes import REST
from autoquant_ray.report.content import ReportContent
from autoquant_ray.report.domains import DOMAIN_HEADS
from autoquant_ray.report.facts import MEANINGS
from autoquant_ray.report.groups import METHOD_HEADS, readable
from autoquant_ray.report.heat import OUTSIDE, strips
from autoquant_ray.report.measured import HEADS
from autoquant_ray.report.page import render_page
from autoquant_ray.report.task_scores.section import TASK_HEADS

_MAX_CELLS = 30_000
"""Limit for the table of groups; browsers are slow to open larger pages."""
_NUM_COLOURS = 8
"""Colours of formats in the style sheet."""


def render_html(content: ReportContent) -> str:
    """Lay the content out as HTML; every string is escaped."""
    chart = chart_data(content.dots)
    palette, shown = _palette(content), [] if content.heat is None else strips(content.heat)
    num_rows = max(1, _MAX_CELLS // (8 + len(content.formats)))
    return render_page(
        "report.html.j2",
        ["shared.css", "report.css"],
        ["sort.js", "report.js", *(["frontier.js"] if chart else [])],
        libraries=bokeh_scripts() if chart else (),
        content=content,
        num_grave=sum(concern.is_grave for concern in content.concerns),
        chart=chart,
        palette=palette,
        has_several=any(
            cell is not None and cell.level is not None and cell.format not in palette
            for strip in shown
            for _, cells in strip.rows
            for cell in cells
        ),
        strips=shown,
        summary=_summary(content, visible(content.dots)),
        dots=[dot.texts for dot in sorted(content.dots, key=lambda d: (d.bits, d.kind))],
        outside=OUTSIDE,
        rest=REST,
        measured_heads=HEADS,
        task_heads=TASK_HEADS,
        audit_heads=AUDIT_HEADS,
        domain_heads=DOMAIN_HEADS,
        method_heads=METHOD_HEADS,
        meanings=MEANINGS,
        rows=content.groups[:num_rows],
        num_left_out=max(0, len(content.groups) - num_rows),
        num_resamples=content.num_resamples,
        has_certainty=any(row.kept is not None for row in content.groups),
        certainty=_certainty,
        format_name=readable,
        percent=_percent,
        short_score=_short_score,
        size=size_text,
    )


def _palette(content: ReportContent) -> dict[str, str]:
    """Format, as people read it -> class of its colour, from few to many bits; 16 bits are grey."""
    mix = sorted(content.mix, key=lambda row: row.num_bits)
    names = [row.format for row in mix if row.format != NONE]
    colours = {name: f"f{n % _NUM_COLOURS}" for n, name in enumerate(names)}
    return colours | {readable(NONE): "whole", REST: "rest"}


def _summary(content: ReportContent, shown: list[Dot]) -> str:
    """The chart in words, for readers who cannot see it."""
    curve = sorted((d for d in shown if d.kind in ("curve", "knee")), key=lambda d: d.bits)
    if not curve:
        return ""
    first, last = curve[0], curve[-1]
    texts = [
        f"From {first.bits:.2f} bits with a {content.dots_loss} of {first.loss:#.3g} to "
        f"{last.bits:.2f} bits with {last.loss:#.3g}.",
        *(
            f"The knee is at {dot.bits:.2f} bits ({dot.loss:#.3g})."
            for dot in curve
            if dot.kind == "knee"
        ),
        *(
            f"This solution: {dot.bits:.2f} bits, {dot.loss:#.3g}."
            for dot in shown
            if dot.kind == "solution"
        ),
    ]
    if any(dot.stderr is not None for dot in shown):
        texts.append("Bars are one standard error.")
    if len(shown) < len(content.dots):
        texts.append("Points with no loss, or a negligible one, are not drawn.")
    if content.dots_note:
        texts.append(content.dots_note)
    return " ".join(texts)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _short_score(entry: tuple[float, float | None]) -> tuple[str, str]:
    """A score and its standard error in few characters; '' without an error."""
    score, error = entry
    return f"{score:.2e}", "" if error is None else f"± {error:.0e}"


def _certainty(kept: float | None) -> str:
    if kept is None:
        return ""
    return "certain" if kept >= CERTAIN else "toss" if kept < COIN_TOSS else "between"
