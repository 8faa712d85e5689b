"""Costs on a lattice: the common step, and bounds that no allocation may beat."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.lattice import common_step, fill, find
from autoquant_ray.allocate.knapsack.single import solve_single


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([6.0, 10.0, 15.0], 1.0),
        ([0.0, 12.0, 20.0, 32.0], 4.0),
        ([0.3, 0.7, 1.1], 0.1),
        ([7 * 2**24 * 12 / 88, 3 * 2**20 * 12 / 88], 2**20 * 12 / 88),
        ([0.0, 0.0], 0.0),
        ([1.0, 2**0.5, 3**0.5], 0.0),
    ],
)
def test_common_step_is_the_greatest_divisor(values: list[float], step: float) -> None:
    assert common_step(np.array(values)) == pytest.approx(step, rel=1e-12, abs=0)


def test_common_step_of_many_rounded_multiples() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(100, 20_000, 500)
    counts[:2] = 101, 103
    assert common_step(counts * (4096 * 12 / 88)) == pytest.approx(4096 * 12 / 88, rel=1e-12)


def lattice_problem(seed: int) -> Knapsack:
    """A few groups with costs in whole steps, some scores equal, and a limit between steps."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(2, 7)), int(rng.integers(2, 5)))
    step = float(rng.choice([1.0, 7.0, 12 / 11]))
    costs_GF = rng.integers(1, 12, shape) * step
    scores_GF = rng.random(shape) if rng.random() < 0.5 else rng.integers(0, 5, shape) / 4
    low, high = costs_GF.min(axis=1).sum(), costs_GF.max(axis=1).sum()
    limit = low + rng.uniform(0, 1) * (high - low)
    return Knapsack(scores_GF=scores_GF, costs_RGF=costs_GF[None], limits_R=np.array([limit]))


def brute_force(knapsack: Knapsack) -> float:
    """The best score within the limit, by trying everything."""
    num_groups, num_formats = knapsack.scores_GF.shape
    columns = itertools.product(range(num_formats), repeat=num_groups)
    within = (np.array(c) for c in columns if knapsack.is_within(np.array(c)))
    return min(knapsack.score(columns_G) for columns_G in within)


@pytest.mark.parametrize("seed", range(300))
def test_fill_bound_and_score_enclose_the_best(seed: int) -> None:
    knapsack = lattice_problem(seed)
    lattice = find(knapsack)
    assert lattice is not None
    assert lattice.knapsack.limits_R[0] <= knapsack.limits_R[0]
    relaxed = relax(lattice.knapsack)
    assert relaxed is not None
    answer = fill(lattice, relaxed.multiplier_R, relaxed.prefix_G, relaxed.answer)
    best = brute_force(knapsack)
    assert knapsack.is_within(answer.columns_G)
    assert answer.score == knapsack.score(answer.columns_G)
    assert relaxed.answer.lower <= answer.lower <= best * (1 + 1e-12)
    assert best * (1 - 1e-12) <= answer.score <= relaxed.answer.score


def best_by_counts(counts_GF: np.ndarray, scores_GF: np.ndarray, capacity: int) -> float:
    """The best score by the textbook programme over whole costs."""
    best_C = np.zeros(capacity + 1)
    for counts_F, scores_F in zip(counts_GF, scores_GF, strict=True):
        after_C = np.full(capacity + 1, np.inf)
        for count, score in zip(counts_F, scores_F, strict=True):
            end = capacity + 1 - count
            after_C[count:] = np.minimum(after_C[count:], best_C[:end] + score)
        best_C = after_C
    return float(best_C.min())


@pytest.mark.parametrize("seed", range(6))
def test_solve_single_nearly_equal_groups_equals_the_textbook_programme(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts_GF = rng.choice([3, 16, 20], 400)[:, None] * np.array([1, 2, 3, 5])
    scores_GF = 4.0 ** -np.arange(4) * (1 + 1e-3 * rng.random((400, 4)))
    capacity = int(counts_GF[:, 1].sum() * 1.1)
    knapsack = Knapsack(
        scores_GF=scores_GF,
        costs_RGF=counts_GF[None].astype(float),
        limits_R=np.array([capacity + 0.5]),
    )
    answer = solve_single(knapsack)
    assert answer is not None
    best = best_by_counts(counts_GF, scores_GF, capacity)
    assert answer.lower <= best * (1 + 1e-12)
    assert best * (1 - 1e-12) <= answer.score <= best * (1 + 1e-6)
    assert answer.gap <= 1e-6
