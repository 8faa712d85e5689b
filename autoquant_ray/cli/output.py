"""What commands print for people, on stdout, never wider than the page and never cut.

A table that is too wide breaks its heads and cells at words, the names in its heads behind
underscores too. Where that is not enough, it becomes several tables below each other, each with the
first column.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoquant_ray.allocate.frontier import Point
from autoquant_ray.allocate.latency import LATENCY, describe_prediction
from autoquant_ray.cli.edge import page_width, show_lines
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.kv_cache import KV_BYTES, kv_names, reachable_cache
from autoquant_ray.models.quantized_source import describe_source
from autoquant_ray.models.separate_heads import describe_separate
from autoquant_ray.plan.carried import describe_carried
from autoquant_ray.plan.group import PlannedGroup
from autoquant_ray.plan.plan import Plan
from autoquant_ray.runs.names import FRONTIER_FILE
from autoquant_ray.solve import Solution
from autoquant_ray.wording import printable

if TYPE_CHECKING:
    from autoquant_ray.allocate.certainty.explanation import Explanation
    from autoquant_ray.allocate.certainty.solution import Certainty
    from autoquant_ray.evaluate.audit import Audit
    from autoquant_ray.jobs.cluster import JobView
    from autoquant_ray.jobs.sweep import SweepRow

_TOP_GROUPS = 10
_TIME = "%Y-%m-%d %H:%M:%S"
_GAP = 2
"""Blanks between two columns, and before the first."""
_WIDEST_TEXT = 38
"""Characters of a word that is not folded."""

Row = Sequence[str]


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The object that ``plan --json`` prints."""
    summary: dict[str, Any] = {**plan.summary()}
    keys = ("unsearched", "tied_groups", "other_bytes", "other_modules", "flops_per_token")
    return {
        "groups": plan.rows(),
        "bits_range": list(plan.bits_range()),
        **({"kv_range": list(plan.kv_range())} if any(f.kv for f in plan.formats) else {}),
        "formats": [format_.name for format_ in plan.formats],
        "num_groups": len(plan.groups),
        "num_searched": len(plan.searched),
        **{key: summary[key] for key in keys},
        **({"separate_head": plan.separate_head} if plan.separate_head is not None else {}),
        **({"source_format": plan.source_format} if plan.source_format is not None else {}),
        **({"carried": dict(plan.carried)} if plan.carried else {}),
        **({"sample_limits": plan.limits.to_json()} if plan.limits is not None else {}),
    }


def print_plan(plan: Plan, limits: Sequence[str] = ()) -> None:
    """Groups x formats x bytes, experts told apart on one line per layer; then the totals.

    Args:
        plan: The plan.
        limits: What a checkpoint cannot hold of it.
    """
    heads, rows = ["Group", "Weights"], []
    for format_ in (*plan.formats, None):
        name, is_cache = ("none", False) if format_ is None else (format_.name, format_.kv)
        heads.append(f"{name} {'B/token' if is_cache else 'MiB'}")
    for name, groups in _shown_together(plan.groups):
        choices = plan.choices(groups[0])
        sizes = [_size(groups, f) if f in choices else "-" for f in (*plan.formats, None)]
        reason = "" if groups[0].reason is None else f" ({groups[0].reason})"
        num_weights = sum(group.num_weights for group in groups)
        rows.append([name + reason, f"{num_weights:,}", *sizes])
    print_table(heads, rows)
    show_lines(_plan_lines(plan, limits))


