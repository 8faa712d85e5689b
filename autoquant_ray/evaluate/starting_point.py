"""The solution that an audit or a refinement tries to improve, with all that it was solved from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.allocate.candidate import (
    Candidate,
    as_allocation,
    make_candidate,
    without_domains,
)
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun, solution_formats, solution_options
from autoquant_ray.allocate.search import served_problem
from autoquant_ray.solve import Solution, write_solution


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """An allocation with its problem.

    Attributes:
        problem: Groups with their costs.
        scores: (group, format) -> predicted loss in nats per token.
        options: Budgets and constraints, which the allocation satisfies.
        formats: The allocation: searched group -> format.
    """

    problem: Problem
    scores: Scores
    options: SolveOptions
    formats: dict[str, str]

    def candidate(self, name: str, formats: Mapping[str, str]) -> Candidate:
        """Name an allocation of the problem."""
        return make_candidate(self.problem, self.scores, name, formats)


def starting_point(run: ScoredRun, folder: str) -> StartingPoint:
    """Read a solution with its problem; weights of domains are dropped.

    Args:
        run: A finished run.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.

    Raises:
        StoreError: The solution does not exist.
    """
    options = without_domains(solution_options(run.state, folder))
    problem = run.problem.timed(options.latency)
    formats = solution_formats(run.state, folder, problem)
    return StartingPoint(
        problem=served_problem(problem, options, formats),
        scores=run.scores,
        options=options,
        formats=formats,
    )


def write_candidate(
    run: ScoredRun, origin: StartingPoint, candidate: Candidate, notes: dict[str, Any]
) -> Solution:
    """Write an improved allocation as a solution of its name, beside the original.

    Args:
        run: The run.
        origin: The original with its problem.
        candidate: The improved allocation.
        notes: Further objects of ``manifest.json``.
    """
    allocation = as_allocation(origin.problem, origin.scores, origin.options, candidate)
    run = run.with_problem(origin.problem)
    return write_solution(run, origin.options, allocation, candidate.name, notes)
