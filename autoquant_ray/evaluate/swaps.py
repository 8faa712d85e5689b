"""Small changes of an allocation within its budgets: what ``refine`` tries.

A move gives a group another format, or two groups that interact theirs together (gate_up and down
of an MLP lose less together than the sum of both, for example). Proposals are single moves within
the budgets, and pairs of moves of different groups, one of which frees what the other needs,
ordered by predicted loss. Deterministic.

Shapes: G groups, F formats, R resources, M moves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.arrays import Floats, Mask
from autoquant_ray.evaluate.flip_estimates import Flip
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.method_names import without_method

Formats = Mapping[str, str]
Change = tuple[Flip, ...]
"""New formats of one group or of several."""

_SLACK = 1e-12
_MAX_MOVES = 1000  # the number of pairs grows with its square


class Swaps:
    """Changes of a problem's allocations.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> predicted loss in nats per token.
        options: Budgets and constraints that hold for every change.
        around: The same around an allocation, to order changes by; None: the scores.
        interactions: What two formats lose more than the sum of both, in nats per token; each pair
            in both orders. Such pairs are moves.
    """

    def __init__(
        self,
        problem: Problem,
        scores: Mapping[Flip, float],
        options: SolveOptions,
        around: Mapping[Flip, float] | None = None,
        interactions: Mapping[tuple[Flip, Flip], float] | None = None,
    ) -> None:
        self._budgets = problem.budgets(options)
        choices = allowed_choices(problem, scores, options)
        self._scores = {(c.group, c.format): c.score for c in choices}
        self._scores |= {f: loss for f, loss in (around or {}).items() if f in self._scores}
        self._costs = {
            (c.group, c.format): np.array([c.costs[budget.resource] for budget in self._budgets])
            for c in choices
        }
        self._tied = {group for tie in ties_of(problem, options) for group in tie}
        self._max_formats = options.max_formats
        self._interactions = dict(interactions or {})
        self._partners: dict[str, dict[str, None]] = {}
        for (group, _), (partner, _) in self._interactions:
            self._partners.setdefault(group, {})[partner] = None

    def room(self, formats: Formats) -> Floats:
        """Unused part of each budget under an allocation ``(R)``."""
        used = np.sum([self._costs[choice] for choice in formats.items()], axis=0)
        limits = np.array([float(budget.limit) for budget in self._budgets])
        room_R: Floats = limits * (1 + _SLACK) - used
        return room_R

    def fits(self, formats: Formats) -> bool:
        """Whether an allocation is within the budgets and the number of formats."""
        return bool((self.room(formats) >= 0).all()) and self._has_few_formats(formats)

    def moves(self, formats: Formats) -> list[Change]:
        """Every allowed (group, format) that is not in the allocation.

        Of groups that share a format, only the rounding can change.

        After them the pairs that interact.
        """
        singles = {
            (group, other): None
            for (group, other) in self._scores
            if other != formats[group]
            and (group not in self._tied or _is_same_format(other, formats[group]))
        }
        order = {flip: number for number, flip in enumerate(singles)}
        together = sorted(
            (order[flip], order[partner])
            for flip, partner in self._interactions
            if flip in order and partner in order and order[flip] < order[partner]
        )
        flips = list(singles)
        return [(flip,) for flip in flips] + [(flips[a], flips[b]) for a, b in together]

    def gain(self, change: Change, formats: Formats) -> float:
        """What a change of an allocation is predicted to lose more, in nats per token."""
        new = dict(change)
        gain = sum(self._scores[flip] - self._scores[flip[0], formats[flip[0]]] for flip in change)
        for group, partner in self._touched(new):
            before = (group, formats[group]), (partner, formats[partner])
            after = tuple((g, new.get(g, formats[g])) for g in (group, partner))
            gain += self._interactions.get((after[0], after[1]), 0.0)
            gain -= self._interactions.get(before, 0.0)
        return gain

    def _touched(self, new: Formats) -> Iterator[tuple[str, str]]:
        """Pairs of groups that interact, one of which changes, or both; each pair once."""
        for group in new:
            for partner in self._partners.get(group, ()):
                if partner not in new or group < partner:
                    yield group, partner

    def proposals(self, formats: Formats) -> Iterator[Change]:
        """Changes of an allocation within the budgets, the best by the scores first."""
        for moves in self.proposed_moves(formats):
            yield tuple(itertools.chain.from_iterable(moves))

    def proposed_moves(self, formats: Formats) -> Iterator[tuple[Change, ...]]:
        """The same as the one or two moves that make each change."""
        moves = self.moves(formats)
        if not moves:
            return
        gains_M = np.array([self.gain(move, formats) for move in moves])
        costs_MR = np.array([self._added_cost(move, formats) for move in moves])
        room_R = self.room(formats)
        if len(moves) > _MAX_MOVES:
            best = _most_useful(gains_M, costs_MR[:, 0])
            moves = [moves[m] for m in best]
            gains_M, costs_MR = gains_M[best], costs_MR[best]
        fits_MM = (costs_MR[:, None] + costs_MR[None] <= room_R).all(axis=2)
        first, second = np.nonzero(fits_MM & _are_apart(moves))
        singles = np.flatnonzero((costs_MR <= room_R).all(axis=1))
        changes: list[tuple[int, ...]] = [(int(m),) for m in singles]
        changes += list(zip(first.tolist(), second.tolist(), strict=True))
        predicted = np.concatenate([gains_M[singles], gains_M[first] + gains_M[second]])
        for index in np.argsort(predicted, kind="stable"):
            proposed = tuple(moves[m] for m in changes[index])
            change = dict(itertools.chain.from_iterable(proposed))
            if self._has_few_formats({**formats, **change}):
                yield proposed

    def _added_cost(self, change: Change, formats: Formats) -> Floats:
        """What a change costs more, of each resource ``(R)``."""
        added = [self._costs[flip] - self._costs[flip[0], formats[flip[0]]] for flip in change]
        cost_R: Floats = np.sum(added, axis=0)
        return cost_R

    def _has_few_formats(self, formats: Formats) -> bool:
        if self._max_formats is None:
            return True
        used = {without_method(name) for name in formats.values()} - {NONE}
        return len(used) <= self._max_formats


def _is_same_format(name: str, other: str) -> bool:
    return without_method(name) == without_method(other)


def _are_apart(moves: Sequence[Change]) -> Mask:
    """Which moves touch different groups and are no move together ``(M, M)``; each pair once."""
    groups = {
        group: number for number, group in enumerate(dict.fromkeys(g for m in moves for g, _ in m))
    }
    touches_MG = np.zeros((len(moves), len(groups)), dtype=np.float32)
    for number, move in enumerate(moves):
        touches_MG[number, [groups[group] for group, _ in move]] = 1
    apart_MM: Mask = np.triu(touches_MG @ touches_MG.T == 0, k=1)
    number_of = {move[0]: number for number, move in enumerate(moves) if len(move) == 1}
    for move in moves:
        places = [number_of[flip] for flip in move if flip in number_of]
        if len(places) == 2:
            apart_MM[places[0], places[1]] = False
    return apart_MM


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
