"""Allocations against brute force over all combinations and against CBC."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from cbc import cbc_score

from autoquant_ray.allocate.allocation import (
    Allocation,
    Budget,
    frontier,
    frontier_allocation,
    solve,
)
from autoquant_ray.allocate.knapsack.choices import Choice
from autoquant_ray.errors import InfeasibleBudgetError

Best = tuple[float, float]


def budget(limit: float, resource: str = "storage", unit_per_bit: float | None = None) -> Budget:
    return Budget(
        resource=resource, limit=limit, unit_per_bit=unit_per_bit, description=f"--limit {limit}"
    )


def choice(group: str, format_: str, score: float, storage: float, **costs: float) -> Choice:
    return Choice(group=group, format=format_, score=score, costs={"storage": storage, **costs})


def by_group(choices: Sequence[Choice]) -> list[list[Choice]]:
    names = dict.fromkeys(c.group for c in choices)
    return [[c for c in choices if c.group == name] for name in names]


def combinations(
    choices: Sequence[Choice], budgets: Sequence[Budget], max_formats: int | None
) -> Iterator[tuple[Choice, ...]]:
    """All allocations within the budgets, by trying everything."""
    for picked in itertools.product(*by_group(choices)):
        used = {c.format for c in picked} - {"none"}
        if max_formats is not None and len(used) > max_formats:
            continue
        if all(
            math.fsum(c.costs[b.resource] for c in picked) <= b.limit * (1 + 1e-12) for b in budgets
        ):
            yield picked


def brute_force(
    choices: Sequence[Choice], budgets: Sequence[Budget], max_formats: int | None = None
) -> Best | None:
    """Least score, and least cost in the first budget's resource among allocations of it."""
    totals = (
        (math.fsum(c.score for c in p), math.fsum(c.costs[budgets[0].resource] for c in p))
        for p in combinations(choices, budgets, max_formats)
    )
    return min(totals, default=None)


def random_choices(
    rng: np.random.Generator, num_groups: int, num_formats: int, *, resources: int = 1
) -> list[Choice]:
    """Scores over many magnitudes, costs that do not follow them, and many ties."""
    names = ["none", "a", "b", "c", "d", "e", "f", "g", "h"][:num_formats]
    style = rng.integers(4)
    choices = []
    for group in range(num_groups):
        magnitude = 10.0 ** -rng.integers(0, 13)
        for name in names if rng.random() < 0.8 else names[: max(1, num_formats - 2)]:
            score = [
                10.0 ** -rng.uniform(0, 12),
                float(rng.integers(0, 4)) / 4,
                magnitude * rng.random(),
                0.0 if name == "none" else magnitude * float(rng.integers(1, 4)),
            ][style]
            costs = [float(rng.integers(0, 9)), rng.uniform(0, 9), rng.uniform(1e9, 1e12)]
            costs = [costs[int(rng.integers(2)) if style else 2] for _ in range(resources)]
            extra = dict(zip(["second", "third"], costs[1:], strict=False))
            choices.append(choice(f"group{group}", name, score, costs[0], **extra))
    return choices


def random_budget(
    rng: np.random.Generator, choices: Sequence[Choice], resource: str = "storage"
) -> Budget:
    """A limit from just below the cheapest to the dearest allocation, often met exactly."""
    rows = [[c.costs[resource] for c in group] for group in by_group(choices)]
    if rng.random() < 0.5:
        return budget(math.fsum(float(rng.choice(row)) for row in rows), resource)
    low, high = sum(map(min, rows)), sum(map(max, rows))
    return budget(max(0.0, low + rng.uniform(-0.05, 1.0) * (high - low)), resource)


def assert_matches(
    choices: Sequence[Choice], budgets: Sequence[Budget], max_formats: int | None = None
) -> None:
    expected = brute_force(choices, budgets, max_formats)
    if expected is None:
        with pytest.raises(InfeasibleBudgetError):
            solve(choices, budgets, max_formats=max_formats)
        return
    allocation = solve(choices, budgets, max_formats=max_formats)
    assert_consistent(choices, budgets, allocation, max_formats)
    assert allocation.score == pytest.approx(expected[0], rel=1e-15, abs=0)
    assert allocation.optimality_gap == 0.0


def assert_consistent(
    choices: Sequence[Choice],
    budgets: Sequence[Budget],
    allocation: Allocation,
    max_formats: int | None = None,
) -> None:
    """The allocation is one of the choices, within the budgets, and its sums are its own."""
    table = {(c.group, c.format): c for c in choices}
    picked = [table[item] for item in allocation.formats.items()]
    assert list(allocation.formats) == list(dict.fromkeys(c.group for c in choices))
    assert allocation.score == math.fsum(c.score for c in picked)
    for b in budgets:
        assert allocation.costs[b.resource] == math.fsum(c.costs[b.resource] for c in picked)
        assert allocation.costs[b.resource] <= b.limit * (1 + 1e-12)
    assert allocation.is_satisfied
    if max_formats is not None:
        assert len(set(allocation.formats.values()) - {"none"}) <= max_formats


