"""The frontier for many limits at once, against one limit at a time."""

from __future__ import annotations

import numpy as np
import pytest

from autoquant_ray.allocate.allocation import (
    frontier,
    frontier_allocation,
    frontier_allocations,
)
from autoquant_ray.allocate.knapsack.choices import Choice
from autoquant_ray.errors import InfeasibleBudgetError


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


def test_frontier_allocations_equal_those_one_by_one() -> None:
    choices = as_choices(*random_arrays(1))
    costs = [cost for cost, _ in frontier(choices, "bytes")]
    limits = [*np.linspace(costs[0], costs[-1] * 1.1, 20).tolist(), float("inf")]
    many = frontier_allocations(choices, "bytes", limits)
    assert many == [frontier_allocation(choices, "bytes", limit) for limit in limits]
    assert len({allocation.score for allocation in many}) > 10


def test_frontier_allocations_with_an_infeasible_limit_raises() -> None:
    choices = as_choices(*random_arrays(1))
    with pytest.raises(InfeasibleBudgetError, match="a limit of 1 on bytes"):
        frontier_allocations(choices, "bytes", [100, 1])