def _plan_lines(plan: Plan, limits: Sequence[str]) -> Iterator[str]:
    """What a plan comes to."""
    yield f"{len(plan.searched)} of {len(plan.groups)} groups searched"
    low, high = plan.bits_range()
    low, high = math.ceil(low * 1000 - 1e-6) / 1000, math.floor(high * 1000 + 1e-6) / 1000
    yield f"reachable average bits: {low:.3f} to {high:.3f}"
    if kv_names([format_.name for format_ in plan.formats]):
        low, high = plan.kv_range()
        yield f"KV cache: {reachable_cache(low, high)}"
    yield f"weights outside the groups: {plan.other_bytes / 2**20:,.1f} MiB at 16 bits"
    if plan.source_format is not None:
        yield f"source: {describe_source(plan.source_format)}"
    if plan.carried:
        yield f"carried: {describe_carried(plan.carried)}"
    if plan.separate_head is not None:
        yield f"note: {describe_separate(plan.separate_head)}"
    if plan.limits is not None and plan.limits.positions is not None:
        yield f"samples: {plan.limits.positions} tokens at most, by its table of positions"
    for limit in limits:
        yield f"export: {limit}"
    yield f"work: about {plan.flops_per_token / 1e9:,.2f} GFLOP per calibration token"


def _size(groups: Sequence[PlannedGroup], format_: Format | None) -> str:
    """MiB of weights, or bytes of a cache per token of context, named where no head says it."""
    if not groups[0].is_cache:
        return f"{sum(group.added_bytes(format_) for group in groups) / 2**20:.2f}"
    held = sum(group.kv_bytes(format_) or 0.0 for group in groups)
    return f"{held:,.0f}" if format_ is not None else f"{held:,.0f} B/token"


def _shown_together(groups: Sequence[PlannedGroup]) -> list[tuple[str, list[PlannedGroup]]]:
    """Groups with the name under which people see them: single experts of a module as one."""
    lines: dict[tuple[str, str | None], list[PlannedGroup]] = {}
    for group in groups:
        lines.setdefault((group.modules[0].path, group.reason), []).append(group)
    return [(_line_name(path, members), members) for (path, _), members in lines.items()]


def _line_name(path: str, members: Sequence[PlannedGroup]) -> str:
    is_expert = members[0].modules[0].expert is not None
    return f"{path}: {len(members)} experts" if is_expert else members[0].name


def print_solution(run: str, solution: Solution) -> None:
    """The ten most sensitive groups, the totals, and the written files."""
    rows = [
        (group, f"{sensitivity:.3e}", solution.formats[group])
        for group, sensitivity in solution.sensitivities[:_TOP_GROUPS]
    ]
    heads = ("Group", "Harshest format's score", "Chosen")
    show_lines(["Most sensitive groups:"])
    print_table(heads, rows, texts=(0, 2))
    show_lines(_solution_lines(solution))


def _solution_lines(solution: Solution) -> Iterator[str]:
    """What a solution comes to."""
    summary = solution.summary
    predicted = summary["predicted_kl_nats"]
    yield f"effective bits: {summary['effective_bits']:.4f}"
    if predicted is None:
        yield f"total score: {summary['score']:.4g} (imported, no unit)"
    else:
        yield f"predicted KL: {predicted:.4g} nats per token"
    if solution.caution is not None:
        yield f"note: {solution.caution}"
    for name, domain in summary.get("domains", {}).items():
        equal = f"({domain['equal_kl_nats']:.4g} if all domains counted alike)"
        yield f"  in {name}: {domain['predicted_kl_nats']:.4g} {equal}"
    if solution.certainty is not None:
        yield from _certainty_lines(solution.certainty, summary)
    yield f"weights of the whole model: {summary['weight_bytes'] / 2**20:,.1f} MiB"
    if KV_BYTES in summary:
        yield f"KV cache: {summary[KV_BYTES]:,.0f} bytes per token of context"
    if LATENCY in summary:
        yield f"predicted: {describe_prediction(summary[LATENCY])}"
    if solution.shards_used is not None:
        yield f"used {solution.shards_used}"
    if solution.unheld is not None:
        yield f"note: {solution.unheld}"
    if solution.separate_head is not None:
        yield f"note: {describe_separate(solution.separate_head)}"
    yield from map(_short, solution.paths.values())


