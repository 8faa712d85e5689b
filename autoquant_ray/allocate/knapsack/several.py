"""The knapsack with several limits, or with too many format sets to try one by one: HiGHS.

HiGHS (through ``scipy.optimize.milp``) stops at an absolute gap of 1e-6 and lets a row be exceeded
by 1e-6. So scores are scaled to the distance that is still open, costs to the room that is left, an
allocation is checked with exact sums, and, where the states fit, the dynamic programme of
:mod:`autoquant_ray.allocate.knapsack.dynamic` has the last word. HiGHS 1.12 prints a line of its
own (``HighsMipSolverData::...``) now and then, whatever its options say.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import scipy  # its parts are loaded where they are first used: most knapsacks need none

from autoquant_ray.allocate.knapsack.dynamic import WIDTHS, search
from autoquant_ray.allocate.knapsack.knapsack import (
    Answer,
    FormatLimit,
    Knapsack,
    bound,
    reduced,
    tighten,
    undominated,
)
from autoquant_ray.allocate.knapsack.single import solve_single
from autoquant_ray.arrays import Floats, Indices

_SCALE = 1e6  # objective range given to HiGHS, whose absolute gap is 1e-6
_ROUGH_GAP = 1e-4
_EXACT = {"mip_rel_gap": 0.0, "node_limit": 5_000}
TIGHTER = (0.0, 1e-9, 1e-8, 1e-7, 1e-6)  # relative cuts of the limits after rounding broke one


def solve_several(knapsack: Knapsack) -> Answer | None:
    """Solve a knapsack with several resources; None where the limits cannot be met together.

    1. A limit whose own best allocation meets the others too decides alone.
    2. Multipliers come from the linear relaxation, a first allocation from raising them; HiGHS
       looks for one, or shows that there is none, where that fails.
    3. The dynamic programme proves or improves it. Where its states are too many, HiGHS goes on,
       and the programme tries to prove what HiGHS found.
    """
    lower = 0.0
    for resource in range(len(knapsack.limits_R)):
        row = slice(resource, resource + 1)
        single = replace(
            knapsack, costs_RGF=knapsack.costs_RGF[row], limits_R=knapsack.limits_R[row]
        )
        answer = solve_single(single)
        if answer is None or (answer.is_proven and knapsack.is_within(answer.columns_G)):
            return answer
        lower = max(lower, answer.lower)
    kept = knapsack.keep(undominated(knapsack))
    multipliers_R = relaxed_multipliers(kept)
    answer = _priced_out(kept, multipliers_R) or solve_milp(kept, rough=True)
    if answer is None:
        return None
    lower = max(lower, answer.lower, bound(kept, multipliers_R))
    answer = replace(answer, lower=min(lower, answer.score))
    answer = search(knapsack, multipliers_R, answer, WIDTHS[0])
    if not answer.is_proven:
        polished = solve_milp(tighten(knapsack, multipliers_R, answer.score)) or answer
        lower = max(answer.lower, polished.lower)
        best = min(answer, polished, key=lambda candidate: candidate.score)
        best = replace(best, lower=min(best.score, lower))
        answer = search(knapsack, multipliers_R, best, WIDTHS[1])
    return answer if knapsack.is_within(answer.columns_G) else None


def _priced_out(knapsack: Knapsack, multipliers_R: Floats) -> Answer | None:
    """Each group's best choice at the multipliers, raised as little as meets the limits."""

    def cheapest_G(factor: float) -> Indices:
        columns_G: Indices = reduced(knapsack, factor * multipliers_R).argmin(axis=1)
        return columns_G

    low, high = 1.0, 1.0
    while not knapsack.is_within(cheapest_G(high)):
        if high > 1e6:
            return None
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if knapsack.is_within(cheapest_G(middle)) else (middle, high)
    columns_G = cheapest_G(high)
    return Answer(columns_G=columns_G, score=knapsack.score(columns_G), lower=0.0)


def solve_milp(
    knapsack: Knapsack,
    *,
    limit: FormatLimit | None = None,
    rough: bool = False,
) -> Answer | None:
    """Solve with HiGHS.

    Args:
        knapsack: Scores, costs and limits.
        limit: How many formats may be used; None: any number.
        rough: Stop at a relative gap of 1e-4.

    Returns:
        The best allocation found with HiGHS' own bound, or None where HiGHS found none. Where
        only rounding keeps HiGHS' allocation within the limits, it has a score above all others.
    """
    model = LinearModel(knapsack, limit)
    first = model.solve(0.0, rough)
    if first is None:
        return None
    for cut in TIGHTER:
        candidate = model.solve(cut, rough) if cut else first
        if candidate is not None and knapsack.is_within(candidate[0]):
            score = knapsack.score(candidate[0])
            return Answer(columns_G=candidate[0], score=score, lower=min(score, first[1]))
    # Rounding hides whether the limits can be met: a score above all lets the search decide.
    above = 1.0 + 2 * float(knapsack.scores_GF[knapsack.present_GF].sum())
    return Answer(columns_G=first[0], score=above, lower=first[1])


