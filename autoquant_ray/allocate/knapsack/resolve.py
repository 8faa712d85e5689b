"""The same choices and limits solved for many scores, each as exactly as a plan.

What depends on costs alone is done once. An allocation that is known to be good is where a search
starts, and stays the answer unless another one scores less. Limits that no group feels two of, such
as those of weights and of KV caches, are solved one by one.

Shapes as in :mod:`autoquant_ray.allocate.knapsack.knapsack`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autoquant_ray.allocate.knapsack.knapsack import SLACK, Knapsack
from autoquant_ray.allocate.knapsack.lattice import Lattice, find
from autoquant_ray.allocate.knapsack.several import solve_several
from autoquant_ray.allocate.knapsack.single import solve_on
from autoquant_ray.arrays import Floats, Indices


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Groups that only one limit is about.

    Attributes:
        rows: The groups.
        knapsack: Their costs and what the limit leaves them.
        lattice: Of these costs.
    """

    rows: Indices
    knapsack: Knapsack
    lattice: Lattice | None


class Resolver:
    """Solves a knapsack for other scores.

    Args:
        knapsack: Costs and limits, at least one; its scores are 0, and inf where a group lacks a
            format.
    """

    def __init__(self, knapsack: Knapsack) -> None:
        self._knapsack = knapsack
        self._parts = _parts(knapsack)

    @property
    def num_choices(self) -> int:
        """Number of (group, format)."""
        return int(self._knapsack.present_GF.sum())

    @property
    def is_fast(self) -> bool:
        """Whether limits do not depend on each other, so that a solution takes milliseconds."""
        return self._parts is not None

    def solve(self, scores_GF: Floats, start_G: Indices | None = None) -> Indices | None:
        """The allocation with the least score; None where none is within the limits.

        Args:
            scores_GF: Scores >= 0; those of formats that a group lacks do not count.
            start_G: An allocation that is likely to be good; the answer unless another one scores
                less.
        """
        scored = replace(self._knapsack, scores_GF=self._knapsack.scores_GF + scores_GF)
        is_known = start_G is not None and _is_allowed(scored, start_G)
        start_G = start_G if is_known else None
        columns_G = self._best(scored, start_G)
        if start_G is None or columns_G is None:
            return columns_G if start_G is None else start_G
        is_as_good = scored.score(start_G) <= scored.score(columns_G) * (1 + SLACK)
        return start_G if is_as_good else columns_G

    def _best(self, scored: Knapsack, start_G: Indices | None) -> Indices | None:
        if self._parts is None:
            answer = solve_several(scored)
            return None if answer is None else answer.columns_G
        columns_G = np.zeros(len(scored.scores_GF), dtype=np.intp)
        for part in self._parts:
            knapsack = replace(part.knapsack, scores_GF=scored.scores_GF[part.rows])
            lattice = part.lattice
            if lattice is not None:
                lowered = replace(lattice.knapsack, scores_GF=knapsack.scores_GF)
                lattice = replace(lattice, knapsack=lowered)
            part_start_G = None if start_G is None else start_G[part.rows]
            answer = solve_on(knapsack, lattice, part_start_G)
            if answer is None:
                return None
            columns_G[part.rows] = answer.columns_G
        return columns_G


def _is_allowed(knapsack: Knapsack, columns_G: Indices) -> bool:
    is_present = np.isfinite(knapsack.scores_GF[np.arange(len(columns_G)), columns_G]).all()
    return bool(is_present) and knapsack.is_within(columns_G)


def _parts(knapsack: Knapsack) -> list[_Part] | None:
    """The limits apart, each with its groups; None where a group has costs under several."""
    if len(knapsack.limits_R) == 1:
        rows = np.arange(len(knapsack.scores_GF))
        return [_Part(rows=rows, knapsack=knapsack, lattice=find(knapsack))]
    present_GF, costs_RGF = knapsack.present_GF, knapsack.costs_RGF
    least_RG = np.where(present_GF, costs_RGF, np.inf).min(axis=2)
    varies_RG = np.where(present_GF, costs_RGF, 0.0).max(axis=2) > least_RG
    if (varies_RG.sum(axis=0) > 1).any():
        return None
    parts = []
    for resource, varies_G in enumerate(varies_RG):
        # Groups that no limit distinguishes go with the first one.
        is_free_G = ~varies_RG.any(axis=0) if resource == 0 else np.zeros_like(varies_G)
        rows = np.flatnonzero(varies_G | is_free_G)
        others = np.setdiff1d(np.arange(len(varies_G)), rows)
        row = slice(resource, resource + 1)
        part = Knapsack(
            scores_GF=knapsack.scores_GF[rows],
            costs_RGF=costs_RGF[row, rows],
            limits_R=knapsack.limits_R[row] - least_RG[resource, others].sum(),
        )
        parts.append(_Part(rows=rows, knapsack=part, lattice=find(part) if rows.size else None))
    return parts
