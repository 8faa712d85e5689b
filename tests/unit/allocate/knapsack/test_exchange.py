"""Exchanges against brute force over all pairs of moves, and what greedy filling keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoquant_ray.allocate.allocation import Budget, Solver, solve
from autoquant_ray.allocate.knapsack.choices import Choice
from autoquant_ray.allocate.knapsack.exchange import exchange
from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.knapsack import Knapsack, sweep
from autoquant_ray.arrays import Indices


def random_knapsack(
    seed: int, num_groups: int = 12, num_formats: int = 4, spread: float = 2.0
) -> Knapsack:
    """Scores that fall with the costs, and a limit between the least and the most."""
    rng = np.random.default_rng(seed)
    costs_GF = np.sort(rng.uniform(1, 9, (num_groups, num_formats)), axis=1)
    scores_GF = -np.sort(-rng.lognormal(0, spread, (num_groups, num_formats)), axis=1)
    low, high = costs_GF.min(axis=1).sum(), costs_GF.max(axis=1).sum()
    limit = low + rng.uniform(0.2, 0.8) * (high - low)
    return Knapsack(scores_GF=scores_GF, costs_RGF=costs_GF[None], limits_R=np.array([limit]))


def best_within_two_moves(knapsack: Knapsack, start_G: Indices) -> float:
    """The least score of all allocations that differ from another one in at most two groups."""
    groups, formats = range(len(start_G)), range(knapsack.scores_GF.shape[1])
    best = knapsack.score(start_G)
    for first, second in itertools.combinations(groups, 2):
        for pair in itertools.product(formats, formats):
            columns_G = start_G.copy()
            columns_G[[first, second]] = pair
            if knapsack.is_within(columns_G):
                best = min(best, knapsack.score(columns_G))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_no_exchange_of_two_groups_improves_the_result(seed: int) -> None:
    knapsack = random_knapsack(seed)
    relaxed = relax(knapsack)
    assert relaxed is not None
    better = exchange(knapsack, relaxed.multiplier_R, relaxed.prefix_G, relaxed.answer)
    assert knapsack.is_within(better.columns_G)
    assert better.score == knapsack.score(better.columns_G)
    # Two moves from the prefix are all that the first exchange has; later ones go on from there.
    assert better.score <= best_within_two_moves(knapsack, relaxed.prefix_G) + 1e-12
    assert better.lower == min(better.score, relaxed.answer.lower)


def test_exchange_beats_the_greedy_answer_somewhere() -> None:
    changes = []
    for seed in range(20):
        relaxed = relax(random_knapsack(seed))
        assert relaxed is not None
        args = (relaxed.multiplier_R, relaxed.prefix_G, relaxed.answer)
        changes.append(exchange(random_knapsack(seed), *args).score - relaxed.answer.score)
    assert max(changes) <= 0
    assert sum(change < 0 for change in changes) >= 5


@pytest.mark.parametrize("seed", range(20))
def test_greedy_filling_takes_every_later_step_that_still_fits(seed: int) -> None:
    knapsack = random_knapsack(seed, num_groups=40)
    relaxed, steps = relax(knapsack), sweep(knapsack.scores_GF, knapsack.costs_RGF[0])
    assert relaxed is not None
    expected_G, blocked = relaxed.prefix_G.copy(), set()
    spare = knapsack.limits_R[0] - knapsack.costs(expected_G)[0]
    in_prefix = len(steps.groups_N) - np.argmax(
        [(steps.prefix(n) == expected_G).all() for n in range(len(steps.groups_N), -1, -1)]
    )
    for n in range(in_prefix, len(steps.groups_N)):
        group, cost = int(steps.groups_N[n]), float(steps.costs_N[n])
        if cost > spare:
            blocked.add(group)
        if group not in blocked:
            expected_G[group] = steps.columns_N[n]
            spare -= cost
    assert relaxed.answer.columns_G.tolist() == expected_G.tolist()


def test_solver_close_stops_within_the_gap_and_0_is_exact() -> None:
    knapsack = random_knapsack(3, num_groups=600, num_formats=6, spread=0.02)
    choices = [
        Choice(
            group=f"g{g}", format=f"f{f}", score=float(s), costs={"b": knapsack.costs_RGF[0, g, f]}
        )
        for (g, f), s in np.ndenumerate(knapsack.scores_GF)
    ]
    limit = float(knapsack.limits_R[0])
    budget = Budget(resource="b", limit=limit, unit_per_bit=None, description="b")
    solver = Solver(choices, ["b"])
    exact, near = solver.solve([budget]), solver.solve([budget], close=1e-2)
    assert exact == solve(choices, [budget])
    assert exact.optimality_gap == 0 < near.optimality_gap <= 1e-2
    assert exact.score < near.score <= exact.score * 1.01
    assert near.is_satisfied
