"""What commands print for people, on stdout."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoquant_ray.allocate.frontier import Point
from autoquant_ray.allocate.latency import LATENCY, describe_prediction
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
    from autoquant_ray.evaluate.audit import Audit
    from autoquant_ray.jobs.cluster import JobView
    from autoquant_ray.jobs.sweep import SweepRow

_TOP_GROUPS = 10
_FILE_WIDTH = 200
_PAGE_WIDTH, _WHOLE_WIDTH = 80, 156
"""Columns of a table that is piped; and from where on a measurement is one table, not two."""
_TIME = "%Y-%m-%d %H:%M:%S"


class _PlainConsole(Console):
    """Takes all text for what it says: no markup or emoji of rich, nothing that a terminal obeys.

    Names of models, formats and groups come from others, and may stand in any cell or head.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as a table or a line shows it; ``options`` are rich's."""
        plain = {"markup": False, "emoji": False}
        return super().render_str(printable(text), **options | plain)


def _console() -> Console:
    """Wide where the output is not a terminal, so that names stay on one line."""
    console = _PlainConsole()
    return console if console.is_terminal else _PlainConsole(width=_FILE_WIDTH)


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
    console = _console()
    table = Table(box=box.SIMPLE)
    table.add_column("Group", overflow="fold", no_wrap=True)
    table.add_column("Weights", justify="right")
    for format_ in (*plan.formats, None):
        name, is_cache = ("none", False) if format_ is None else (format_.name, format_.kv)
        table.add_column(f"{name} {'B/token' if is_cache else 'MiB'}", justify="right")
    for name, groups in _shown_together(plan.groups):
        choices = plan.choices(groups[0])
        sizes = [_size(groups, f) if f in choices else "-" for f in (*plan.formats, None)]
        reason = "" if groups[0].reason is None else f" ({groups[0].reason})"
        num_weights = sum(group.num_weights for group in groups)
        table.add_row(name + reason, f"{num_weights:,}", *sizes)
    console.print(table)
    low, high = plan.bits_range()
    console.print(f"{len(plan.searched)} of {len(plan.groups)} groups searched")
    low, high = math.ceil(low * 1000 - 1e-6) / 1000, math.floor(high * 1000 + 1e-6) / 1000
    console.print(f"reachable average bits: {low:.3f} to {high:.3f}")
    if kv_names([format_.name for format_ in plan.formats]):
        low, high = plan.kv_range()
        console.print(f"KV cache: {reachable_cache(low, high)}")
    console.print(f"weights outside the groups: {plan.other_bytes / 2**20:,.1f} MiB at 16 bits")
    if plan.source_format is not None:
        console.print(f"source: {describe_source(plan.source_format)}", soft_wrap=True)
    if plan.carried:
        console.print(f"carried: {describe_carried(plan.carried)}", soft_wrap=True)
    if plan.separate_head is not None:
        console.print(f"note: {describe_separate(plan.separate_head)}", soft_wrap=True)
    if plan.limits is not None and plan.limits.positions is not None:
        console.print(f"samples: {plan.limits.positions} tokens at most, by its table of positions")
    for limit in limits:
        console.print(f"export: {limit}", soft_wrap=True)
    console.print(f"work: about {plan.flops_per_token / 1e9:,.2f} GFLOP per calibration token")


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
    console = _console()
    console.print(_sensitive_groups(solution))
    summary = solution.summary
    predicted = summary["predicted_kl_nats"]
    console.print(f"effective bits: {summary['effective_bits']:.4f}")
    if predicted is None:
        console.print(f"total score: {summary['score']:.4g} (imported, no unit)")
    else:
        console.print(f"predicted KL: {predicted:.4g} nats per token")
    if solution.caution is not None:
        console.print(f"note: {solution.caution}", soft_wrap=True)
    for name, domain in summary.get("domains", {}).items():
        console.print(
            f"  in {name}: {domain['predicted_kl_nats']:.4g} "
            f"({domain['equal_kl_nats']:.4g} if all domains counted alike)"
        )
    if solution.certainty is not None:
        sure = solution.certainty
        console.print(
            f"decisions: {sure.num_certain} of {len(sure.kept)} certain, {len(sure.coin_tosses)} "
            f"coin tosses; expected regret {sure.expected_regret:.2%}"
        )
        if sure.null_score is not None:
            is_weighted = any(domain["weight"] for domain in summary.get("domains", {}).values())
            what = ", domains as weighted" if is_weighted else ""
            console.print(f"shuffled scores would lose: {sure.null_score:.4g} nats per token{what}")
    console.print(f"weights of the whole model: {summary['weight_bytes'] / 2**20:,.1f} MiB")
    if KV_BYTES in summary:
        console.print(f"KV cache: {summary[KV_BYTES]:,.0f} bytes per token of context")
    if LATENCY in summary:
        console.print(f"predicted: {describe_prediction(summary[LATENCY])}", soft_wrap=True)
    if solution.shards_used is not None:
        console.print(f"used {solution.shards_used}", soft_wrap=True)
    if solution.unheld is not None:
        console.print(f"note: {solution.unheld}", soft_wrap=True)
    if solution.separate_head is not None:
        console.print(f"note: {describe_separate(solution.separate_head)}", soft_wrap=True)
    for path in solution.paths.values():
        console.print(_short(path), soft_wrap=True)


