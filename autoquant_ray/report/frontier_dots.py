"""Points of a report's frontier: the curve, this solution, uniform formats, measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoquant_ray.allocate.frontier import Point, sweep_points, uniform_points
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.report.frontier_chart import Dot
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import FRONTIER_FILE


def frontier_dots(
    directory: RunDirectory,
    problem: Problem,
    scores: Mapping[tuple[str, str], float],
    solution: Dot,
    evaluations: Sequence[Mapping[str, Any]],
) -> list[Dot]:
    """Collect the points.

    Args:
        directory: The run; ``frontier.parquet`` is used if the command ``frontier`` wrote it.
        problem: Groups with their costs.
        scores: (group, format) -> nats per token.
        solution: The solution that the report is about.
        evaluations: Rows of ``evaluation.parquet``; allocations from shuffled scores are not shown.
    """
    if directory.exists(FRONTIER_FILE):
        rows = directory.read_table(FRONTIER_FILE).to_pylist()
        curve = [Point(**row) for row in rows]
    else:
        curve = sweep_points(problem, scores)
    dots = [
        _dot("knee" if point.is_knee else "curve", "knee" if point.is_knee else "best", point)
        for point in curve
    ]
    uniform = uniform_points(problem, scores)
    dots += [_dot("uniform", f"all {name}", point) for name, point in uniform.items()]
    measured: dict[tuple[str, str], Dot] = {}
    for row in evaluations:
        if not row["name"].startswith("random "):
            measured.setdefault((row["data_key"], row["allocation"]), _measured(row))
    return [*dots, *measured.values(), solution]


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
