"""Small changes of an allocation within its budgets: what ``refine`` tries.

A move gives a group another format. Proposals are single moves within the budgets, and pairs of
moves in two groups, one of which frees what the other needs, ordered by predicted loss.
Deterministic.

Shapes: G groups, F formats, R resources, M moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.arrays import Floats

Formats = Mapping[str, str]
Change = tuple[tuple[str, str], ...]
"""(group, format) of one or two moves."""

_SLACK = 1e-12
_MAX_MOVES = 1000  # the number of pairs grows with its square


class Swaps:
    """Changes of a problem's allocations.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> predicted loss in nats per token.
        options: Budgets and constraints that hold for every change.
    """

    def __init__(
        self, problem: Problem, scores: Mapping[tuple[str, str], float], options: SolveOptions
    ) -> None:
        self._budgets = problem.budgets(options)
        choices = allowed_choices(problem, scores, options)
        self._scores = {(c.group, c.format): c.score for c in choices}
        self._costs = {
            (c.group, c.format): [c.costs[budget.resource] for budget in self._budgets]
            for c in choices
        }
        self._tied = {group for tie in ties_of(problem, options) for group in tie}
        self._max_formats = options.max_formats

    def room(self, formats: Formats) -> Floats:
        """Unused part of each budget under an allocation ``(R)``."""
        used = np.sum([self._costs[choice] for choice in formats.items()], axis=0)
        limits = np.array([float(budget.limit) for budget in self._budgets])
        room_R: Floats = limits * (1 + _SLACK) - used
        return room_R

    def fits(self, formats: Formats) -> bool:
        """Whether an allocation is within the budgets and the number of formats."""
        return bool((self.room(formats) >= 0).all()) and self._has_few_formats(formats)

    def moves(self, formats: Formats) -> list[tuple[str, str]]:
        """Every allowed (group, format) that is not in the allocation; tied groups do not move."""
        return [
            (group, other)
            for (group, other) in self._scores
            if other != formats[group] and group not in self._tied
        ]

    def proposals(self, formats: Formats) -> Iterator[Change]:
        """Changes of an allocation within the budgets, the best by the scores first."""
        moves = self.moves(formats)
        if not moves:
            return
        gains_M = np.array([self._scores[m] - self._scores[m[0], formats[m[0]]] for m in moves])
        costs_MR = np.array(
            [
                np.subtract(self._costs[move], self._costs[move[0], formats[move[0]]])
                for move in moves
            ]
        )
        room_R = self.room(formats)
        if len(moves) > _MAX_MOVES:
            best = _most_useful(gains_M, costs_MR[:, 0])
            moves = [moves[m] for m in best]
            gains_M, costs_MR = gains_M[best], costs_MR[best]
        groups = {group: number for number, group in enumerate(formats)}
        group_M = np.array([groups[group] for group, _ in moves])
        fits_MM = (costs_MR[:, None] + costs_MR[None] <= room_R).all(axis=2)
        fits_MM &= group_M[:, None] < group_M[None]  # each pair once, of two groups
        first, second = np.nonzero(fits_MM)
        singles = np.flatnonzero((costs_MR <= room_R).all(axis=1))
        changes: list[tuple[int, ...]] = [(int(m),) for m in singles]
        changes += list(zip(first.tolist(), second.tolist(), strict=True))
        predicted = np.concatenate([gains_M[singles], gains_M[first] + gains_M[second]])
        for index in np.argsort(predicted, kind="stable"):
            change = tuple(moves[m] for m in changes[index])
            if self._has_few_formats({**formats, **dict(change)}):
                yield change

    def _has_few_formats(self, formats: Formats) -> bool:
        if self._max_formats is None:
            return True
        return len(set(formats.values()) - {"none"}) <= self._max_formats


def _most_useful(gains_M: Floats, costs_M: Floats) -> list[int]:
    """The moves with the most gain per cost and those with the most saving per loss, half each."""
    rates_M = gains_M / np.where(costs_M == 0, np.inf, np.abs(costs_M))
    chosen: set[int] = set()
    for side in (costs_M > 0, costs_M <= 0):
        of_side = np.flatnonzero(side)
        order = of_side[np.argsort(rates_M[of_side], kind="stable")]
        chosen |= set(order[: _MAX_MOVES // 2].tolist())
    return sorted(chosen)


def combine(changes: Sequence[Change]) -> list[Change]:
    """Changes that touch different groups, taken greedily, best first."""
    touched: set[str] = set()
    kept = []
    for change in changes:
        groups = {group for group, _ in change}
        if not groups & touched:
            touched |= groups
            kept.append(change)
    return kept