def _sensitive_groups(solution: Solution) -> Table:
    """The most sensitive groups with their formats."""
    table = Table(title="Most sensitive groups", box=box.SIMPLE)
    table.add_column("Group", overflow="fold", no_wrap=True)
    table.add_column("Harshest format's score", justify="right")
    table.add_column("Chosen")
    for group, sensitivity in solution.sensitivities[:_TOP_GROUPS]:
        table.add_row(group, f"{sensitivity:.3e}", solution.formats[group])
    return table


def print_evaluation(
    rows: list[dict[str, Any]], tasks: list[dict[str, Any]], paths: dict[str, str]
) -> None:
    """The solution beside its rivals, scores of tasks, what it means, and the written files."""
    from autoquant_ray.report.measured import HEADS, measured_sections
    from autoquant_ray.report.task_scores.section import TASK_HEADS, task_section

    console = _console()
    (section,) = measured_sections(rows, rows[0]["solution"], rows[0]["allocation"])
    console.print(section.title, soft_wrap=True)
    is_wide = console.is_terminal and console.width >= _WHOLE_WIDTH
    parts = (range(1, len(HEADS)),) if is_wide else (range(1, 5), range(5, len(HEADS)))
    for numbers in parts:
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column(HEADS[0], overflow="fold")
        for number in numbers:
            words = [*HEADS[number].split(), *(row[number] for row in section.rows)]
            width = None if is_wide else max(map(len, words))
            table.add_column(HEADS[number], justify="right", width=width)
        for row in section.rows:
            table.add_row(row[0], *(row[number] for number in numbers))
        console.print(table, width=None if is_wide else min(console.width, _PAGE_WIDTH))
    console.print(section.verdict, soft_wrap=True)
    if (scored := task_section(tasks)) is not None:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for number, head in enumerate(TASK_HEADS):
            table.add_column(head, overflow="fold", justify="right" if number > 2 else "left")
        for row in scored.rows:
            table.add_row(*row)
        console.print(table, width=None if is_wide else min(console.width, _PAGE_WIDTH))
        console.print(scored.verdict, soft_wrap=True)
    for path in paths.values():
        console.print(_short(path), soft_wrap=True)


def print_findings(rows: Sequence[tuple[str, str, str]]) -> None:
    """What the doctor found: check, state, and what is there."""
    console = _console()
    table = Table(box=box.SIMPLE, pad_edge=False)
    for head in ("Check", "State"):
        table.add_column(head, no_wrap=True)
    table.add_column("What is there", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, width=console.width if console.is_terminal else _PAGE_WIDTH)


