"""Points of a report's frontier: the curve, this solution, uniform formats, measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoquant_ray.allocate.constrained.curve import constraints_of, curve_of, loss_of
from autoquant_ray.allocate.frontier import Point, uniform_points
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.report.charts.frontier_chart import Dot
from autoquant_ray.report.headline import budget_text


def frontier_dots(
    run: ScoredRun,
    options: SolveOptions,
    formats: Mapping[str, str],
    solution: Dot,
    evaluations: Sequence[Mapping[str, Any]],
) -> list[Dot]:
    """Collect the points.

    Args:
        run: The run.
        options: Budget and constraints of the solution that the report is about.
        formats: That solution: searched group -> format.
        solution: Its point.
        evaluations: Rows of ``evaluation.parquet``. Allocations from shuffled scores are not shown,
            and none beside a solution for domains: they were measured on all of the data.
    """
    dots = [
        _dot("knee" if point.is_knee else "curve", "knee" if point.is_knee else "best", point)
        for point in curve_of(run, options, formats)
    ]
    loss = loss_of(run, options)
    uniform = uniform_points(run.problem, loss)
    dots += [_dot("uniform", f"all {name}", point) for name, point in uniform.items()]
    measured: dict[tuple[str, str], Dot] = {}
    is_by_domain = bool(options.domains) or options.worst_domain
    for row in () if is_by_domain else evaluations:
        if not row["name"].startswith("random "):
            measured.setdefault((row["data_key"], row["allocation"]), _measured(row))
    return [*dots, *measured.values(), solution]


def curve_note(run: ScoredRun, options: SolveOptions) -> str:
    """What the curve keeps to, in words; empty where it is the best of all allocations.

    Args:
        run: The run.
        options: Budget and constraints of the solution.
    """
    kept = constraints_of(run, options)
    if kept is None:
        return ""
    words = budget_text(kept.to_json() | {"bits": None})
    held = "; the KV cache as in this solution" if run.problem.caches else ""
    held += " (other sizes solved approximately)" if kept.worst_domain else ""
    return (
        f"The best allocations keep to this solution's constraints: {words}{held}. One format "
        "everywhere need not."
    )


def loss_name(options: SolveOptions) -> str:
    """What the chart's vertical axis shows."""
    if options.worst_domain:
        return "predicted KL of the worst domain"
    return "weighted predicted KL of the domains" if options.domains else "predicted KL"


def _dot(kind: str, name: str, point: Point) -> Dot:
    return Dot(
        kind=kind,
        name=name,
        bits=point.effective_bits,
        num_bytes=point.weight_bytes,
        loss=point.predicted_kl,
    )


def _measured(row: Mapping[str, Any]) -> Dot:
    name = row["name"]
    if name == "solution":
        name = f"solution {row['solution']}" if row["solution"] else "the scan's own solution"
    return Dot(
        kind="measured",
        name=f"measured, {name} on {row['dataset']}",
        bits=row["effective_bits"],
        num_bytes=row["weight_bytes"],
        loss=row["kl_mean"],
        stderr=row["kl_stderr"],
    )
