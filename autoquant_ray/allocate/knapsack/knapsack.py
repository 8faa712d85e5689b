"""Exact multiple-choice knapsack on arrays: one format per group, least score, cost within limits.

1. :func:`sweep` orders the steps along the lower convex hulls of all groups. Its prefixes are the
   frontier, and the first step that no longer fits gives the Lagrange multiplier and a bound
   (:mod:`autoquant_ray.allocate.knapsack.greedy`).
2. :mod:`autoquant_ray.allocate.knapsack.lattice` lowers the limit to the next sum that the costs
   can form, and fills the room that the greedy prefix leaves.
3. :func:`tighten` drops every choice that cannot be part of a better allocation than the known one.
4. :mod:`autoquant_ray.allocate.knapsack.dynamic` runs a dynamic programme over the choices left.
   Its states are (cost, score) pairs; it drops a state that another dominates or whose bound is
   above the known allocation.

:mod:`autoquant_ray.allocate.knapsack.single` puts these together.

A general solver stops at absolute tolerances near 1e-6, above the scores of whole layers. Here
scores are compared as float64, so layers of 1e-3 and of 1e-12 nats are both decided exactly.
Sources: Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack knapsack"; Dyer 1984.

Shapes: G groups, F formats, R resources, S states, N hull steps. Names and error texts are in
:mod:`autoquant_ray.allocate.allocation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from autoquant_ray.arrays import Floats, Indices, Mask

SLACK = 1e-12  # relative rounding allowed when a budget is met exactly
MARGIN = 1e-13  # relative rounding of a bound; a state is dropped only beyond it


@dataclass(frozen=True, kw_only=True, eq=False)
class FormatLimit:
    """How many formats an allocation may use.

    Attributes:
        most: Formats used at most.
        number_F: Number of each column's format; columns of a format rounded by different methods
            have the same. -1 for a column that is not counted.
    """

    most: int
    number_F: Indices

    def counted(self, present_GF: Mask) -> list[int]:
        """Numbers of the formats that some group has."""
        numbers = np.unique(self.number_F[present_GF.any(axis=0)])
        return [number for number in numbers.tolist() if number >= 0]


@dataclass(frozen=True, kw_only=True)
class Knapsack:
    """Scores and costs as arrays. A format that a group lacks has score inf and cost 0."""

    scores_GF: Floats
    costs_RGF: Floats
    limits_R: Floats

    @property
    def present_GF(self) -> Mask:
        """Which group has which format."""
        return np.isfinite(self.scores_GF)

    def keep(self, mask: Mask) -> Knapsack:
        """The same knapsack with only the choices in ``mask``, which broadcasts to (G, F)."""
        scores = np.where(mask, self.scores_GF, np.inf)
        return replace(
            self, scores_GF=scores, costs_RGF=np.where(np.isfinite(scores), self.costs_RGF, 0.0)
        )

    def score(self, columns_G: Indices) -> float:
        """Summed score of one format (column) per group."""
        return math.fsum(self.scores_GF[np.arange(len(columns_G)), columns_G])

    def costs(self, columns_G: Indices) -> list[float]:
        """Summed cost per resource of one format (column) per group."""
        chosen_RG = self.costs_RGF[:, np.arange(len(columns_G)), columns_G]
        return [math.fsum(row) for row in chosen_RG]

    def is_within(self, columns_G: Indices) -> bool:
        """Whether one format (column) per group meets every limit."""
        pairs = zip(self.costs(columns_G), self.limits_R, strict=True)
        return all(cost <= limit * (1 + SLACK) for cost, limit in pairs)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An allocation that meets the limits, and a proven lower bound of the best score."""

    columns_G: Indices
    score: float
    lower: float

    @property
    def is_proven(self) -> bool:
        """Whether no allocation within the limits scores less."""
        return self.lower >= self.score

    @property
    def gap(self) -> float:
        """Relative distance from the score down to the proven bound."""
        return 0.0 if self.is_proven else (self.score - self.lower) / self.score


@dataclass(frozen=True)
class Sweep:
    """Steps along the lower convex hulls, best gain per cost first.

    ``start_G`` is the cheapest format of each group. Step n moves ``groups_N[n]`` from
    ``before_N[n]`` to ``columns_N[n]`` for ``costs_N[n]`` more cost and ``gains_N[n]`` less score.
    """

    start_G: Indices
    groups_N: Indices
    before_N: Indices
    columns_N: Indices
    costs_N: Floats
    gains_N: Floats
    rates_N: Floats

    def prefix(self, num_steps: int) -> Indices:
        """Columns after the first ``num_steps`` steps."""
        columns_G = self.start_G.copy()
        columns_G[self.groups_N[:num_steps]] = self.columns_N[:num_steps]
        return columns_G


