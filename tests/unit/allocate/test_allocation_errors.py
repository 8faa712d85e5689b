"""What the allocation refuses, in which words, and the constraints of the user."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from autoquant_ray.allocate.allocation import Budget, frontier_allocation, solve
from autoquant_ray.allocate.knapsack.choices import Choice, restrict
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError, ScoreError


def budget(limit: float, resource: str = "storage", unit_per_bit: float | None = None) -> Budget:
    return Budget(
        resource=resource, limit=limit, unit_per_bit=unit_per_bit, description=f"--limit {limit}"
    )


def choice(group: str, format_: str, score: float, storage: float, **costs: float) -> Choice:
    return Choice(group=group, format=format_, score=score, costs={"storage": storage, **costs})


def test_frontier_allocation_below_the_cheapest_raises() -> None:
    with pytest.raises(InfeasibleBudgetError, match="reachable is"):
        frontier_allocation([choice("g", "a", 0, 5)], "storage", 4)


def test_solve_infeasible_bits_names_the_range() -> None:
    choices = [choice(f"g{g}", f, 0, c) for g in "ab" for f, c in (("int4", 414), ("none", 1600))]
    limit = Budget(resource="storage", limit=700, unit_per_bit=200, description="`bits` 3.5")
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"`bits` 3\.5 cannot be met: reachable is 4\.14 to 16\.00 average bits",
    ):
        solve(choices, [limit])


def test_solve_infeasible_bits_range_can_be_asked_for() -> None:
    choices = [choice("g", "int4", 0, 4.140625), choice("g", "none", 0, 16)]
    limit = Budget(resource="storage", limit=4.14, unit_per_bit=1, description="`bits` 4.14")
    with pytest.raises(InfeasibleBudgetError, match=r"reachable is 4\.15 to"):
        solve(choices, [limit])


def test_solve_infeasible_bytes_names_the_range() -> None:
    choices = [choice("g", "int4", 0, 3 * 2**30), choice("g", "none", 0, 12 * 2**30 + 1)]
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"3\.00 GiB \(3221225472 bytes\) to 12\.00 GiB \(12884901889 bytes\)",
    ):
        solve(choices, [budget(2**30)])


def test_solve_infeasible_under_max_formats_names_the_range_under_it() -> None:
    choices = [choice(g, f, 0, 1 if g == f else 5) for g in "ab" for f in ("a", "b", "none")]
    assert solve(choices, [budget(2)]).is_satisfied
    limit = Budget(resource="storage", limit=2, unit_per_bit=2, description="`bits` 1")
    with pytest.raises(InfeasibleBudgetError, match=r"reachable is 3\.00 to 5\.00 average bits"):
        solve(choices, [limit], max_formats=1)


def test_solve_budgets_infeasible_together_names_both() -> None:
    choices = [choice("g", "a", 0, 1, second=9), choice("g", "b", 0, 9, second=1)]
    with pytest.raises(InfeasibleBudgetError, match=r"--limit 5 .* and --limit 6 .* together"):
        solve(choices, [budget(5), budget(6, "second")])


def test_solve_max_formats_that_cover_no_group_raises() -> None:
    choices = [choice("g", "a", 0, 1), choice("h", "b", 0, 1)]
    with pytest.raises(InfeasibleBudgetError, match="no 1 formats cover every group"):
        solve(choices, [budget(5)], max_formats=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_solve_bad_score_names_group_and_format(bad: float) -> None:
    with pytest.raises(ScoreError, match="'g', format 'a'"):
        solve([choice("g", "a", bad, 1)], [budget(5)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_solve_bad_cost_names_group_and_format(bad: float) -> None:
    with pytest.raises(ScoreError, match="'g', format 'a'"):
        solve([choice("g", "a", 0, bad)], [budget(5)])


def test_solve_missing_cost_names_the_resource() -> None:
    with pytest.raises(ScoreError, match="'second'"):
        solve([choice("g", "a", 0, 1)], [budget(5, "second")])


def test_solve_no_choices_raises() -> None:
    with pytest.raises(ConfigError, match="no choices"):
        solve([], [budget(5)])


def test_solve_choice_given_twice_raises() -> None:
    with pytest.raises(ConfigError, match="'g' has format 'a' more than once"):
        solve([choice("g", "a", 0, 1), choice("g", "a", 0, 2)], [budget(5)])


def test_solve_limit_not_a_number_raises() -> None:
    with pytest.raises(ConfigError, match="not a number"):
        solve([choice("g", "a", 0, 1)], [budget(math.nan)])


def test_solve_negative_limit_is_infeasible() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"reachable is 1\.00 MiB \(1048576 bytes\)"):
        solve([choice("g", "a", 0, 2**20)], [budget(-1)])


def test_solve_infinite_limit_takes_the_least_score() -> None:
    choices = [choice("g", "a", 0.5, 1), choice("g", "b", 0.25, 9)]
    assert solve(choices, [budget(math.inf)]).formats == {"g": "b"}


def test_solve_reports_the_costs_of_every_resource() -> None:
    allocation = solve(
        [choice("g", "a", 0, 1, second=2), choice("h", "a", 0, 3, second=4)], [budget(9)]
    )
    assert allocation.costs == {"storage": 4, "second": 6}


def test_solve_two_limits_on_one_resource_keeps_both() -> None:
    choices = [choice(g, f, 9 - c, c) for g in "ab" for f, c in (("x", 1), ("y", 4), ("z", 9))]
    assert solve(choices, [budget(9), budget(6)]) == solve(choices, [budget(6)])


MENU = [choice(f"layers.{n}.{m}", f, 0, 1) for n in (0, 1) for m in "qo" for f in ("int4", "none")]


def kept(choices: Sequence[Choice]) -> dict[str, list[str]]:
    formats: dict[str, list[str]] = {}
    for c in choices:
        formats.setdefault(c.group, []).append(c.format)
    return formats


def test_restrict_pin_leaves_one_format() -> None:
    assert kept(restrict(MENU, {"layers.0.q": "none"}, {})) == {
        "layers.0.q": ["none"],
        "layers.0.o": ["int4", "none"],
        "layers.1.q": ["int4", "none"],
        "layers.1.o": ["int4", "none"],
    }


def test_restrict_allow_without_none_forbids_none() -> None:
    formats = kept(restrict(MENU, {}, {"layers.0.*": ["int4"], "*.o": ["int4", "none"]}))
    assert formats["layers.0.o"] == formats["layers.0.q"] == ["int4"]
    assert formats["layers.1.o"] == formats["layers.1.q"] == ["int4", "none"]


@pytest.mark.parametrize(
    ("pins", "allow", "text"),
    [
        ({"layers.0.k": "int4"}, {}, r"pinned group 'layers\.0\.k' .*closest: layers\.0\."),
        ({"layers.0.q": "int5"}, {}, r"format 'int5' pinned for group 'layers\.0\.q'.*int4"),
        ({}, {"blocks.*": ["int4"]}, r"no group matches the pattern 'blocks\.\*'"),
        ({}, {"*": ["int5"]}, r"format 'int5' allowed for '\*' .*int4"),
        ({}, {"*": []}, r"group 'layers\.0\.q' has no format left"),
        ({}, {"*": ["int4"], "*.o": ["none"]}, r"group 'layers\.0\.o' has no format left"),
        ({"layers.1.q": "none"}, {"*": ["int4"]}, r"group 'layers\.1\.q' has no format left"),
    ],
)
def test_restrict_wrong_constraint_names_it(
    pins: dict[str, str], allow: dict[str, list[str]], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        restrict(MENU, pins, allow)
