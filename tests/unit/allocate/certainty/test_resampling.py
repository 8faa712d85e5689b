"""The expected regret against brute force, and against the regret of a simulated truth."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cbc import cbc_score

from autoquant_ray.allocate.certainty.resampling import affordable_resamples, assess
from autoquant_ray.allocate.knapsack.choices import Choice
from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.resolve import Resolver
from autoquant_ray.allocate.knapsack.solve import solve_knapsack


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
    sums: list[list[list[float]]], costs: Any, limit: float, seed: Any, num: int
) -> tuple[float, list[float], Any]:
    """Regret, kept shares and allocation as they are defined."""
    num_shards, num_groups, num_formats = len(sums), len(sums[0]), len(sums[0][0])

    def scores(shards: list[int]) -> list[list[float]]:
        return [
            [sum(sums[s][g][f] for s in shards) for f in range(num_formats)]
            for g in range(num_groups)
        ]

    def score(table: Any, allocation: Any) -> float:
        return sum(table[g][f] for g, f in enumerate(allocation))

    truth = scores(list(range(num_shards)))
    chosen = brute_allocation(truth, costs, limit)
    draws = np.random.default_rng(seed).integers(num_shards, size=(num, num_shards))
    resamples = [scores(draw.tolist()) for draw in draws]
    others = [brute_allocation(resample, costs, limit) for resample in resamples]
    bounds = [
        score(truth, other)
        - score(truth, chosen)
        + score(resample, chosen)
        - score(resample, other)
        for resample, other in zip(resamples, others, strict=True)
    ]
    regret = sum(bounds) / num / score(truth, chosen) * num_shards / (num_shards - 1)
    kept = [sum(other[g] == chosen[g] for other in others) / num for g in range(num_groups)]
    return regret, kept, chosen


@pytest.mark.parametrize("seed", range(8))
def test_assess_equals_brute_force(seed: int) -> None:
    """Costs of any size and scores that are not convex: the frontier is not exact there."""
    rng = np.random.default_rng(seed)
    sums_SGF = np.pad(rng.gamma(0.7, size=(6, 4, 3)), ((0, 0), (0, 0), (0, 1)))
    costs = np.sort(rng.uniform(1, 5, size=(4, 4)), axis=1).tolist()
    stability = assess(unscored(costs, 12.0), sums_SGF, (seed, 6), num_resamples=60)
    assert stability is not None
    regret, kept, chosen = brute_assess(sums_SGF.tolist(), costs, 12.0, (seed, 6), 60)
    assert regret > 0
    assert stability.expected_regret == pytest.approx(regret, rel=1e-9)
    assert stability.kept_G.tolist() == pytest.approx(kept)
    assert stability.columns_G.tolist() == list(chosen)
    assert stability.num_resamples == 60


def test_assess_is_sure_of_what_a_greedy_solver_tosses() -> None:
    """The large group fits only if the small one waits; a sweep along the hulls takes them in turn.

    Every resample prefers the large group's step, exactly solved; the greedy solver takes the small
    group's, whose gain per cost is larger, in some and cannot afford both in any.
    """
    rng = np.random.default_rng(3)
    gains_G = np.array([1.05, 9.0])
    costs = [[0.0, 1.0], [0.0, 10.0]]
    sums_SGF = np.zeros((12, 2, 2))
    sums_SGF[:, :, 0] = gains_G * rng.gamma(25.0, 1 / 25, size=(12, 2))
    knapsack = unscored(costs, 10.0)
    stability = assess(knapsack, sums_SGF, (0, 12))
    assert stability is not None
    assert stability.columns_G.tolist() == [0, 1]
    assert stability.kept_G.tolist() == [1.0, 1.0]
    draws = np.random.default_rng((0, 12)).integers(12, size=(200, 12))
    greedy = [
        relax(replace(knapsack, scores_GF=sums_SGF[drawn_S].sum(axis=0))) for drawn_S in draws
    ]
    kept = np.mean([relaxed.answer.columns_G[1] == 1 for relaxed in greedy if relaxed])
    assert 0.05 < kept < 0.6


def simulated(rng: np.random.Generator) -> tuple[Any, Any, float]:
    """True scores and costs of 40 groups in 4 formats, and a limit of 6 bits."""
    weights_G1 = rng.choice([1.0, 2.0, 3.0, 8.0], size=(40, 1))
    bits_F = np.array([4.125, 8.0, 8.5, 16.0])
    truth_GF = weights_G1 * 10 ** rng.uniform(-5, -3, size=(40, 1)) * 4.0 ** (4 - bits_F)
    truth_GF[:, -1] = 0
    return truth_GF, weights_G1 * bits_F, float(weights_G1.sum() * 6)


@pytest.mark.parametrize("spread", [0.8, 4.0])
@pytest.mark.parametrize("num_shards", [4, 12, 60])
def test_assess_regret_is_at_least_that_of_a_known_truth(num_shards: int, spread: float) -> None:
    """Mean over models: never below what the plan loses against the best one, at most 3.5 times."""
    rng = np.random.default_rng(num_shards)
    expected, actual = [], []
    for repeat in range(60):
        truth_GF, costs_GF, limit = simulated(rng)
        knapsack = unscored(costs_GF, limit)
        true_knapsack = replace(knapsack, scores_GF=truth_GF)
        best = solve_knapsack(true_knapsack)
        noise_SGF = rng.gamma(spread, 1 / spread, size=(num_shards, *truth_GF.shape))
        stability = assess(knapsack, noise_SGF * truth_GF, (repeat, num_shards), num_resamples=30)
        assert stability is not None
        assert best is not None
        expected.append(stability.expected_regret)
        actual.append(true_knapsack.score(stability.columns_G) / best.score - 1)
    assert np.mean(actual) < np.mean(expected) < 3.5 * np.mean(actual)


def test_assess_identical_shards_have_no_regret() -> None:
    truth_GF, costs_GF, limit = simulated(np.random.default_rng(0))
    stability = assess(unscored(costs_GF, limit), np.stack([truth_GF] * 10), (0, 10))
    assert stability is not None
    assert stability.expected_regret == 0
    assert (stability.kept_G == 1).all()


def test_assess_names_the_coin_tosses() -> None:
    """Two groups whose scores are equal share one step; a third never changes.

    That they are equal cannot be known from shards, so there is a regret.
    """
    rng = np.random.default_rng(0)
    sums_SGF = np.zeros((100, 3, 2))
    sums_SGF[:, :2, 0] = rng.gamma(2.0, 0.5, size=(100, 2))
    sums_SGF[:, :2, 0] *= 1 / sums_SGF[:, :2, 0].mean(axis=0)
    sums_SGF[:, 2, 0] = 50.0
    stability = assess(unscored([[1.0, 2.0]] * 3, 5.0), sums_SGF, (0, 100))
    assert stability is not None
    assert stability.kept_G[2] == 1
    assert ((stability.kept_G[:2] > 0.3) & (stability.kept_G[:2] < 0.7)).all()
    assert 0 < stability.expected_regret < 0.05


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


def brute_score(knapsack: Knapsack) -> float:
    num_groups, num_formats = knapsack.scores_GF.shape
    everything = itertools.product(range(num_formats), repeat=num_groups)
    return min(
        knapsack.score(np.array(columns))
        for columns in everything
        if knapsack.is_within(np.array(columns))
    )


@pytest.mark.parametrize("kind", ["single", "apart", "coupled"])
@pytest.mark.parametrize("seed", range(6))
def test_resolver_equals_brute_force(seed: int, kind: str) -> None:
    """Under one limit, under limits of groups of their own, and under limits that groups share."""
    rng = np.random.default_rng(seed)
    scores_GF = rng.gamma(0.5, size=(6, 4))
    costs_RGF = np.sort(rng.uniform(1, 10, size=(2, 6, 4)), axis=2)
    if kind == "single":
        costs_RGF = costs_RGF[:1]
    elif kind == "apart":
        costs_RGF[0, 4:] = 2.0
        costs_RGF[1, :4] = 0.0
    limits_R = costs_RGF.min(axis=2).sum(axis=1) * 1.6
    knapsack = Knapsack(scores_GF=np.zeros((6, 4)), costs_RGF=costs_RGF, limits_R=limits_R)
    resolver = Resolver(knapsack)
    assert resolver.is_fast == (kind != "coupled")
    columns_G = resolver.solve(scores_GF)
    assert columns_G is not None
    scored = replace(knapsack, scores_GF=scores_GF)
    assert scored.is_within(columns_G)
    assert scored.score(columns_G) == pytest.approx(brute_score(scored), rel=1e-12)
    again_G = resolver.solve(scores_GF, columns_G)
    assert again_G is columns_G


@pytest.mark.parametrize("num_groups", [60, 200])
def test_resolver_scores_as_the_solver_of_plans(num_groups: int) -> None:
    """Warm started from the allocation of other scores."""
    rng = np.random.default_rng(num_groups)
    weights_G1 = rng.choice([1.0, 2.0, 3.0, 8.0], size=(num_groups, 1))
    bits_F = np.linspace(4, 16, 8)
    truth_GF = weights_G1 * rng.lognormal(0.0, 1.5, (num_groups, 8)) * 4.0**-bits_F
    knapsack = unscored(weights_G1 * bits_F, float(weights_G1.sum() * 6))
    resolver = Resolver(knapsack)
    start_G = resolver.solve(truth_GF)
    for _ in range(5):
        scores_GF = truth_GF * rng.lognormal(0.0, 0.3, truth_GF.shape)
        scored = replace(knapsack, scores_GF=scores_GF)
        best = solve_knapsack(scored)
        columns_G = resolver.solve(scores_GF, start_G)
        assert best is not None
        assert columns_G is not None
        assert best.is_proven
        assert scored.score(columns_G) == pytest.approx(best.score, rel=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
@pytest.mark.parametrize("seed", range(4))
def test_resamples_are_as_good_as_those_of_cbc(seed: int) -> None:
    """Resampled sums of 16 shards, warm started from the plan as ``assess`` does it."""
    rng = np.random.default_rng(seed)
    weights_G1 = rng.choice([1e6, 3e6, 4e6, 11e6], size=(30, 1))
    bits_F = np.array([3.0, 4.0, 4.125, 4.25, 4.5, 8.0, 8.25, 16.0])
    truth_GF = weights_G1 * rng.lognormal(0.0, 1.5, (30, 8)) * 4.0**-bits_F
    truth_GF[:, -1] = 0.0
    sums_SGF = truth_GF * rng.gamma(2.0, 0.5, size=(16, 30, 8))
    knapsack = unscored(weights_G1 * bits_F / 8, float(weights_G1.sum() * rng.uniform(3.5, 9) / 8))
    resolver = Resolver(knapsack)
    plan_G = resolver.solve(sums_SGF.sum(axis=0))
    changed = 0
    for drawn_S in np.random.default_rng((seed, 16)).integers(16, size=(4, 16)):
        scores_GF = sums_SGF[drawn_S].sum(axis=0)
        columns_G = resolver.solve(scores_GF, plan_G)
        assert columns_G is not None
        assert plan_G is not None
        changed += int((columns_G != plan_G).any())
        score = replace(knapsack, scores_GF=scores_GF).score(columns_G)
        choices = [
            Choice(
                group=f"{g}",
                format=f"{f}",
                score=float(scores_GF[g, f]),
                costs={"storage": float(knapsack.costs_RGF[0, g, f])},
            )
            for g, f in np.ndindex(scores_GF.shape)
        ]
        expected = cbc_score(choices, float(knapsack.limits_R[0]), scale=1e6 / score)
        assert score == pytest.approx(expected, rel=1e-11, abs=0)
    assert changed


def test_resolver_keeps_the_allocation_it_starts_from_where_none_is_better() -> None:
    """Two groups are alike, so that two allocations are as good."""
    resolver = Resolver(unscored([[1.0, 2.0], [1.0, 2.0]], 3.0))
    scores_GF = np.array([[1.0, 0.0], [1.0, 0.0]])
    for start in ([0, 1], [1, 0]):
        columns_G = resolver.solve(scores_GF, np.array(start))
        assert columns_G is not None
        assert columns_G.tolist() == start


def test_resolver_limits_that_exclude_each_other_is_none() -> None:
    costs_RGF = np.array([[[1.0, 3.0]], [[3.0, 1.0]]])
    knapsack = Knapsack(
        scores_GF=np.zeros((1, 2)), costs_RGF=costs_RGF, limits_R=np.array([2.0, 2.0])
    )
    assert Resolver(knapsack).solve(np.array([[1.0, 2.0]])) is None


def test_larger_problems_have_fewer_resamples() -> None:
    def count(num_groups: int, num_limits: int) -> int:
        costs_RGF = np.random.default_rng(0).uniform(1, 2, size=(num_limits, num_groups, 10))
        limits_R = np.full(num_limits, 2.0 * num_groups)
        knapsack = Knapsack(
            scores_GF=np.zeros((num_groups, 10)), costs_RGF=costs_RGF, limits_R=limits_R
        )
        return affordable_resamples(Resolver(knapsack))

    assert [count(50, 1), count(1_000, 1)] == [200, 200]
    assert [count(2_000, 1), count(50, 2), count(500, 2)] == [100, 66, 10]