def _certainty_lines(sure: Certainty, summary: dict[str, Any]) -> Iterator[str]:
    yield (
        f"decisions: {sure.num_certain} of {len(sure.kept)} certain, {len(sure.coin_tosses)} "
        f"coin tosses; expected regret {sure.expected_regret:.2%}"
    )
    if sure.null_score is not None:
        is_weighted = any(domain["weight"] for domain in summary.get("domains", {}).values())
        what = ", domains as weighted" if is_weighted else ""
        yield f"shuffled scores would lose: {sure.null_score:.4g} nats per token{what}"


def print_evaluation(
    rows: list[dict[str, Any]], tasks: list[dict[str, Any]], paths: dict[str, str]
) -> None:
    """The solution beside its rivals, scores of tasks, what it means, and the written files."""
    from autoquant_ray.report.measured import HEADS, measured_sections
    from autoquant_ray.report.task_scores.section import TASK_HEADS, task_section

    (section,) = measured_sections(rows, rows[0]["solution"], rows[0]["allocation"])
    show_lines([section.title])
    print_table(HEADS, section.rows)
    show_lines([section.verdict])
    if (scored := task_section(tasks)) is not None:
        print_table(TASK_HEADS, scored.rows, texts=(0, 1, 2))
        show_lines([scored.verdict])
    show_lines(map(_short, paths.values()))


def print_findings(rows: Sequence[tuple[str, str, str]]) -> None:
    """What the doctor found: check, state, and what is there."""
    print_table(("Check", "State", "What is there"), rows, texts=(0, 1, 2))


def print_audit(audit: Audit) -> None:
    """How far scores and measurements are apart, and what it changed."""
    from autoquant_ray.report.audit import HEADS, audit_section

    section = audit_section(audit.pairs, audit.to_json())
    show_lines([section.title])
    print_table(HEADS, section.rows, texts=(0, 1))
    show_lines([section.verdict, f"audited solution: {audit.folder.rstrip('/')}"])


def print_refinement(run: str, refined: Any) -> None:
    """What the search found, measured on data that played no part in it."""

    def text(value: tuple[float, float | None]) -> str:
        mean, error = value
        return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.1g}"

    show_lines(
        [
            f"measured KL on data that the search has not seen: {text(refined.before)} before, "
            f"{text(refined.after)} after, difference {text(refined.difference)} nats per token",
            f"{refined.num_trials} allocations tried, {refined.num_flips} of them single changes "
            f"of the start; {refined.num_accepted} improvements accepted",
        ]
    )
    print_solution(run, refined.solution)


def print_frontier(run: str, points: Sequence[Point], *, has_unit: bool = True) -> None:
    """One line per size, the knee marked.

    Args:
        run: As it was given.
        points: Of the frontier.
        has_unit: Whether losses are in nats per token; those of an imported run have no unit.
    """
    rows = [
        (
            f"{point.effective_bits:.3f}",
            f"{point.weight_bytes / 2**20:,.1f}",
            f"{point.predicted_kl:.4g}",
            "knee" if point.is_knee else "",
        )
        for point in points
    ]
    loss = "Predicted KL" if has_unit else "Total score"
    unit = "nats per token" if has_unit else "imported, no unit"
    heads = ("Bits", "MiB", f"{loss} ({unit})", "")
    show_lines([f"{loss} of {run}:"])
    print_table(heads, rows, texts=())
    show_lines([_short(f"{run.rstrip('/')}/{FRONTIER_FILE}")])


def print_explanation(explanation: Explanation) -> None:
    """What the group got and why, one line per format, and what does not fit a table."""
    from autoquant_ray.allocate.certainty.explanation import (
        head_lines,
        note_lines,
        table_heads,
        table_rows,
    )

    show_lines(head_lines(explanation))
    if explanation.formats:
        print_table(table_heads(explanation), table_rows(explanation))
    show_lines(note_lines(explanation))


