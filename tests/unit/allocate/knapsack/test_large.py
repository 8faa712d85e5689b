"""Tens of thousands of groups: the gap, against bounds that the tests compute by themselves."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import sparse
from scipy.optimize import linprog

from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.single import solve_single

Floats = npt.NDArray[np.float64]

SIZES = (2**20, 2**22, 3 * 2**21, 2**24)
BITS = np.array([3, 3.5, 4, 4.125, 4.25, 4.5, 5, 6, 6.5, 8, 8.25, 16])
NUM_GROUPS = 20_000


def large_problem(kind: str, bits: float, num_groups: int = NUM_GROUPS) -> Knapsack:
    """Costs in whole bytes, and a budget a little below ``bits`` per weight."""
    rng = np.random.default_rng(0)
    shape = (num_groups, len(BITS))
    sizes_G = rng.choice(SIZES, num_groups).astype(float)
    scores_GF = 1e-9 * sizes_G[:, None] * 4.0**-BITS
    if kind == "noisy":
        scores_GF = scores_GF * rng.lognormal(0.0, 1.5, shape)
    elif kind == "nearly equal":
        scores_GF = scores_GF * (1 + 1e-6 * rng.random(shape))
    elif kind == "equal experts":
        sizes_G = np.where(np.arange(num_groups) < num_groups // 25, sizes_G, 3.0 * 2**19)
        scores_GF = 4.0**-BITS * (1 + 1e-3 * rng.random(shape))
    elif kind == "twelve orders":
        scores_GF = scores_GF * 10.0 ** rng.uniform(-12, 0, shape)
    elif kind == "own sizes":
        sizes_G = np.rint(np.exp(rng.normal(15, 1, num_groups))) * 8
        scores_GF = 4.0**-BITS * (1 + 1e-9 * rng.random(shape))
    scores_GF[:, -1] = 0.0
    limit = np.floor(sizes_G.sum() * bits / 8 * 0.999973)
    return Knapsack(
        scores_GF=scores_GF,
        costs_RGF=(sizes_G[:, None] * BITS / 8)[None],
        limits_R=np.array([limit]),
    )


def reachable_limit(knapsack: Knapsack) -> float:
    """The limit, lowered to the next sum of whole costs, by their greatest common divisor."""
    costs_GF = knapsack.costs_RGF[0]
    excess_GF = costs_GF - costs_GF.min(axis=1)[:, None]
    step = math.gcd(*(int(8 * value) for value in np.unique(excess_GF))) / 8
    base = costs_GF.min(axis=1).sum()
    return float(base + (knapsack.limits_R[0] - base) // step * step)


def relaxed_by_highs(knapsack: Knapsack, limit: float) -> float:
    """The optimum of the linear relaxation, by HiGHS, rounded down by its tolerance."""
    num_groups, num_formats = knapsack.scores_GF.shape
    unit = knapsack.scores_GF.max()
    optimum = linprog(
        knapsack.scores_GF.ravel() / unit,
        A_ub=sparse.csr_array(knapsack.costs_RGF[0].ravel()[None] / limit),
        b_ub=[1.0],
        A_eq=sparse.kron(sparse.eye_array(num_groups), np.ones((1, num_formats)), format="csr"),
        b_eq=np.ones(num_groups),
        method="highs-ds",
    )
    assert optimum.status == 0
    return float(optimum.fun) * unit


def dual_bound(knapsack: Knapsack, limit: float) -> float:
    """The best Lagrangian bound, by narrowing the multiplier; any multiplier gives a bound."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        chosen_G = (knapsack.scores_GF + middle * knapsack.costs_RGF[0]).argmin(axis=1)
        too_dear = knapsack.costs(chosen_G)[0] > limit
        low, high = (middle, high) if too_dear else (low, middle)
    priced_GF = knapsack.scores_GF + high * knapsack.costs_RGF[0]
    return math.fsum(priced_GF.min(axis=1)) - high * limit


@pytest.mark.parametrize("bits", [4.5, 6.0, 8.0])
@pytest.mark.parametrize(
    ("kind", "above"), [("noisy", 1e-6), ("twelve orders", 1e-6), ("nearly equal", 1e-4)]
)
def test_solve_single_large_is_proven_close_to_the_relaxation(
    kind: str, above: float, bits: float
) -> None:
    knapsack = large_problem(kind, bits)
    answer = solve_single(knapsack)
    assert answer is not None
    assert knapsack.costs(answer.columns_G)[0] <= knapsack.limits_R[0]
    assert answer.score == knapsack.score(answer.columns_G)
    assert 0 <= answer.gap <= 1e-6
    # Nearly equal groups: the relaxation itself is further from the best than the proven bound.
    lower = dual_bound(knapsack, reachable_limit(knapsack))
    assert lower * (1 - 1e-11) <= answer.score <= lower * (1 + above)


@pytest.mark.parametrize("kind", ["noisy", "equal experts"])
def test_solve_single_thousand_bound_is_above_the_relaxation_by_highs(kind: str) -> None:
    knapsack = large_problem(kind, 6.0, num_groups=1_000)
    answer = solve_single(knapsack)
    assert answer is not None
    relaxed = relaxed_by_highs(knapsack, reachable_limit(knapsack))
    assert answer.gap <= 1e-6
    assert relaxed * (1 - 1e-8) <= answer.lower <= answer.score


@pytest.mark.parametrize("bits", [4.5, 6.0, 8.0])
@pytest.mark.parametrize("kind", ["equal experts", "own sizes"])
def test_solve_single_large_where_greedy_leaves_room(kind: str, bits: float) -> None:
    knapsack = large_problem(kind, bits)
    greedy, answer = relax(knapsack), solve_single(knapsack)
    assert greedy is not None
    assert answer is not None
    assert knapsack.costs(answer.columns_G)[0] <= knapsack.limits_R[0]
    assert 0 <= answer.gap <= 1e-6
    assert greedy.answer.lower <= answer.lower <= answer.score <= greedy.answer.score
    assert greedy.answer.gap > answer.gap


def test_solve_single_large_same_input_gives_the_same_output() -> None:
    first, second = (solve_single(large_problem("equal experts", 4.5)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.columns_G.tolist() == second.columns_G.tolist()
    assert (first.score, first.lower) == (second.score, second.lower)
