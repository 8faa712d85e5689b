"""New scores around an allocation: against brute force, and where losses simply add up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from evaluations import measured_as

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.evaluate.allocation_search import search_allocations
from autoquant_ray.evaluate.rescoring import choose_flips, solve_flips
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.evaluate.swaps import Swaps
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.state import RunState

OPTIONS = SolveOptions(bits=6.0)


@pytest.fixture
def problem(make_run: Any) -> tuple[Problem, dict[tuple[str, str], float]]:
    run = ScoredRun.read(RunState.open(make_run()))
    return run.problem, run.scores


def test_flips_are_the_moves_that_the_scores_like_best(problem: Any) -> None:
    groups, scores = problem
    formats = search(groups, scores, OPTIONS).formats
    swaps = Swaps(groups, scores, OPTIONS)
    first, second = itertools.islice(swaps.proposals(formats), 2)
    flips = choose_flips(swaps, formats, 1000)
    assert all(len(move) == 1 for move in flips)
    assert [move[0] for move in flips[: len(first)]] == list(first)
    assert {(flip,) for flip in second} <= set(flips[: len(first) + len(second)])
    assert len(set(flips)) == len(flips)
    assert sorted(flips) == sorted(
        ((g, f),) for g, f in [*scores, *_none(formats)] if formats[g] != f
    )
    assert choose_flips(swaps, formats, 5) == flips[:5]


def _none(formats: dict[str, str]) -> list[tuple[str, str]]:
    return [(group, NONE) for group in formats]


@pytest.mark.parametrize("seed", range(4))
def test_plan_from_flips_is_the_best_that_was_measured(problem: Any, seed: int) -> None:
    groups, scores = problem
    formats = search(groups, scores, OPTIONS).formats
    rng = np.random.default_rng(seed)
    flips = choose_flips(Swaps(groups, scores, OPTIONS), formats, 9)
    differences = dict(zip(flips, rng.normal(size=len(flips)).tolist(), strict=True))
    differences[flips[0]] = math.inf
    (budget,) = groups.budgets(OPTIONS)
    menus = {name: [format_] for name, format_ in formats.items()}
    for ((group, other),) in flips[1:]:
        menus[group].append(other)
    best = math.inf
    for combination in itertools.product(*menus.values()):
        chosen = dict(zip(menus, combination, strict=True))
        cost = sum(g.cost(chosen[g.name], budget.resource) for g in groups.searched)
        loss = sum(differences.get((pair,), 0.0) for pair in chosen.items())
        if cost <= budget.limit and loss < best:
            best = loss
    solved = solve_flips(groups, OPTIONS, formats, differences)
    assert best < 0
    assert sum(differences.get((pair,), 0.0) for pair in solved.items()) == pytest.approx(best)
    assert all(other in menus[group] for group, other in solved.items())


def test_flips_that_gain_nothing_leave_the_plan(problem: Any) -> None:
    groups, scores = problem
    formats = search(groups, scores, OPTIONS).formats
    flips = choose_flips(Swaps(groups, scores, OPTIONS), formats, 9)
    assert solve_flips(groups, OPTIONS, formats, dict.fromkeys(flips, 0.5)) == formats
    assert solve_flips(groups, OPTIONS, formats, {}) == formats


def test_one_pass_finds_the_best_where_losses_add_up(problem: Any) -> None:
    """The scores are wrong, the measurement is exact: no climbing is needed, or possible."""
    groups, scores = problem
    factors = np.exp(np.random.default_rng(0).normal(size=len(scores)))
    truth = {pair: s * factor for (pair, s), factor in zip(scores.items(), factors, strict=True)}

    def loss(formats: dict[str, str]) -> float:
        return math.fsum(truth[g, f] for g, f in formats.items() if f != NONE)

    measure = measured_as(loss)
    start = search(groups, scores, OPTIONS).formats
    best = search(groups, truth, OPTIONS).formats
    num_flips = len(Swaps(groups, scores, OPTIONS).moves(start))
    assert loss(best) < loss(start)
    origin = StartingPoint(problem=groups, scores=scores, options=OPTIONS, formats=start)
    result = search_allocations(measure, 4, origin, num_trials=4 * num_flips, seed=1)
    assert result.num_flips == num_flips
    assert loss(result.winner.formats) == pytest.approx(loss(best))
    few = search_allocations(measure, 4, origin, num_trials=3)
    assert few.num_flips == 0
    assert few.num_trials == 3
