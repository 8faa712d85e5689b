"""``report.html``: a self-contained page; needs no network, and JavaScript only for the chart."""

from __future__ import annotations

from autoquant_ray.allocate.certainty.solution import CERTAIN, COIN_TOSS
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.audit import HEADS as AUDIT_HEADS
from autoquant_ray.report.bokeh_js import bokeh_scripts
from autoquant_ray.report.content import ReportContent, format_score
from autoquant_ray.report.domains import DOMAIN_HEADS
from autoquant_ray.report.frontier_chart import Dot, chart_data, size_text, visible
from autoquant_ray.report.groups import METHOD_HEADS
from autoquant_ray.report.measured import HEADS
from autoquant_ray.report.page import render_page

_MAX_CELLS = 30_000
"""Limit for the table of groups; browsers are slow to open larger pages."""


def render_html(content: ReportContent) -> str:
    """Lay the content out as HTML; every string is escaped."""
    chart = chart_data(content.dots)
    num_rows = max(1, _MAX_CELLS // (8 + len(content.formats)))
    return render_page(
        "report.html.j2",
        ["shared.css", "report.css"],
        ["sort.js", "report.js", *(["frontier.js"] if chart else [])],
        libraries=bokeh_scripts() if chart else (),
        content=content,
        chosen=_chosen(content),
        chart=chart,
        summary=_summary(content, visible(content.dots)),
        dots=[dot.texts for dot in sorted(content.dots, key=lambda d: (d.bits, d.kind))],
        measured_heads=HEADS,
        audit_heads=AUDIT_HEADS,
        domain_heads=DOMAIN_HEADS,
        method_heads=METHOD_HEADS,
        rows=content.groups[:num_rows],
        num_left_out=max(0, len(content.groups) - num_rows),
        num_resamples=content.num_resamples,
        has_certainty=any(row.kept is not None for row in content.groups),
        certainty=_certainty,
        format_name=_format_name,
        score_text=format_score,
        size=size_text,
    )


def _chosen(content: ReportContent) -> str:
    """The allocation in a sentence."""
    parts = [
        f"{_format_name(row.format)} for {row.num_groups} group{'s' * (row.num_groups != 1)} "
        f"({_percent(row.share)} of the weights)"
        for row in content.mix
    ]
    return f"Chosen: {', '.join(parts)}."


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


def _format_name(name: str) -> str:
    return "16 bits" if name == NONE else name


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _certainty(kept: float | None) -> str:
    if kept is None:
        return ""
    return "certain" if kept >= CERTAIN else "toss" if kept < COIN_TOSS else "between"
