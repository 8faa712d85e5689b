"""The expected regret against brute force, and against the regret of a simulated truth."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoquant_ray.allocate.certainty.resampling import allocate, assess
from autoquant_ray.allocate.knapsack.knapsack import Knapsack


def unscored(costs_GF: Any, limit: float) -> Knapsack:
    costs = np.asarray(costs_GF, dtype=np.float64)
    return Knapsack(
        scores_GF=np.zeros(costs.shape), costs_RGF=costs[None], limits_R=np.array([limit])
    )


def brute_allocation(scores: list[list[float]], costs: list[list[float]], limit: float) -> Any:
    """The best allocation, by trying all."""
    everything = itertools.product(*(range(len(row)) for row in scores))
    within = [a for a in everything if sum(costs[g][f] for g, f in enumerate(a)) <= limit]
    return min(within, key=lambda a: sum(scores[g][f] for g, f in enumerate(a)))


def brute_assess(
    sums: list[list[list[float]]], tokens: list[int], costs: Any, limit: float, seed: Any, num: int
) -> tuple[float, list[float], Any]:
    """Regret, kept shares and allocation as they are defined, on scores per token."""
    num_shards, num_groups, num_formats = len(sums), len(sums[0]), len(sums[0][0])

    def scores(shards: list[int]) -> list[list[float]]:
        total = sum(tokens[s] for s in shards)
        return [
            [0.5 * sum(sums[s][g][f] for s in shards) / total for f in range(num_formats)]
            for g in range(num_groups)
        ]

    truth = scores(list(range(num_shards)))

    def score(allocation: Any) -> float:
        return sum(truth[g][f] for g, f in enumerate(allocation))

    chosen = brute_allocation(truth, costs, limit)
    draws = np.random.default_rng(seed).integers(num_shards, size=(num, num_shards))
    others = [brute_allocation(scores(draw.tolist()), costs, limit) for draw in draws]
    regret = sum(score(other) - score(chosen) for other in others) / num / score(chosen)
    kept = [sum(other[g] == chosen[g] for other in others) / num for g in range(num_groups)]
    return regret, kept, chosen


@pytest.mark.parametrize("seed", range(5))
def test_assess_equals_brute_force(seed: int) -> None:
    """Steps of equal cost along convex hulls: there the frontier is exact."""
    rng = np.random.default_rng(seed)
    gains_SGF = np.sort(rng.gamma(0.7, size=(6, 4, 3)), axis=2)  # the smallest is the last step's
    sums_SGF = np.pad(gains_SGF.cumsum(axis=2)[:, :, ::-1], ((0, 0), (0, 0), (0, 1)))
    costs = [[1.0, 2.0, 3.0, 4.0]] * 4
    tokens = rng.integers(10, 90, size=6).tolist()
    stability = assess(unscored(costs, 9.0), sums_SGF, (seed, 6), num_resamples=60)
    assert stability is not None
    regret, kept, chosen = brute_assess(sums_SGF.tolist(), tokens, costs, 9.0, (seed, 6), 60)
    assert regret > 0
    assert stability.expected_regret == pytest.approx(regret, rel=1e-9)
    assert stability.kept_G.tolist() == pytest.approx(kept)
    assert stability.columns_G.tolist() == list(chosen)


def simulated(rng: np.random.Generator) -> tuple[Any, Any, float]:
    """True scores and costs of 40 groups in 4 formats, and a limit of 6 bits."""
    weights_G1 = rng.choice([1.0, 2.0, 3.0, 8.0], size=(40, 1))
    bits_F = np.array([4.125, 8.0, 8.5, 16.0])
    truth_GF = weights_G1 * 10 ** rng.uniform(-5, -3, size=(40, 1)) * 4.0 ** (4 - bits_F)
    truth_GF[:, -1] = 0
    return truth_GF, weights_G1 * bits_F, float(weights_G1.sum() * 6)


@pytest.mark.parametrize("num_shards", [12, 60])
def test_assess_predicts_the_regret_of_a_known_truth(num_shards: int) -> None:
    """Mean over 120 models; the bootstrap is not exact, so within a factor of 1.5."""
    rng = np.random.default_rng(0)
    expected, actual = [], []
    for repeat in range(120):
        truth_GF, costs_GF, limit = simulated(rng)
        knapsack = unscored(costs_GF, limit)
        true_knapsack = replace(knapsack, scores_GF=truth_GF)
        best = allocate(true_knapsack)
        noise_SGF = rng.gamma(0.8, 1 / 0.8, size=(num_shards, *truth_GF.shape))
        stability = assess(knapsack, noise_SGF * truth_GF, (repeat, num_shards), num_resamples=60)
        assert stability is not None
        assert best is not None
        expected.append(stability.expected_regret)
        actual.append(
            max(0.0, true_knapsack.score(stability.columns_G) / true_knapsack.score(best[0]) - 1)
        )
    assert np.mean(actual) / 1.5 < np.mean(expected) < np.mean(actual) * 1.5


def test_assess_identical_shards_have_no_regret() -> None:
    truth_GF, costs_GF, limit = simulated(np.random.default_rng(0))
    stability = assess(unscored(costs_GF, limit), np.stack([truth_GF] * 10), (0, 10))
    assert stability is not None
    assert stability.expected_regret == 0
    assert (stability.kept_G == 1).all()


def test_assess_names_the_coin_tosses() -> None:
    """Two groups whose scores are equal share one step; a third never changes."""
    rng = np.random.default_rng(0)
    sums_SGF = np.zeros((100, 3, 2))
    sums_SGF[:, :2, 0] = rng.gamma(2.0, 0.5, size=(100, 2))
    sums_SGF[:, :2, 0] *= 1 / sums_SGF[:, :2, 0].mean(axis=0)
    sums_SGF[:, 2, 0] = 50.0
    stability = assess(unscored([[1.0, 2.0]] * 3, 5.0), sums_SGF, (0, 100))
    assert stability is not None
    assert stability.kept_G[2] == 1
    assert ((stability.kept_G[:2] > 0.3) & (stability.kept_G[:2] < 0.7)).all()
    assert stability.expected_regret < 1e-9


def test_assess_without_any_loss_has_no_regret() -> None:
    """The budget lets every group stay in 16 bits."""
    sums_SGF = np.random.default_rng(0).gamma(1.0, size=(9, 3, 2)) * [1.0, 0.0]
    stability = assess(unscored([[1.0, 2.0]] * 3, 6.0), sums_SGF, (0, 9))
    assert stability is not None
    assert stability.expected_regret == 0
    assert stability.columns_G.tolist() == [1, 1, 1]


def test_assess_limit_that_cannot_be_met_is_unknown() -> None:
    assert assess(unscored([[1.0, 2.0]] * 3, 2.9), np.ones((9, 3, 2)), (0, 9)) is None


def test_assess_ignores_formats_that_a_group_lacks() -> None:
    knapsack = unscored([[1.0, 2.0], [0.0, 2.0]], 3.0)
    knapsack.scores_GF[1, 0] = np.inf
    stability = assess(knapsack, np.array([[[3.0, 0.0], [0.0, 0.0]]] * 9), (0, 9))
    assert stability is not None
    assert stability.columns_G.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(30))
def test_allocate_under_two_limits_is_within_both_and_near_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores_GF = np.sort(rng.gamma(0.5, size=(6, 4)), axis=1)[:, ::-1]
    costs_RGF = np.sort(rng.uniform(1, 10, size=(2, 6, 4)), axis=2)
    limits_R = costs_RGF.min(axis=2).sum(axis=1) * 1.6
    knapsack = Knapsack(scores_GF=scores_GF, costs_RGF=costs_RGF, limits_R=limits_R)
    best = min(
        knapsack.score(np.array(columns))
        for columns in itertools.product(range(4), repeat=6)
        if knapsack.is_within(np.array(columns))
    )
    solution = allocate(knapsack)
    assert solution is not None
    columns_G, price = solution
    assert knapsack.is_within(columns_G)
    assert best <= knapsack.score(columns_G) <= 1.3 * best
    again = allocate(knapsack, price)
    assert again is not None
    assert knapsack.score(again[0]) == pytest.approx(knapsack.score(columns_G), rel=0.1)


def test_allocate_limits_that_exclude_each_other_is_none() -> None:
    costs_RGF = np.array([[[1.0, 3.0]], [[3.0, 1.0]]])
    knapsack = Knapsack(
        scores_GF=np.array([[1.0, 2.0]]), costs_RGF=costs_RGF, limits_R=np.array([2.0, 2.0])
    )
    assert allocate(knapsack) is None
