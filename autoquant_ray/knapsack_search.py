"""Dynamic programme that finishes the knapsack: exact while its states fit, honest when not.

Groups are decided one after the other. A state is the cost and the score of the groups decided so
far. Three things keep states few: dominance; a bound from the hulls of the undecided groups
against the best allocation known; and, for one resource, completing every state greedily, which
finds near-best allocations early. Where states still grow beyond ``width``, those with the lowest
bounds stay, and the lowest bound that was let go limits what the answer may claim.
"""

from __future__ import annotations

import math

import numpy as np

from autoquant_ray.knapsack import (
    MARGIN,
    SLACK,
    Answer,
    Floats,
    Indices,
    Mask,
    Problem,
    relax,
    sweep,
    tighten,
)

WIDTHS = (500, 10_000, 100_000)  # states kept per group in successive searches
MAX_STATES = 20_000_000  # states kept in one search over all groups, about 320 MB
MAX_GROUPS = 5_000  # with more groups undecided the greedy answer and its gap stand


def solve_single(problem: Problem) -> Answer | None:
    """Solve a problem with one resource; None where the limit cannot be met."""
    relaxed = relax(problem)
    if relaxed is None:
        return None
    answer, multipliers_R = relaxed
    return finish(problem, multipliers_R, answer)


def finish(problem: Problem, multipliers_R: Floats, answer: Answer) -> Answer:
    """Search with more and more states until the answer is proven or the states are too many."""
    for width in WIDTHS:
        if not answer.is_proven:
            answer = search(problem, multipliers_R, answer, width)
    return answer


