"""All budgets of a run at once: what each size would lose, and the smallest size within a loss.

Every point is an exact solve. Beyond the knee (:mod:`autoquant_ray.allocate.frontier`) bytes buy
less.
"""

from __future__ import annotations

import numpy as np

from autoquant_ray.allocate.frontier import (
    NUM_POINTS,
    Point,
    Scores,
    mark_knee,
    point_of,
    reachable_bits,
    rounded_up,
)
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import load_problem
from autoquant_ray.allocate.search import search
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import FRONTIER_FILE
from autoquant_ray.runs.state import RunState

_NUM_HALVINGS = 50


def frontier_of(directory: RunDirectory, num_points: int = NUM_POINTS) -> list[Point]:
    """Solve budgets along the whole reachable range and write ``frontier.parquet``.

    Args:
        directory: A run whose scores are complete.
        num_points: Number of budgets, evenly spaced in bits.

    Raises:
        StoreError: Not a run, or its files are damaged.
        ConfigError: Fewer than two points.
    """
    if num_points < 2:
        raise ConfigError(f"a frontier of {num_points} points: give 2 or more")
    state = RunState.open(directory)
    problem, scores = load_problem(state)
    low, high = reachable_bits(problem)
    points = [
        _solve(problem, scores, _options(state, float(bits)))
        for bits in np.linspace(low, high, num_points)
    ]
    points = mark_knee(points)
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
        InfeasibleBudgetError: Even 16 bits are not enough: the loss asked for is negative, or less
            than what the limit on the KV cache loses.
    """
    state = RunState.open(directory)
    problem, scores = load_problem(state)
    if not largest_kl >= 0:
        raise InfeasibleBudgetError(
            f"a predicted KL of {largest_kl:g} cannot be met; 16 bits lose 0"
        )
    low, high = reachable_bits(problem)
    lost = _solve(problem, scores, _options(state, high)).predicted_kl
    if lost > largest_kl:
        raise InfeasibleBudgetError(
            f"a predicted KL of {largest_kl:g} cannot be met: the run's limit on the KV cache "
            f"alone loses {lost:.4g}"
        )
    if _solve(problem, scores, _options(state, low)).predicted_kl <= largest_kl:
        return _options(state, low)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if _solve(problem, scores, _options(state, middle)).predicted_kl <= largest_kl:
            high = middle
        else:
            low = middle
    exact = _solve(problem, scores, _options(state, high))
    return _options(state, min(high, rounded_up(exact.effective_bits)))


def _options(state: RunState, bits: float) -> SolveOptions:
    """A budget in bits, with the scan's own limit on the KV cache."""
    return SolveOptions(bits=bits, kv_bytes_per_token=(state.values["config"] or {}).get(KV_BYTES))


def _solve(problem: Problem, scores: Scores, options: SolveOptions) -> Point:
    return point_of(problem, scores, search(problem, scores, options).formats)
