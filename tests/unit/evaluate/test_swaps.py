"""Swaps keep the budgets, are complete, and come in the order of the scores."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.errors import DataError
from autoquant_ray.evaluate.allocation_search import split_shards
from autoquant_ray.evaluate.swaps import Swaps, combine
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.state import RunState


@pytest.mark.parametrize(
    "options",
    [
        SolveOptions(bits=6.0),
        SolveOptions(bits=7.0, max_formats=2),
        SolveOptions(bits=8.0, allow={"*.mlp.*": ("wint8_aint8", "none")}),
    ],
)
def test_proposals_are_all_changes_that_fit(options: SolveOptions, make_run: Any) -> None:
    scored_run = ScoredRun.read(RunState.open(make_run()))
    problem, scores = scored_run.problem, scored_run.scores
    formats = search(problem, scores, options).formats
    swaps = Swaps(problem, scores, options)
    (budget,) = problem.budgets(options)

    def cost(allocation: dict[str, str]) -> float:
        return sum(g.cost(allocation[g.name], budget.resource) for g in problem.searched)

    def loss(allocation: dict[str, str]) -> float:
        return sum(0.0 if f == NONE else scores[g, f] for g, f in allocation.items())

    allowed = {c.group: [] for c in problem.choices(scores)}
    for choice in problem.choices(scores):
        is_mlp = ".mlp." in choice.group
        if not (options.allow and is_mlp and choice.format not in ("wint8_aint8", NONE)):
            allowed[choice.group].append(choice.format)
    expected = set()
    for first, second in itertools.combinations(allowed, 2):
        for first_format, second_format in itertools.product(allowed[first], allowed[second]):
            allocation = {**formats, first: first_format, second: second_format}
            few = options.max_formats or 99
            if cost(allocation) <= budget.limit and len(set(allocation.values()) - {NONE}) <= few:
                expected.add(tuple(allocation.values()))
    expected.discard(tuple(formats.values()))

    proposals = list(swaps.proposals(formats))
    allocations = [{**formats, **dict(change)} for change in proposals]
    assert {tuple(allocation.values()) for allocation in allocations} == expected
    assert len(allocations) == len(expected) > 0
    losses = [loss(allocation) for allocation in allocations]
    assert losses == pytest.approx(sorted(losses))
    assert all(swaps.fits(allocation) for allocation in allocations)


def test_combined_changes_touch_different_groups() -> None:
    changes = [(("a", "x"), ("b", "y")), (("b", "z"),), (("c", "x"),), (("c", "y"), ("d", "x"))]
    assert combine(changes) == [changes[0], changes[2]]


@pytest.mark.parametrize("count", [3, 4, 7, 8, 40])
def test_split_uses_every_shard_once(count: int) -> None:
    first, second, third = split_shards(count)
    assert sorted(first + second + third) == list(range(count))
    assert len(first) >= len(second) == len(third) > 0


def test_split_needs_three_shards() -> None:
    with pytest.raises(DataError, match="this data makes 2"):
        split_shards(2)