def sweep(scores_GF: Floats, costs_GF: Floats) -> Sweep:
    """Order the steps of all lower convex hulls by gain per cost."""
    costs_GF = np.where(np.isfinite(scores_GF), costs_GF, np.inf)
    order_GF = np.lexsort((scores_GF, costs_GF), axis=-1)
    score_GF = np.take_along_axis(scores_GF, order_GF, axis=1)
    cost_GF = np.take_along_axis(costs_GF, order_GF, axis=1)
    rows = np.arange(len(scores_GF))
    at = np.zeros(len(rows), dtype=np.intp)
    last = np.full(len(rows), np.inf)
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    while not parts or rows.size:
        with np.errstate(invalid="ignore", divide="ignore"):
            more = cost_GF[rows] - cost_GF[rows, at][:, None]
            gain = score_GF[rows, at][:, None] - score_GF[rows]
            rate = np.where((more > 0) & (gain > 0), gain / more, 0.0)
        to, line = rate.argmax(axis=1), np.arange(len(rows))
        # Rounding must not put a group's later step before its earlier one.
        best = np.minimum(rate[line, to], last)
        live = best > 0
        step = np.full(len(rows), len(parts))
        moves = (order_GF[rows, at], order_GF[rows, to], more[line, to], gain[line, to], best)
        parts.append(tuple(values[live] for values in (step, rows, *moves)))
        rows, at, last = rows[live], to[live], best[live]
    step, *fields = (np.concatenate(column) for column in zip(*parts, strict=True))
    sequence = np.lexsort((fields[0], step, -fields[-1]))
    return Sweep(order_GF[:, 0], *(values[sequence] for values in fields))


def bound(knapsack: Knapsack, multipliers_R: Floats) -> float:
    """Lower bound of the best score, for any multipliers >= 0, rounded down."""
    least = math.fsum(knapsack.scores_GF.min(axis=1))
    return max(lagrangian(knapsack, multipliers_R), least)


def lagrangian(knapsack: Knapsack, multipliers_R: Floats) -> float:
    """The Lagrangian at some multipliers >= 0, rounded down."""
    price = float(multipliers_R @ knapsack.limits_R)
    total = math.fsum(reduced(knapsack, multipliers_R).min(axis=1))
    return total - price - MARGIN * (total + price)


def reduced(knapsack: Knapsack, multipliers_R: Floats) -> Floats:
    """Scores with the costs priced in, (G, F): score + sum of multiplier x cost."""
    priced: Floats = knapsack.scores_GF + np.tensordot(multipliers_R, knapsack.costs_RGF, axes=1)
    return priced


def losses(knapsack: Knapsack, multipliers_R: Floats) -> Floats:
    """How far each choice (G, F) is above its group's best at the multipliers, >= 0."""
    reduced_GF = reduced(knapsack, multipliers_R)
    above_GF: Floats = reduced_GF - reduced_GF.min(axis=1)[:, None]
    return above_GF


def tighten(knapsack: Knapsack, multipliers_R: Floats, score: float) -> Knapsack:
    """Drop the choices that are in no allocation with a score below or equal to ``score``."""
    spare = score - bound(knapsack, multipliers_R)
    kept = knapsack.keep(losses(knapsack, multipliers_R) <= spare * (1 + MARGIN))
    alive_GF = kept.present_GF
    open_G = np.flatnonzero(alive_GF.sum(axis=1) > 1)
    part = replace(kept, scores_GF=kept.scores_GF[open_G], costs_RGF=kept.costs_RGF[:, open_G])
    alive_GF[open_G] = undominated(part)
    return kept.keep(alive_GF)


def undominated(knapsack: Knapsack) -> Mask:
    """Choices of which no other in the group has both a score and costs as low."""
    scores_GF, costs_RGF, present_GF = knapsack.scores_GF, knapsack.costs_RGF, knapsack.present_GF
    alive_GF = present_GF.copy()
    later_F = np.arange(scores_GF.shape[1])
    for column in later_F:
        score_G1, cost_RG1 = scores_GF[:, column, None], costs_RGF[:, :, column, None]
        no_worse_GF = (score_G1 <= scores_GF) & (cost_RG1 <= costs_RGF).all(axis=0)
        equal_GF = (score_G1 == scores_GF) & (cost_RG1 == costs_RGF).all(axis=0)
        beaten_GF = no_worse_GF & (~equal_GF | (later_F > column))
        alive_GF &= ~(beaten_GF & present_GF[:, column, None])
    return alive_GF
