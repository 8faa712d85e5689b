"""Choose the method for a knapsack, and try format sets one by one under a limit on formats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.knapsack import Answer, FormatLimit, Knapsack, bound
from autoquant_ray.allocate.knapsack.several import relaxed_multipliers, solve_milp, solve_several
from autoquant_ray.allocate.knapsack.single import solve_single
from autoquant_ray.arrays import Floats, Indices

_MAX_SETS = 20_000  # format sets tried one by one; beyond, HiGHS decides with binary variables


def solve_knapsack(
    knapsack: Knapsack, limit: FormatLimit | None = None, *, close: float = 0.0
) -> Answer | None:
    """Solve a knapsack; None where the limits cannot be met.

    Args:
        knapsack: Scores, costs and limits, at least one resource.
        limit: How many formats may be used; None: any number.
        close: Relative gap that is good enough, for one resource and any number of formats.
    """
    if limit is None:
        return _solve_plain(knapsack, close)
    counted = limit.counted(knapsack.present_GF)
    if limit.most >= min(len(counted), len(knapsack.scores_GF)):
        return _solve_plain(knapsack, close)
    if math.comb(len(counted), limit.most) > _MAX_SETS:
        answer = solve_milp(knapsack, limit=limit, rough=True)
        return answer if answer and knapsack.is_within(answer.columns_G) else None
    return _solve_sets(knapsack, limit, counted)


def reachable(knapsack: Knapsack, limit: FormatLimit | None) -> list[tuple[float, float]] | None:
    """Lowest and highest summed cost per resource; None where no format set covers the groups."""
    ranges = []
    for cost_GF in knapsack.costs_RGF:
        least = Knapsack(
            scores_GF=np.where(knapsack.present_GF, cost_GF, np.inf),
            costs_RGF=np.zeros((1, *cost_GF.shape)),
            limits_R=np.zeros(1),
        )
        answer = solve_knapsack(least, limit)
        if answer is None:
            return None
        ranges.append((answer.score, math.fsum(cost_GF.max(axis=1))))
    return ranges


def _solve_plain(knapsack: Knapsack, close: float = 0.0) -> Answer | None:
    if len(knapsack.limits_R) > 1:
        return solve_several(knapsack)
    return solve_single(knapsack, close)


def _solve_sets(knapsack: Knapsack, limit: FormatLimit, counted: Sequence[int]) -> Answer | None:
    """Try the format sets in the order of their bounds until no bound is below the best score."""
    multipliers_R = _multipliers(knapsack)
    if multipliers_R is None:
        return None
    best: Answer | None = None
    lower = math.inf
    for lowest, chosen in _ranked_sets(knapsack, limit, counted, multipliers_R):
        if best is not None and lowest > best.score:
            break
        subset = _only(knapsack, chosen)
        answer = None if best and _is_worse(subset, best.score) else _solve_plain(subset)
        if answer is None:
            continue
        lower = min(lower, answer.lower)
        if best is None or _key(knapsack, answer) < _key(knapsack, best):
            best = answer
    return None if best is None else replace(best, lower=min(best.score, lower))


def _key(knapsack: Knapsack, answer: Answer) -> tuple[float, list[float]]:
    return answer.score, knapsack.costs(answer.columns_G)


def _multipliers(knapsack: Knapsack) -> Floats | None:
    if len(knapsack.limits_R) > 1:
        return relaxed_multipliers(knapsack)
    relaxed = relax(knapsack)
    return None if relaxed is None else relaxed.multiplier_R


def _only(knapsack: Knapsack, columns: Indices) -> Knapsack:
    mask = np.zeros(knapsack.scores_GF.shape[1], dtype=bool)
    mask[columns] = True
    return knapsack.keep(mask)


def _is_worse(subset: Knapsack, score: float) -> bool:
    """Whether a cheap bound already shows that a format set cannot reach ``score``."""
    if len(subset.limits_R) > 1:
        return bound(subset, relaxed_multipliers(subset)) > score
    relaxed = relax(subset)
    return relaxed is None or relaxed.answer.lower > score


def _ranked_sets(
    knapsack: Knapsack, limit: FormatLimit, counted: Sequence[int], multipliers_R: Floats
) -> Iterator[tuple[float, Indices]]:
    """Format sets that give every group a format, lowest bound first."""
    ranked = []
    for chosen in itertools.combinations(counted, limit.most):
        columns = np.flatnonzero(np.isin(limit.number_F, (-1, *chosen)))
        part = replace(
            knapsack,
            scores_GF=knapsack.scores_GF[:, columns],
            costs_RGF=knapsack.costs_RGF[:, :, columns],
        )
        if part.present_GF.any(axis=1).all():
            ranked.append((bound(part, multipliers_R), tuple(columns.tolist())))
    for lowest, chosen in sorted(ranked):
        yield lowest, np.array(chosen, dtype=np.intp)