def relaxed_multipliers(knapsack: Knapsack) -> Floats:
    """Multipliers (R,) of the linear relaxation: score lost per cost, >= 0."""
    model = LinearModel(knapsack, None)
    relaxation = scipy.optimize.linprog(
        model.objective,
        A_ub=model.usage,
        b_ub=model.room_R,
        A_eq=model.choose_one,
        b_eq=np.ones(model.choose_one.shape[0]),
        bounds=(0, 1),
        method="highs",
    )
    if relaxation.status != 0:
        return np.zeros(len(knapsack.limits_R))
    scaled_R = np.maximum(0.0, -np.asarray(relaxation.ineqlin.marginals, dtype=np.float64))
    return scaled_R * model.cost_scale_R / model.score_scale


class LinearModel:
    """The scaled linear model; one binary variable per choice, then one per counted format."""

    def __init__(self, knapsack: Knapsack, limit: FormatLimit | None) -> None:
        present_GF = knapsack.present_GF
        self.groups, self.columns = np.nonzero(present_GF)
        self.shape = present_GF.shape
        least_G = knapsack.scores_GF.min(axis=1)
        least_RG = np.where(present_GF, knapsack.costs_RGF, np.inf).min(axis=2)
        extra = (knapsack.scores_GF - least_G[:, None])[present_GF]
        self.base_score = math.fsum(least_G)
        self.score_scale = _SCALE / max(float(extra.max(initial=0.0)), 1e-300)
        self.objective = extra * self.score_scale
        costs_R = (knapsack.costs_RGF - least_RG[:, :, None])[:, present_GF]
        room_R = knapsack.limits_R - np.array([math.fsum(row) for row in least_RG])
        largest_R = np.maximum(costs_R.max(axis=1, initial=0.0), np.abs(room_R))
        self.limits_R = knapsack.limits_R
        self.cost_scale_R = 1e3 / np.where(largest_R > 0, largest_R, 1.0)
        self.room_R = room_R * self.cost_scale_R
        self.usage = scipy.sparse.csr_array(costs_R * self.cost_scale_R[:, None])
        ones = (np.ones(len(self.groups)), (self.groups, np.arange(len(self.groups))))
        self.choose_one = scipy.sparse.csr_array(ones, shape=(self.shape[0], len(self.groups)))
        self.limit = limit
        counted = [] if limit is None else limit.counted(np.ones(self.shape, dtype=np.bool_))
        self.counted = np.array(counted, dtype=np.intp)

    def constraints(self, cut: float) -> list[scipy.optimize.LinearConstraint]:
        """Rows: one choice per group, the limits lowered by a relative cut, the formats."""
        extra = len(self.counted)
        pad = scipy.sparse.csr_array((self.shape[0], extra))
        pad_usage = scipy.sparse.csr_array((len(self.room_R), extra))
        room_R = self.room_R - cut * self.limits_R * self.cost_scale_R
        rows = [
            scipy.optimize.LinearConstraint(scipy.sparse.hstack([self.choose_one, pad]), 1, 1),
            scipy.optimize.LinearConstraint(
                scipy.sparse.hstack([self.usage, pad_usage]), -np.inf, room_R
            ),
        ]
        if self.limit is None:
            return rows
        # A choice needs its format switched on; at most so many are on.
        numbers = self.limit.number_F[self.columns]
        choice, position = np.nonzero(numbers[:, None] == self.counted)
        line, width = np.arange(len(choice)), len(self.columns)
        switch = scipy.sparse.csr_array((np.ones(len(line)), (line, choice)), (len(line), width))
        on = scipy.sparse.csr_array((-np.ones(len(line)), (line, position)), (len(line), extra))
        rows.append(scipy.optimize.LinearConstraint(scipy.sparse.hstack([switch, on]), -np.inf, 0))
        count = scipy.sparse.csr_array(np.concatenate((np.zeros(width), np.ones(extra)))[None])
        rows.append(scipy.optimize.LinearConstraint(count, -np.inf, self.limit.most))
        return rows

    def solve(self, cut: float, rough: bool) -> tuple[Indices, float] | None:
        """Columns (G,) and HiGHS' lower bound, or None where it found no allocation."""
        extra = len(self.counted)
        result = scipy.optimize.milp(
            np.concatenate((self.objective, np.zeros(extra))),
            constraints=self.constraints(cut),
            integrality=np.ones(len(self.objective) + extra),
            bounds=scipy.optimize.Bounds(0, 1),
            options={"mip_rel_gap": _ROUGH_GAP} if rough else _EXACT,
        )
        if result.x is None:
            return None
        chosen_GF = np.zeros(self.shape)
        chosen_GF[self.groups, self.columns] = result.x[: len(self.objective)]
        # HiGHS' own absolute gap and its row tolerance are taken off its bound.
        proven = (float(result.mip_dual_bound) - 1e-6) / self.score_scale
        return chosen_GF.argmax(axis=1), self.base_score + max(proven, 0.0)
