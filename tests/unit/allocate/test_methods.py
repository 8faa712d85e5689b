"""A format rounded by several methods is one format: in the limit on formats, for tied groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from autoquant_ray.allocate.allocation import Budget, solve
from autoquant_ray.allocate.knapsack.choices import Choice
from autoquant_ray.allocate.ties import solve_tied
from autoquant_ray.errors import InfeasibleBudgetError
from autoquant_ray.serving.menus import NotServedError

BITS = {"none": 16.0, "wint4_afp16": 4.5, "wint6_afp16": 6.5, "wint8_afp16": 8.0}
METHODS = ("", ":max", ":gptq")
TIES = [("0", "1"), ("2", "3", "4")]


def random_choices(seed: int, num_groups: int) -> list[Choice]:
    """Menus with some methods of some formats; methods of a format cost the same."""
    rng = np.random.default_rng(seed)
    choices = []
    for group in range(num_groups):
        size = float(rng.integers(1, 9))
        for base, bits in BITS.items():
            for method in METHODS if base != "none" else METHODS[:1]:
                if base == "none" or rng.random() < 0.7:
                    score = 0.0 if base == "none" else float(rng.gamma(2.0) * 2**-bits)
                    cost = {"storage": bits * size}
                    choices.append(
                        Choice(group=f"{group}", format=base + method, score=score, costs=cost)
                    )
    return choices


def without(name: str) -> str:
    return name.partition(":")[0]


def least(
    choices: Sequence[Choice], limit: float, is_allowed: Callable[[dict[str, str]], bool]
) -> float:
    """The least score within a limit of all allowed allocations, by trying everything."""
    groups = dict.fromkeys(choice.group for choice in choices)
    best = math.inf
    for picked in itertools.product(*([c for c in choices if c.group == g] for g in groups)):
        if math.fsum(c.costs["storage"] for c in picked) <= limit and is_allowed(
            {c.group: c.format for c in picked}
        ):
            best = min(best, math.fsum(c.score for c in picked))
    return best


def budget(choices: Sequence[Choice], seed: int) -> Budget:
    everything = math.fsum(c.costs["storage"] for c in choices if c.format == "none")
    limit = everything * float(np.random.default_rng(seed).uniform(0.3, 0.8))
    return Budget(resource="storage", limit=limit, unit_per_bit=None, description="limit")


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_a_format_counts_once_however_it_is_rounded(seed: int, most: int) -> None:
    choices = random_choices(seed, 4)
    limit = budget(choices, seed)
    expected = least(
        choices, limit.limit, lambda f: len({without(n) for n in f.values()} - {"none"}) <= most
    )
    if math.isinf(expected):
        with pytest.raises(InfeasibleBudgetError):
            solve(choices, [limit], max_formats=most)
        return
    assert solve(choices, [limit], max_formats=most).score == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_groups_that_share_a_format_round_it_as_each_is_best(seed: int) -> None:
    choices = random_choices(seed, 6)
    limit = budget(choices, seed)

    def share(formats: dict[str, str]) -> bool:
        return all(len({without(formats[group]) for group in tie}) == 1 for tie in TIES)

    expected = least(choices, limit.limit, share)
    if math.isinf(expected):
        with pytest.raises(InfeasibleBudgetError):
            solve_tied(choices, [limit], TIES)
        return
    solved = solve_tied(choices, [limit], TIES)
    assert share(solved.formats)
    assert list(solved.formats) == [f"{group}" for group in range(6)]
    scores = {(c.group, c.format): c.score for c in choices}
    assert solved.score == pytest.approx(expected, rel=1e-12)
    assert math.fsum(scores[flip] for flip in solved.formats.items()) == pytest.approx(expected)


def test_groups_without_a_common_format_are_refused() -> None:
    choices = [
        Choice(group=group, format=name, score=1.0, costs={"storage": 1.0})
        for group, name in (("a", "wint4_afp16:max"), ("b", "wint8_afp16:max"))
    ]
    limit = Budget(resource="storage", limit=9.0, unit_per_bit=None, description="limit")
    with pytest.raises(NotServedError, match="must share a format"):
        solve_tied(choices, [limit], [("a", "b")])