@pytest.mark.parametrize("seed", range(500))
def test_solve_small_random_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, int(rng.integers(1, 7)), int(rng.integers(1, 6)))
    assert_matches(choices, [random_budget(rng, choices)])


@pytest.mark.parametrize("seed", range(100))
def test_solve_two_budgets_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_groups, num_formats = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    choices = random_choices(rng, num_groups, num_formats, resources=2)
    budgets = [random_budget(rng, choices, name) for name in ("storage", "second")]
    assert_matches(choices, budgets)


@pytest.mark.parametrize("seed", range(30))
def test_solve_three_budgets_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, int(rng.integers(2, 6)), 5, resources=3)
    budgets = [random_budget(rng, choices, name) for name in ("storage", "second", "third")]
    assert_matches(choices, budgets)


@pytest.mark.parametrize("max_formats", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(30))
def test_solve_max_formats_equals_brute_force(seed: int, max_formats: int) -> None:
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, int(rng.integers(1, 6)), int(rng.integers(2, 6)))
    assert_matches(choices, [random_budget(rng, choices)], max_formats)


@pytest.mark.parametrize("seed", range(30))
def test_solve_max_formats_and_two_budgets_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, int(rng.integers(2, 6)), 5, resources=2)
    budgets = [random_budget(rng, choices, name) for name in ("storage", "second")]
    assert_matches(choices, budgets, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
@pytest.mark.parametrize("seed", range(20))
def test_solve_forty_groups_equals_cbc(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1e6, 3e6, 4e6, 11e6], 40)
    bits = [3.0, 4.0, 4.125, 4.25, 4.5, 8.0, 8.25, 16.0]
    choices = [
        choice(f"g{g}", f"b{b}", sizes[g] * 4**-b * math.exp(rng.normal(0, 1.5)), sizes[g] * b / 8)
        for g in range(40)
        for b in bits
    ]
    limit = float(sizes.sum()) * rng.uniform(3.5, 9) / 8
    allocation = solve(choices, [budget(limit)])
    assert_consistent(choices, [budget(limit)], allocation)
    assert allocation.optimality_gap == 0.0
    expected = cbc_score(choices, limit, scale=1e6 / allocation.score)
    assert allocation.score == pytest.approx(expected, rel=1e-11, abs=0)


@pytest.mark.parametrize("seed", range(50))
def test_solve_mixed_magnitudes_keeps_tiny_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = [
        choice(f"g{g}", name, magnitude * rng.uniform(1, 2), float(rng.integers(1, 20)))
        for g, magnitude in enumerate([1e-3, 1e-3, 1e-12, 1e-12, 1e-12, 1e-12])
        for name in "abcd"
    ]
    limit = budget(float(rng.integers(50, 80)))
    expected = brute_force(choices, [limit])
    allocation = solve(choices, [limit])
    assert expected is not None
    assert abs(allocation.score - expected[0]) <= 1e-18
    assert allocation.optimality_gap == 0.0


def test_solve_equal_scores_takes_the_cheaper() -> None:
    choices = [choice("g", "dear", 0.5, 9), choice("g", "cheap", 0.5, 3), choice("h", "a", 0, 1)]
    assert solve(choices, [budget(20)]).formats == {"g": "cheap", "h": "a"}


def test_solve_budget_met_exactly_in_decimals_is_feasible() -> None:
    choices = [choice(f"g{g}", "a", 1.0, 0.1) for g in range(10)]
    choices += [choice(f"g{g}", "b", 2.0, 0.05) for g in range(10)]
    allocation = solve(choices, [budget(1.0)])
    assert set(allocation.formats.values()) == {"a"}
    assert allocation.is_satisfied


def test_solve_budget_a_little_too_small_is_respected() -> None:
    choices = [choice(g, f, s, c) for g in "ab" for f, s, c in (("x", 0, 5), ("y", 1, 4))]
    assert solve(choices, [budget(10 * (1 - 1e-9))]).costs == {"storage": 9}
    both = [choice(c.group, c.format, c.score, c.costs["storage"], second=1) for c in choices]
    both[1] = choice("a", "y", 1, 4, second=3)
    limits = [budget(10 * (1 - 1e-9)), budget(2, "second")]
    assert solve(both, limits).formats == {"a": "x", "b": "y"}


