"""``report.md``: the solution as text, for people and for tools that diff or review it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autoquant_ray.report.audit import HEADS as AUDIT_HEADS
from autoquant_ray.report.audit import AuditData
from autoquant_ray.report.content import ReportContent, format_score
from autoquant_ray.report.domains import DOMAIN_HEADS
from autoquant_ray.report.groups import METHOD_HEADS
from autoquant_ray.report.measured import HEADS, MeasuredData
from autoquant_ray.report.task_scores.section import TASK_HEADS
from autoquant_ray.wording import printable

_EXPLANATION = (
    "Sensitivity is the largest score of the layer's group over the menu: the predicted loss of "
    "the harshest format. Layers of a group share a format and a score. Size cost is the stored "
    "size in the chosen format, scales included."
)


def render_markdown(content: ReportContent) -> str:
    """Lay the content out as GitHub-flavoured Markdown."""
    lines = [f"# {plain_text(content.title)}", "", plain_text(content.result), ""]
    lines += [_concerns(content), ""]
    lines += [f"- **{label}:** {plain_text(value)}" for label, value in content.facts]
    if content.warnings:
        lines += ["", "## Notes", ""]
        lines += [f"- {plain_text(warning)}" for warning in content.warnings]
    if content.domains is not None:
        lines += ["", "## Loss by domain", "", plain_text(content.domains.text), ""]
        lines += _table(DOMAIN_HEADS, content.domains.rows)
    if content.methods is not None:
        lines += ["", "## Rounding", "", plain_text(content.methods.text), ""]
        lines += _table(METHOD_HEADS, content.methods.rows)
    for section in content.measured:
        lines += _section("Predicted and measured loss", HEADS, section)
    if content.tasks is not None:
        lines += ["", "## Benchmark tasks", "", plain_text(content.tasks.verdict), ""]
        lines += _table(TASK_HEADS, content.tasks.rows)
    if content.audit is not None:
        lines += _section("Predicted and measured scores", AUDIT_HEADS, content.audit)
    lines += _layers(content)
    lines += ["", f"## Scores by group and format ({content.unit})", ""]
    lines += [f"| Group | {' | '.join(plain_text(name) for name in content.formats)} |"]
    lines += ["|---" * (1 + len(content.formats)) + "|"]
    for group, scores in content.scores.items():
        cells_of_group = [format_score(scores.get(format_)) for format_ in content.formats]
        lines.append(f"| {plain_text(group)} | {' | '.join(cells_of_group)} |")
    lines += _reproduction(content)
    return "\n".join(lines) + "\n"


def _layers(content: ReportContent) -> list[str]:
    """The table of layers; where the menu has methods of rounding, with what each saves."""
    heads = ["Layer", "Num Bits", "Sensitivity", "Size Cost", "Chosen"]
    text, has_methods = _EXPLANATION, bool(content.methods and content.methods.is_per_layer)
    if has_methods:
        heads += ["Method", "Saved"]
        text += (
            " Saved is the score of the layer's group in the same format rounded plainly, minus "
            "its score; layers of a group share that too."
        )
    rows = []
    for layer in content.layers:
        size = f"{layer.size_bytes / 2**20:.3f} MiB"
        if layer.kv_bytes is not None:
            size = f"{layer.kv_bytes:,.0f} bytes per token"
        cells = [
            layer.name,
            f"{layer.num_bits:.3f}",
            "-" if layer.sensitivity is None else f"{layer.sensitivity:.4e}",
            size,
            layer.chosen if layer.note is None else f"{layer.chosen} ({layer.note})",
        ]
        rows.append([*cells, layer.method or "-", layer.saved] if has_methods else cells)
    return ["", "## Layers", "", text, "", *_table(heads, rows)]


def _section(title: str, heads: tuple[str, ...], section: MeasuredData | AuditData) -> list[str]:
    """A section on measurements: a title, a verdict and a table."""
    lines = ["", f"## {title}", "", plain_text(section.title) + ".", ""]
    return [*lines, plain_text(section.verdict), "", *_table(heads, section.rows)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(plain_text(cell) for cell in row)} |" for row in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def _reproduction(content: ReportContent) -> list[str]:
    reproduction = content.reproduction
    lines = ["", "## How to reproduce", ""]
    if reproduction.commands:
        commands = (" ".join(f"$ {command}".split("\n")) for command in reproduction.commands)
        lines += ["```console", *commands, "```", ""]
    return lines + [f"- **{label}:** {plain_text(value)}" for label, value in reproduction.facts]


def _concerns(content: ReportContent) -> str:
    """Reasons to doubt the solution, before anything else."""
    if not content.concerns:
        return "No reasons for concern were found."
    lines = [
        f"- **{plain_text(concern.title)}{' (grave)' if concern.is_grave else ''}.** "
        f"{plain_text(concern.text)}"
        for concern in content.concerns
    ]
    return "\n".join(["## Reasons for concern", "", *lines, "", "## The solution"])


def plain_text(value: str) -> str:
    """Escape names from the model or the data, so that they are not read as markup.

    What could start a link, an image, code, emphasis, mathematics, a table's cell, a tag or an
    entity is escaped, and at the start what could make a heading, a list or a quotation; control
    characters are written out. An underscore inside a word means nothing and stays.
    """
    text = " ".join(printable(" ".join(value.split())).split())
    for pattern, escaped in _ESCAPES:
        text = pattern.sub(escaped, text)
    return text


_ESCAPES = [
    (re.compile(pattern), escaped)
    for pattern, escaped in (
        (r"[\\`*\[\]|~$]", r"\\\g<0>"),
        (r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_"),
        (r"&(?=#|\w+;)", "&amp;"),
        (r"<", "&lt;"),
        (r"(?i)\b(https?|ftp):(?=//)", r"\1\\:"),
        (r"(?i)\bwww(?=\.)", r"www\\"),
        (r"^(?=[#>+=] |#|>|[-=]{2}|- )", r"\\"),
        (r"^(\d+)(?=[.)] )", r"\1\\"),
    )
]
