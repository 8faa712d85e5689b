"""The least largest loss, against brute force over all allocations and against CBC."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pulp
import pytest

from autoquant_ray.allocate.knapsack.knapsack import FormatLimit, Knapsack
from autoquant_ray.allocate.knapsack.worst import solve_worst
from autoquant_ray.arrays import Floats


def random_problem(
    rng: np.random.Generator, num_groups: int, num_formats: int, *, domains: int, resources: int
) -> tuple[Knapsack, Floats]:
    """Losses that fall with the cost, differ by domain and lie orders apart; the last is 0."""
    bits = np.linspace(4, 16, num_formats)
    sizes_G = rng.integers(1, 9, size=num_groups).astype(float)
    magnitude = 10.0 ** -rng.integers(0, 10)
    scores_DGF = magnitude * sizes_G[:, None] * 4.0**-bits
    scores_DGF = scores_DGF * rng.lognormal(0.0, 1.0, (domains, num_groups, num_formats))
    scores_DGF[:, :, -1] = 0.0
    costs_RGF = sizes_G[:, None] * bits * rng.uniform(0.5, 1.5, (resources, num_groups, 1))
    if num_formats > 2:
        missing_G = rng.random(num_groups) < 0.3
        scores_DGF[:, missing_G, 1] = np.inf
        costs_RGF[:, missing_G, 1] = 0.0
    low_R, high_R = costs_RGF[:, :, 0].sum(axis=1), costs_RGF[:, :, -1].sum(axis=1)
    limits_R = low_R + rng.uniform(0.1, 0.6, size=resources) * (high_R - low_R)
    knapsack = Knapsack(
        scores_GF=np.where(np.isfinite(scores_DGF[0]), 0.0, np.inf),
        costs_RGF=costs_RGF,
        limits_R=limits_R,
    )
    return knapsack, scores_DGF


def brute_force(knapsack: Knapsack, scores_DGF: Floats, limit: FormatLimit | None) -> float:
    """The least largest loss of all allocations within the limits."""
    num_groups = len(knapsack.present_GF)
    best = math.inf
    options = [np.flatnonzero(row).tolist() for row in knapsack.present_GF]
    for picked in itertools.product(*options):
        columns_G = np.array(picked)
        if limit is not None and len(set(limit.number_F[columns_G]) - {-1}) > limit.most:
            continue
        if knapsack.is_within(columns_G):
            losses_D = scores_DGF[:, np.arange(num_groups), columns_G].sum(axis=1)
            best = min(best, float(losses_D.max()))
    return best


@pytest.mark.parametrize(
    ("most", "numbers"), [(None, ""), (1, "0 1 2 -1"), (2, "0 1 2 -1"), (1, "0 1 0 -1")]
)
@pytest.mark.parametrize(("domains", "resources"), [(2, 1), (3, 2), (5, 1)])
def test_equals_brute_force(domains: int, resources: int, most: int | None, numbers: str) -> None:
    rng = np.random.default_rng([domains, resources, most or 0])
    number_F = np.array(numbers.split(), dtype=np.intp)
    limit = None if most is None else FormatLimit(most=most, number_F=number_F)
    for _ in range(6):
        knapsack, scores_DGF = random_problem(rng, 5, 4, domains=domains, resources=resources)
        answer = solve_worst(knapsack, scores_DGF, limit)
        expected = brute_force(knapsack, scores_DGF, limit)
        if math.isinf(expected):
            assert answer is None
            continue
        assert answer is not None
        assert knapsack.is_within(answer.columns_G)
        assert answer.score == pytest.approx(expected, rel=1e-9)
        assert answer.lower <= expected * (1 + 1e-12)
        assert answer.gap < 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_cbc_on_a_model_of_usual_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    knapsack, scores_DGF = random_problem(rng, 40, 4, domains=4, resources=1)
    answer = solve_worst(knapsack, scores_DGF, None)
    assert answer is not None
    scale = 1e3 / answer.score
    model = pulp.LpProblem("worst", pulp.LpMinimize)
    largest = pulp.LpVariable("largest", lowBound=0)
    model += largest
    keys = [(int(g), int(f)) for g, f in zip(*np.nonzero(knapsack.present_GF), strict=True)]
    x = {key: pulp.LpVariable(f"x_{key[0]}_{key[1]}", cat="Binary") for key in keys}
    for group in range(40):
        model += pulp.lpSum(v for key, v in x.items() if key[0] == group) == 1
    model += pulp.lpSum(knapsack.costs_RGF[0][key] * v for key, v in x.items()) <= float(
        knapsack.limits_R[0]
    )
    for scores_GF in scores_DGF:
        terms = [float(scores_GF[key]) * scale * v for key, v in x.items()]
        model += pulp.lpSum(terms) <= largest
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=1e-6, gapAbs=0, timeLimit=60))
    theirs = float(pulp.value(largest)) / scale
    assert answer.score <= theirs * (1 + 1e-6)
    assert answer.lower <= theirs * (1 + 1e-6)
    assert answer.gap < 1e-4


def test_no_loss_at_all_is_proven() -> None:
    knapsack, scores_DGF = random_problem(np.random.default_rng(0), 4, 3, domains=2, resources=1)
    rich = Knapsack(
        scores_GF=knapsack.scores_GF, costs_RGF=knapsack.costs_RGF, limits_R=knapsack.limits_R * 100
    )
    answer = solve_worst(rich, scores_DGF, None)
    assert answer is not None
    assert (answer.score, answer.gap) == (0.0, 0.0)