def search(problem: Problem, multipliers_R: Floats, answer: Answer, width: int) -> Answer:
    """Improve a known answer, or prove it best.

    Args:
        problem: Scores, costs and limits.
        multipliers_R: Lagrange multipliers (R,), >= 0; they weigh the costs in bounds.
        answer: An allocation within the limits.
        width: Most states kept after a group.

    Returns:
        The best allocation found; its bound equals its score unless states were let go.
    """
    kept = tighten(problem, multipliers_R, answer.score)
    num_open = int((kept.present_GF.sum(axis=1) > 1).sum())
    if num_open > MAX_GROUPS:
        return answer
    run = _Run(kept, multipliers_R, answer, min(width, MAX_STATES // max(num_open, 1)))
    for position in range(len(run.core)):
        run.decide(position)
        if not len(run.score_S):
            break
    columns_G = run.result()
    if columns_G is not None and problem.is_within(columns_G):
        found = (problem.score(columns_G), problem.costs(columns_G))
        if found < (answer.score, problem.costs(answer.columns_G)):
            answer = Answer(columns_G=columns_G, score=found[0], lower=answer.lower)
    lower = max(answer.lower, min(answer.score, run.base_score + run.let_go))
    return Answer(columns_G=answer.columns_G, score=answer.score, lower=lower)


class _Run:
    """One pass over the groups with a choice; scores and costs count from each group's least."""

    def __init__(self, problem: Problem, multipliers_R: Floats, answer: Answer, width: int) -> None:
        least_costs_RG = np.where(problem.present_GF, problem.costs_RGF, np.inf).min(axis=2)
        least_scores_G = problem.scores_GF.min(axis=1)
        base_costs_R = np.array([math.fsum(row) for row in least_costs_RG])
        self.width = width
        self.least_G: Indices = problem.scores_GF.argmin(axis=1)
        self.core = np.flatnonzero(problem.present_GF.sum(axis=1) > 1)
        self.scores_GF = (problem.scores_GF - least_scores_G[:, None])[self.core]
        self.costs_RGF = (problem.costs_RGF - least_costs_RG[:, :, None])[:, self.core]
        self._sort()
        self.room_R = problem.limits_R * (1 + SLACK / 2) - base_costs_R
        self.is_single = len(self.room_R) == 1
        self.weights_R = np.ones(1) if self.is_single else multipliers_R
        surrogate_GF = np.tensordot(self.weights_R, self.costs_RGF, axes=1)
        self.steps = sweep(self.scores_GF, surrogate_GF)
        start = (np.arange(len(self.core)), self.steps.start_G)
        self.start_scores_G, self.start_costs_G = self.scores_GF[start], surrogate_GF[start]
        self.base_score = math.fsum(least_scores_G)
        self.target = answer.score - self.base_score
        self.margin = MARGIN * (answer.score + math.fsum(self.start_scores_G))
        self.let_go = math.inf
        self.score_S, self.cost_RS = np.zeros(1), np.zeros((len(self.room_R), 1))
        self.trail: list[tuple[Indices, Indices]] = []
        self.best: tuple[int, int, Indices] | None = None

    def _sort(self) -> None:
        """Put first the groups whose decision weighs most: their states are pruned best."""
        spread = np.where(np.isfinite(self.scores_GF), self.scores_GF, 0.0).max(axis=1)
        order = np.argsort(-spread, kind="stable")
        self.core, self.scores_GF = self.core[order], self.scores_GF[order]
        self.costs_RGF = self.costs_RGF[:, order]

    def decide(self, position: int) -> None:
        """Extend every state by every choice of one group, then prune."""
        columns = np.flatnonzero(np.isfinite(self.scores_GF[position]))
        score = (self.score_S[:, None] + self.scores_GF[position, columns]).ravel()
        cost_R = self.cost_RS[:, :, None] + self.costs_RGF[:, position, columns][:, None, :]
        cost_R = cost_R.reshape(len(self.room_R), -1)
        fits = np.flatnonzero((cost_R <= self.room_R[:, None]).all(axis=0))
        score, cost_R = score[fits], cost_R[:, fits]
        later = self.steps.groups_N > position
        ends = np.concatenate(([0.0], np.cumsum(self.steps.costs_N[later])))
        gains = np.concatenate(([0.0], np.cumsum(self.steps.gains_N[later])))
        room = self.weights_R @ (self.room_R[:, None] - cost_R)
        room -= self.start_costs_G[position + 1 :].sum()
        started = score + self.start_scores_G[position + 1 :].sum()
        lowest = started - np.interp(room, ends, gains)
        near = np.flatnonzero(lowest <= self.target + self.margin)
        near = near[_pareto(score[near], cost_R[:, near])]
        near = self._narrow(near, lowest[near])
        self.score_S, self.cost_RS = score[near], cost_R[:, near]
        parent, choice = np.divmod(fits[near], len(columns))
        self.trail.append((parent, columns[choice]))
        self._complete(position, later, started[near], room[near], ends, gains)

    def _narrow(self, states: Indices, lowest: Floats) -> Indices:
        """Keep the ``width`` states with the lowest bounds, and remember what was let go."""
        if len(states) <= self.width:
            return states
        by_bound = np.argsort(lowest, kind="stable")
        self.let_go = min(self.let_go, float(lowest[by_bound[self.width]]) - self.margin)
        return states[np.sort(by_bound[: self.width])]

    def _complete(
        self,
        position: int,
        later: Mask,
        started: Floats,
        room: Floats,
        ends: Floats,
        gains: Floats,
    ) -> None:
        """Finish every state by the hull steps that fit, and remember the best allocation."""
        is_last = position == len(self.core) - 1
        if not len(started) or not (self.is_single or is_last):
            return
        num_steps = np.searchsorted(ends[1:], room, side="right")
        value = started - gains[num_steps]
        state = int(value.argmin())
        if value[state] < self.target or (is_last and self.let_go == math.inf):
            self.target = float(value[state])
            taken = np.flatnonzero(later)[: num_steps[state]]
            self.best = (position, state, taken)

    def result(self) -> Indices | None:
        """Columns (G,) of the best allocation of this run, if it found one."""
        if self.best is None:
            return None if len(self.core) else self.least_G
        position, state, taken = self.best
        chosen = self.steps.start_G.copy()
        chosen[self.steps.groups_N[taken]] = self.steps.columns_N[taken]
        for earlier in range(position, -1, -1):
            parent, column = self.trail[earlier]
            chosen[earlier] = column[state]
            state = int(parent[state])
        columns_G = self.least_G.copy()
        columns_G[self.core] = chosen
        return columns_G


def _pareto(score_S: Floats, cost_RS: Floats) -> Indices:
    """Positions of the states that no other one dominates, cheapest first.

    With several resources only states of equal cost are compared; the bound prunes the others.
    """
    order = np.lexsort((score_S, *cost_RS[::-1]))
    score, cost_R = score_S[order], cost_RS[:, order]
    keep = np.ones(len(order), dtype=bool)
    if len(cost_R) == 1:
        keep[1:] = score[1:] < np.minimum.accumulate(score)[:-1]
    else:
        keep[1:] = (cost_R[:, 1:] != cost_R[:, :-1]).any(axis=0)
    kept: Indices = order[keep]
    return kept
