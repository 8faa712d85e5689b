"""Points of a report's frontier: the curve, this solution, uniform formats, measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoquant_ray.allocate.frontier import Point, sweep_points, uniform_points
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.expert_groups import ExpertGroups
from autoquant_ray.report.frontier_chart import Dot
from autoquant_ray.runs.names import FRONTIER_FILE


def frontier_dots(
    run: ScoredRun,
    expert_groups: ExpertGroups | None,
    solution: Dot,
    evaluations: Sequence[Mapping[str, Any]],
) -> list[Dot]:
    """Collect the points.

    Args:
        run: The run. Where ``frontier`` wrote ``frontier.parquet``, that is the curve, unless the
            solution clusters experts in another way than the scan.
        expert_groups: How the solution clusters experts; None: as scanned.
        solution: The solution that the report is about.
        evaluations: Rows of ``evaluation.parquet``. Allocations from shuffled scores
            are not shown.
    """
    problem, directory, experts = run.problem, run.state.directory, run.problem.experts
    ties = () if experts is None else experts.ties(expert_groups)
    is_as_scanned = experts is None or ties == experts.ties(None)
    if is_as_scanned and directory.exists(FRONTIER_FILE):
        curve = [Point(**row) for row in directory.read_table(FRONTIER_FILE).to_pylist()]
    else:
        curve = sweep_points(problem, run.scores, ties)
    dots = [
        _dot("knee" if point.is_knee else "curve", "knee" if point.is_knee else "best", point)
        for point in curve
    ]
    uniform = uniform_points(problem, run.scores)
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
