"""All budgets of a run at once: what each size would lose, and the smallest size within a loss.

Every point is an exact solve. The knee is the point farthest below the straight line between the
ends, sizes and logarithms of losses scaled to 0..1 (Satopaa et al. 2011, "Finding a kneedle in a
haystack"): beyond it bytes buy less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.candidates import make_candidate
from autoquant_ray.errors import InfeasibleBudgetError
from autoquant_ray.solve import load_problem
from autoquant_ray.state import RunState
from autoquant_ray.store import RunDirectory

NUM_POINTS = 64
FRONTIER_FILE = "frontier.parquet"
_NUM_HALVINGS = 50

Scores = Mapping[tuple[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget.

    Attributes:
        effective_bits: Average stored bits over the searched groups.
        weight_bytes: Of the whole model.
        predicted_kl: In nats per token.
        is_knee: Beyond it bytes buy less.
    """

    effective_bits: float
    weight_bytes: float
    predicted_kl: float
    is_knee: bool = False


def frontier_of(directory: RunDirectory, num_points: int = NUM_POINTS) -> list[Point]:
    """Solve budgets along the whole reachable range and write ``frontier.parquet``.

    Args:
        directory: A run whose scores are complete.
        num_points: Number of budgets, evenly spaced in bits.

    Raises:
        StoreError: Not a run, or its files are damaged.
    """
    problem, scores = load_problem(RunState.open(directory))
    low, high = reachable_bits(problem)
    points = [
        _solve(problem, scores, SolveOptions(bits=float(bits)))
        for bits in np.linspace(low, high, num_points)
    ]
    points = _distinct(points)
    knee = find_knee(points)
    points = [replace(point, is_knee=number == knee) for number, point in enumerate(points)]
    directory.write_table(FRONTIER_FILE, "frontier", [vars(point) for point in points])
    return points


def smallest_within(directory: RunDirectory, largest_kl: float) -> SolveOptions:
    """The smallest budget whose solution is predicted to lose at most so much.

    Args:
        directory: A run whose scores are complete.
        largest_kl: Nats per token.

    Returns:
        Options of ``solve`` whose solution is it.

    Raises:
        InfeasibleBudgetError: Even 16 bits are not enough: the loss asked for is negative.
    """
    problem, scores = load_problem(RunState.open(directory))
    if not largest_kl >= 0:
        raise InfeasibleBudgetError(
            f"a predicted KL of {largest_kl:g} cannot be met; 16 bits lose 0"
        )
    low, high = reachable_bits(problem)
    if _solve(problem, scores, SolveOptions(bits=low)).predicted_kl <= largest_kl:
        return SolveOptions(bits=low)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if _solve(problem, scores, SolveOptions(bits=middle)).predicted_kl <= largest_kl:
            high = middle
        else:
            low = middle
    exact = _solve(problem, scores, SolveOptions(bits=high))
    return SolveOptions(bits=min(high, _rounded_up(exact.effective_bits)))


def reachable_bits(problem: Problem) -> tuple[float, float]:
    """Least and most average stored bits over the searched groups."""
    weights = sum(group.num_weights for group in problem.searched)

    def average(choose: Any) -> float:
        costs = (choose(g.cost(f, "storage") for f in g.rows) for g in problem.searched)
        return 8 * math.fsum(costs) / weights

    return _rounded_up(average(min)), average(max)


def find_knee(points: Sequence[Point]) -> int | None:
    """Index of the knee; None where fewer than three points lose anything."""
    losing = [n for n, point in enumerate(points) if point.predicted_kl > 0]
    if len(losing) < 3:
        return None
    sizes = np.array([points[n].weight_bytes for n in losing])
    losses = np.log([points[n].predicted_kl for n in losing])
    x = (sizes - sizes[0]) / (sizes[-1] - sizes[0])
    y = (losses - losses[-1]) / (losses[0] - losses[-1])
    return losing[int(np.argmax(1 - x - y))]


def _solve(problem: Problem, scores: Scores, options: SolveOptions) -> Point:
    formats = problem.solve(scores, options).formats
    found = make_candidate(problem, scores, "", formats)
    return Point(
        effective_bits=found.effective_bits,
        weight_bytes=found.weight_bytes,
        predicted_kl=found.predicted_kl,
    )


def _distinct(points: Sequence[Point]) -> list[Point]:
    """Drop budgets that led to the same solution, and those that no byte distinguishes."""
    return list({point.effective_bits: point for point in points}.values())


def _rounded_up(bits: float) -> float:
    """A hair more, so that a cost of exactly so many bits is within it."""
    return min(16.0, bits * (1 + 1e-12))