def print_audit(audit: Audit) -> None:
    """How far scores and measurements are apart, and what it changed."""
    from autoquant_ray.report.audit import HEADS, audit_section

    console = _console()
    section = audit_section(audit.pairs, audit.to_json())
    table = Table(box=box.SIMPLE)
    for number, head in enumerate(HEADS):
        table.add_column(head, justify="right" if number > 1 else "left")
    for row in section.rows:
        table.add_row(*row)
    console.print(section.title, soft_wrap=True)
    console.print(table)
    console.print(section.verdict, soft_wrap=True)
    console.print(f"audited solution: {audit.folder.rstrip('/')}", soft_wrap=True)


def print_refinement(run: str, refined: Any) -> None:
    """What the search found, measured on data that played no part in it."""
    console = _console()

    def text(value: tuple[float, float | None]) -> str:
        mean, error = value
        return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.1g}"

    console.print(
        f"measured KL on data that the search has not seen: {text(refined.before)} before, "
        f"{text(refined.after)} after, difference {text(refined.difference)} nats per token"
    )
    console.print(
        f"{refined.num_trials} allocations tried, {refined.num_flips} of them single changes of "
        f"the start; {refined.num_accepted} improvements accepted"
    )
    print_solution(run, refined.solution)


def print_frontier(run: str, points: Sequence[Point]) -> None:
    """One line per size, the knee marked."""
    console = _console()
    table = Table(title=f"Predicted KL of {run}", box=box.SIMPLE)
    for head in ("Bits", "MiB", "Predicted KL (nats per token)", ""):
        table.add_column(head, justify="right")
    for point in points:
        table.add_row(
            f"{point.effective_bits:.3f}",
            f"{point.weight_bytes / 2**20:,.1f}",
            f"{point.predicted_kl:.4g}",
            "knee" if point.is_knee else "",
        )
    console.print(table)
    console.print(_short(f"{run.rstrip('/')}/{FRONTIER_FILE}"), soft_wrap=True)


def print_explanation(explanation: Explanation) -> None:
    """What the group got and why, one line per format, and what does not fit a table."""
    from autoquant_ray.allocate.certainty.explanation import (
        head_lines,
        note_lines,
        table_heads,
        table_rows,
    )

    console = _console()
    for line in head_lines(explanation):
        console.print(line, soft_wrap=True)
    if explanation.formats:
        table = Table(box=box.SIMPLE)
        for number, head in enumerate(table_heads(explanation)):
            table.add_column(head, justify="right" if number else "left")
        for row in table_rows(explanation):
            table.add_row(*row)
        console.print(table)
    for line in note_lines(explanation):
        console.print(line, soft_wrap=True)


def print_sweep(rows: Sequence[SweepRow]) -> None:
    """One line per model and budget, with what each solution gives or why there is none."""
    table = Table(title="Sweep", box=box.SIMPLE)
    table.add_column("Model", overflow="fold")
    for name in ("Budget", "Effective bits", "Predicted KL", "MiB"):
        table.add_column(name, justify="right")
    table.add_column("Exit", justify="right")
    table.add_column("Solution", overflow="fold")
    for row in rows:
        bits, kl, size = row.effective_bits, row.predicted_kl_nats, row.weight_bytes
        where = _short(row.manifest) if row.manifest else ""
        table.add_row(
            row.model,
            row.budget,
            "-" if bits is None else f"{bits:.4f}",
            "-" if kl is None else f"{kl:.4g}",
            "-" if size is None else f"{size / 2**20:,.1f}",
            str(row.exit_code),
            ": ".join(text for text in (where, row.error) if text),
        )
    _console().print(table)


def print_jobs(jobs: Sequence[JobView]) -> None:
    """One line per job."""
    table = Table(box=box.SIMPLE)
    table.add_column("Run id", no_wrap=True)
    table.add_column("State")
    table.add_column("Exit", justify="right")
    table.add_column("Started (UTC)")
    table.add_column("Seconds", justify="right")
    for job in jobs:
        started = "" if job.started is None else time.strftime(_TIME, time.gmtime(job.started))
        seconds = "" if job.seconds is None else f"{job.seconds:,.0f}"
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(job.run_id, job.state, code, started, seconds)
    _console().print(table)


def _short(path: str) -> str:
    """A path below the working directory as people type it."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