def test_solve_without_budget_takes_the_least_score() -> None:
    choices = [choice("g", "a", 0.5, 1), choice("g", "b", 0.25, 9)]
    assert solve(choices, []).formats == {"g": "b"}


def test_solve_same_input_gives_the_same_output() -> None:
    choices = random_choices(np.random.default_rng(7), 6, 5, resources=2)
    budgets = [random_budget(np.random.default_rng(3), choices, r) for r in ("storage", "second")]
    assert solve(choices, budgets) == solve(choices, budgets)


@pytest.mark.parametrize("bits", [4.5, 5.0, 6.0, 8.0])
def test_solve_large_model_is_proven_optimal(bits: float) -> None:
    choices, weights = large_model()
    limit = budget(weights * bits / 8)
    allocation = solve(choices, [limit])
    assert_consistent(choices, [limit], allocation)
    assert allocation.optimality_gap == 0.0


def test_solve_large_model_scores_no_worse_than_the_frontier() -> None:
    choices, weights = large_model()
    exact = solve(choices, [budget(weights * 5 / 8)])
    hull = frontier_allocation(choices, "storage", weights * 5 / 8)
    assert hull.score * (1 - hull.optimality_gap) <= exact.score <= hull.score
    assert 0 < hull.optimality_gap < 0.05


def test_solve_three_of_twelve_formats_is_proven_between_bounds() -> None:
    choices, weights = large_model()
    limit = budget(weights * 5 / 8)
    allocations = [solve(choices, [limit], max_formats=k) for k in (1, 2, 3, 12)]
    assert all(allocation.optimality_gap == 0.0 for allocation in allocations)
    assert [allocation.score for allocation in allocations] == sorted(
        (f.score for f in allocations), reverse=True
    )
    assert allocations[-1] == solve(choices, [limit])


def test_solve_too_many_format_sets_to_try_finds_the_right_four() -> None:
    choices = [
        choice(f"g{g}", f"f{f}", 0.25 if f == g % 4 else 1.0, float(1 + f))
        for g in range(8)
        for f in range(30)
    ]
    allocation = solve(choices, [budget(20)], max_formats=4)
    assert_consistent(choices, [budget(20)], allocation, 4)
    assert allocation.formats == {f"g{g}": f"f{g % 4}" for g in range(8)}
    assert 0 <= allocation.optimality_gap < 1e-4


@pytest.mark.parametrize("seed", range(6))
def test_solve_two_budgets_on_a_large_model_is_no_better_than_one(seed: int) -> None:
    choices, weights = large_model()
    rng = np.random.default_rng(seed)
    choices = [
        choice(c.group, c.format, c.score, c.costs["storage"], time=c.costs["storage"] * noise)
        for c, noise in zip(choices, np.exp(rng.normal(0, 0.5, len(choices))), strict=True)
    ]
    first = budget(weights * 5 / 8)
    alone = solve(choices, [first])
    second = budget(alone.costs["time"] * 0.97, "time")
    both = solve(choices, [first, second])
    assert_consistent(choices, [first, second], both)
    assert 0 <= both.optimality_gap < 1e-12
    assert both.score >= max(alone.score, solve(choices, [second]).score)
    hull = frontier_allocation(choices, "time", second.limit)
    assert both.score >= hull.score * (1 - hull.optimality_gap)


def large_model() -> tuple[list[Choice], float]:
    """250 groups of few sizes with 13 formats; the choices, and the number of weights."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([3.1e6, 8.4e6, 1.7e7, 2.5e7, 9.0e7], 250)
    bits = [3.0, 3.5, 4.0, 4.125, 4.25, 4.5, 5.0, 6.0, 6.5, 8.0, 8.03, 8.25, 16.0]
    choices = []
    for group, size in enumerate(sizes):
        for b in bits:
            score = 0.0 if b == 16 else size * 4**-b * math.exp(rng.normal(0, 1.5)) * 1e-9
            name = "none" if b == 16 else f"w{b}"
            choices.append(choice(f"layer{group}", name, score, size * b / 8))
    return choices, float(sizes.sum())


@pytest.mark.parametrize("seed", range(50))
def test_frontier_points_are_best_at_their_cost(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = random_choices(rng, int(rng.integers(1, 6)), int(rng.integers(1, 6)))
    points = frontier(choices, "storage")
    assert points == sorted(points)
    for cost, score in points:
        expected = brute_force(choices, [budget(cost)])
        allocation = frontier_allocation(choices, "storage", cost)
        assert expected is not None
        assert score == pytest.approx(expected[0], rel=1e-12, abs=1e-300)
        assert allocation.score == pytest.approx(score, rel=1e-12, abs=1e-300)
        assert allocation.costs["storage"] == pytest.approx(cost, rel=1e-12)
