"""The frontier from arrays, and for many limits at once, against one limit at a time."""

from __future__ import annotations

import numpy as np
import pytest

from autoquant_ray.allocation import (
    Choice,
    frontier,
    frontier_allocation,
    frontier_allocations,
)
from autoquant_ray.errors import InfeasibleBudgetError
from autoquant_ray.knapsack_greedy import frontier_columns


def random_arrays(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and costs of 30 groups and 6 formats; some groups lack a format."""
    rng = np.random.default_rng(seed)
    scores_GF = 10.0 ** -rng.uniform(0, 9, (30, 6))
    scores_GF[rng.random((30, 6)) < 0.1] = np.inf
    scores_GF[:, -1] = 0.0
    return scores_GF, rng.uniform(1, 9, (30, 6))


def as_choices(scores_GF: np.ndarray, costs_GF: np.ndarray) -> list[Choice]:
    return [
        Choice(group=f"g{g}", format=f"f{f}", score=float(score), costs={"bytes": costs_GF[g, f]})
        for (g, f), score in np.ndenumerate(scores_GF)
        if np.isfinite(score)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_frontier_columns_equal_the_allocation_by_names(seed: int) -> None:
    scores_GF, costs_GF = random_arrays(seed)
    choices = as_choices(scores_GF, costs_GF)
    points = frontier(choices, "bytes")
    for cost, score in [points[0], points[len(points) // 2], points[-1]]:
        columns_G = frontier_columns(scores_GF, costs_GF, cost + 1e-6)
        assert columns_G is not None
        named = {f"g{g}": f"f{f}" for g, f in enumerate(columns_G)}
        assert named == frontier_allocation(choices, "bytes", cost + 1e-6).formats
        assert scores_GF[np.arange(30), columns_G].sum() == pytest.approx(score, rel=1e-12)


def test_frontier_columns_below_the_cheapest_is_none() -> None:
    scores_GF, costs_GF = random_arrays(0)
    least = np.where(np.isfinite(scores_GF), costs_GF, np.inf).min(axis=1).sum()
    assert frontier_columns(scores_GF, costs_GF, least * 0.999) is None
    assert frontier_columns(scores_GF, costs_GF, least) is not None


def test_frontier_allocations_equal_those_one_by_one() -> None:
    choices = as_choices(*random_arrays(1))
    costs = [cost for cost, _ in frontier(choices, "bytes")]
    limits = [*np.linspace(costs[0], costs[-1] * 1.1, 20).tolist(), float("inf")]
    many = frontier_allocations(choices, "bytes", limits)
    assert many == [frontier_allocation(choices, "bytes", limit) for limit in limits]
    assert len({found.score for found in many}) > 10


def test_frontier_allocations_with_an_infeasible_limit_raises() -> None:
    choices = as_choices(*random_arrays(1))
    with pytest.raises(InfeasibleBudgetError, match="a limit of 1 on bytes"):
        frontier_allocations(choices, "bytes", [100, 1])