def print_sweep(rows: Sequence[SweepRow]) -> None:
    """One line per model and budget, with what each solution gives or why there is none."""
    cells = []
    for row in rows:
        bits, kl, size = row.effective_bits, row.predicted_kl_nats, row.weight_bytes
        where = _short(row.manifest) if row.manifest else ""
        cells.append(
            (
                row.model,
                row.budget,
                "-" if bits is None else f"{bits:.4f}",
                "-" if kl is None else f"{kl:.4g}",
                "-" if size is None else f"{size / 2**20:,.1f}",
                str(row.exit_code),
                ": ".join(text for text in (where, row.error) if text),
            )
        )
    heads = ("Model", "Budget", "Effective bits", "Predicted KL", "MiB", "Exit", "Solution")
    print_table(heads, cells, texts=(0, 6))


def print_jobs(jobs: Sequence[JobView]) -> None:
    """One line per job."""
    rows = []
    for job in jobs:
        started = "" if job.started is None else time.strftime(_TIME, time.gmtime(job.started))
        seconds = "" if job.seconds is None else f"{job.seconds:,.0f}"
        code = "" if job.exit_code is None else str(job.exit_code)
        rows.append((job.run_id, job.state, code, started, seconds))
    heads = ("Run id", "State", "Exit", "Started (UTC)", "Seconds")
    print_table(heads, rows, texts=(0, 1, 3))


class _PlainConsole(Console):
    """Takes all text for what it says: no markup or emoji of rich, nothing that a terminal obeys.

    Names of models, formats and groups come from others, and may stand in any cell or head.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as a table shows it; ``options`` are rich's."""
        plain = {"markup": False, "emoji": False}
        return super().render_str(printable(text), **options | plain)


def print_table(heads: Row, rows: Sequence[Row], *, texts: Sequence[int] = (0,)) -> None:
    """Print a table on stdout.

    Args:
        heads: Of the columns.
        rows: Cells under them.
        texts: Numbers of the columns that hold text; those of numbers are aligned at the right.
    """
    console = _PlainConsole(width=page_width(), file=sys.stdout)
    room = console.width - _GAP
    natural = [max(map(_length, column)) for column in _columns(heads, rows)]
    least = natural
    if _total(natural) > room:
        heads = [heads[0], *(head.replace("_", "_\n") for head in heads[1:])]
        natural = [max(map(_length, column)) for column in _columns(heads, rows)]
        least = [max(map(_longest_word, column)) for column in _columns(heads, rows)]
        least = [min(w, _WIDEST_TEXT if n in texts else room) for n, w in enumerate(least)]
    for numbers in _parts(least, room):
        table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        spare = room - _total([least[number] for number in numbers])
        widths = {}
        for number in sorted(numbers, key=lambda number: number not in texts):
            more = max(0, min(spare, natural[number] - least[number]))
            widths[number], spare = least[number] + more, spare - more
        for number in numbers:
            justify: Any = "left" if number in texts else "right"
            table.add_column(heads[number], justify=justify, overflow="fold", width=widths[number])
        for row in rows:
            table.add_row(*(row[number] for number in numbers))
        console.print(table)


def _columns(heads: Row, rows: Sequence[Row]) -> list[list[str]]:
    return [[head, *(row[n] for row in rows)] for n, head in enumerate(heads)]


def _length(text: str) -> int:
    """Of the longest line."""
    return max(map(cell_len, printable(text).split("\n")))


def _longest_word(text: str) -> int:
    return max(map(cell_len, printable(text).split()), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the columns of each table; the first column is in all."""
    parts = [[0]]
    for number in range(1, len(widths)):
        if len(parts[-1]) > 1 and _total([widths[n] for n in (*parts[-1], number)]) > room:
            parts.append([0])
        parts[-1].append(number)
    return parts


def _short(path: str) -> str:
    """A path below the working directory as people type it."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
