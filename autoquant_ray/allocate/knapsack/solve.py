"""Choose the method for a knapsack, and try format sets one by one under a limit on formats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.problem import Answer, Problem, bound
from autoquant_ray.allocate.knapsack.several import relaxed_multipliers, solve_milp, solve_several
from autoquant_ray.allocate.knapsack.single import solve_single
from autoquant_ray.arrays import Floats, Indices

_MAX_SETS = 20_000  # format sets tried one by one; beyond, HiGHS decides with binary variables


def solve_problem(problem: Problem, max_formats: int | None, free: int | None) -> Answer | None:
    """Solve a knapsack; None where the limits cannot be met.

    Args:
        problem: Scores, costs and limits, at least one resource.
        max_formats: Most distinct formats used, or None.
        free: The format (column) that ``max_formats`` does not count, or None.
    """
    used = np.flatnonzero(problem.present_GF.any(axis=0))
    counted = [int(column) for column in used if column != free]
    if max_formats is None or max_formats >= min(len(counted), len(problem.scores_GF)):
        return _solve_plain(problem)
    if math.comb(len(counted), max_formats) > _MAX_SETS:
        answer = solve_milp(problem, max_formats=max_formats, free=free, rough=True)
        return answer if answer and problem.is_within(answer.columns_G) else None
    return _solve_sets(problem, max_formats, free, counted)


def reachable(
    problem: Problem, max_formats: int | None, free: int | None
) -> list[tuple[float, float]] | None:
    """Lowest and highest summed cost per resource; None where no format set covers the groups."""
    ranges = []
    for cost_GF in problem.costs_RGF:
        least = Problem(
            scores_GF=np.where(problem.present_GF, cost_GF, np.inf),
            costs_RGF=np.zeros((1, *cost_GF.shape)),
            limits_R=np.zeros(1),
        )
        answer = solve_problem(least, max_formats, free)
        if answer is None:
            return None
        ranges.append((answer.score, math.fsum(cost_GF.max(axis=1))))
    return ranges


def _solve_plain(problem: Problem) -> Answer | None:
    return solve_single(problem) if len(problem.limits_R) == 1 else solve_several(problem)


def _solve_sets(
    problem: Problem, max_formats: int, free: int | None, counted: list[int]
) -> Answer | None:
    """Try the format sets in the order of their bounds until no bound is below the best score."""
    multipliers_R = _multipliers(problem)
    if multipliers_R is None:
        return None
    always = [] if free is None else [free]
    best: Answer | None = None
    lower = math.inf
    for lowest, chosen in _ranked_sets(problem, max_formats, always, counted, multipliers_R):
        if best is not None and lowest > best.score:
            break
        subset = _only(problem, chosen)
        answer = None if best and _is_worse(subset, best.score) else _solve_plain(subset)
        if answer is None:
            continue
        lower = min(lower, answer.lower)
        if best is None or _key(problem, answer) < _key(problem, best):
            best = answer
    return None if best is None else replace(best, lower=min(best.score, lower))


def _key(problem: Problem, answer: Answer) -> tuple[float, list[float]]:
    return answer.score, problem.costs(answer.columns_G)


def _multipliers(problem: Problem) -> Floats | None:
    if len(problem.limits_R) > 1:
        return relaxed_multipliers(problem)
    relaxed = relax(problem)
    return None if relaxed is None else relaxed.multiplier_R


def _only(problem: Problem, columns: Indices) -> Problem:
    mask = np.zeros(problem.scores_GF.shape[1], dtype=bool)
    mask[columns] = True
    return problem.keep(mask)


def _is_worse(subset: Problem, score: float) -> bool:
    """Whether a cheap bound already shows that a format set cannot reach ``score``."""
    if len(subset.limits_R) > 1:
        return bound(subset, relaxed_multipliers(subset)) > score
    relaxed = relax(subset)
    return relaxed is None or relaxed.answer.lower > score


def _ranked_sets(
    problem: Problem,
    max_formats: int,
    always: list[int],
    counted: list[int],
    multipliers_R: Floats,
) -> Iterator[tuple[float, Indices]]:
    """Format sets that give every group a format, lowest bound first."""
    ranked = []
    for chosen in itertools.combinations(counted, max_formats):
        columns = np.array([*always, *chosen], dtype=np.intp)
        columns.sort()
        part = replace(
            problem,
            scores_GF=problem.scores_GF[:, columns],
            costs_RGF=problem.costs_RGF[:, :, columns],
        )
        if part.present_GF.any(axis=1).all():
            ranked.append((bound(part, multipliers_R), tuple(columns.tolist())))
    for lowest, chosen in sorted(ranked):
        yield lowest, np.array(chosen, dtype=np.intp)
