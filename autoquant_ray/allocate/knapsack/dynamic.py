"""Dynamic programme that finishes the knapsack: exact while its states fit, honest when not.

Groups are decided one after the other. A state is the cost and the score of the groups decided so
far. Three things keep states few: dominance; a bound from the hulls of the undecided groups
against the best allocation known; and completing states greedily along those hulls, which finds
near-best allocations early. Where states still grow beyond ``width``, those with the lowest
bounds stay, and the lowest bound that was let go limits what the answer may claim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from autoquant_ray.allocate.knapsack.knapsack import MARGIN, SLACK, Answer, Knapsack, sweep, tighten
from autoquant_ray.arrays import Floats, Indices

WIDTHS = (500, 10_000, 100_000)  # states kept per group in successive searches
MAX_STATES = 20_000_000  # states kept in one search over all groups, about 320 MB
MAX_GROUPS = 5_000  # with more groups undecided the known answer and its gap stand
NUM_NEIGHBOURS = 16  # states that a state is compared with where there are several resources
NUM_COMPLETED = 16  # states completed after a group where there are several resources


def search(knapsack: Knapsack, multipliers_R: Floats, answer: Answer, width: int) -> Answer:
    """Improve a known answer, or prove it best.

    Args:
        knapsack: Scores, costs and limits.
        multipliers_R: Lagrange multipliers (R,), >= 0; they weigh the costs in bounds.
        answer: An allocation within the limits.
        width: Most states kept after a group.

    Returns:
        The best allocation found; its bound equals its score unless states were let go.
    """
    kept = tighten(knapsack, multipliers_R, answer.score)
    if not kept.present_GF.any(axis=1).all():
        return replace(answer, lower=max(answer.lower, answer.score))  # nothing scores as low
    num_groups = int((kept.present_GF.sum(axis=1) > 1).sum())
    if num_groups > MAX_GROUPS:
        return answer
    run = _Run(kept, multipliers_R, answer, min(width, MAX_STATES // max(num_groups, 1)))
    for position in range(len(run.core)):
        run.decide(position)
        if not len(run.score_S):
            break
    columns_G = run.result()
    if columns_G is not None and knapsack.is_within(columns_G):
        rank = (knapsack.score(columns_G), knapsack.costs(columns_G))
        if rank < (answer.score, knapsack.costs(answer.columns_G)):
            answer = Answer(columns_G=columns_G, score=rank[0], lower=answer.lower)
    lower = max(answer.lower, min(answer.score, run.base_score + run.let_go))
    return Answer(columns_G=answer.columns_G, score=answer.score, lower=lower)


class _Run:
    """One pass over the groups with a choice; scores and costs count from each group's least."""

    def __init__(
        self, knapsack: Knapsack, multipliers_R: Floats, answer: Answer, width: int
    ) -> None:
        least_costs_RG = np.where(knapsack.present_GF, knapsack.costs_RGF, np.inf).min(axis=2)
        least_scores_G = knapsack.scores_GF.min(axis=1)
        base_costs_R = np.array([math.fsum(row) for row in least_costs_RG])
        self.width = width
        self.least_G: Indices = knapsack.scores_GF.argmin(axis=1)
        self.core = np.flatnonzero(knapsack.present_GF.sum(axis=1) > 1)
        self.scores_GF = (knapsack.scores_GF - least_scores_G[:, None])[self.core]
        self.costs_RGF = (knapsack.costs_RGF - least_costs_RG[:, :, None])[:, self.core]
        self._sort()
        self.room_R = knapsack.limits_R * (1 + SLACK / 2) - base_costs_R
        self.is_single = len(self.room_R) == 1
        self.weights_R = np.ones(1) if self.is_single else multipliers_R
        surrogate_GF = np.tensordot(self.weights_R, self.costs_RGF, axes=1)
        self.steps = sweep(self.scores_GF, surrogate_GF)
        rows, start_G = np.arange(len(self.core)), self.steps.start_G
        self.start_scores_G = self.scores_GF[rows, start_G]
        self.start_costs_G = surrogate_GF[rows, start_G]
        self.start_costs_RG = self.costs_RGF[:, rows, start_G]
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
        later = np.flatnonzero(self.steps.groups_N > position)
        gains = _running(self.steps.gains_N[later])
        ends = _running(self.steps.costs_N[later]) + self.start_costs_G[position + 1 :].sum()
        room = self.weights_R @ (self.room_R[:, None] - cost_R)
        started = score + self.start_scores_G[position + 1 :].sum()
        lowest = started - np.interp(room, ends, gains)
        near = np.flatnonzero(lowest <= self.target + self.margin)
        near = near[_pareto(score[near], cost_R[:, near])]
        near = self._narrow(near, lowest[near])
        self.score_S, self.cost_RS = score[near], cost_R[:, near]
        parent, choice = np.divmod(fits[near], len(columns))
        self.trail.append((parent, columns[choice]))
        if not len(near):
            return
        if self.is_single:
            num_steps = np.searchsorted(ends[1:], room[near], side="right")
        else:
            num_steps = self._steps_within(position, later, np.argsort(lowest[near], kind="stable"))
        value = np.where(num_steps < 0, np.inf, started[near] - gains[num_steps])
        self._remember(position, later, value, num_steps)

    def _steps_within(self, position: int, later: Indices, by_bound: Indices) -> Indices:
        """How many hull steps keep all resources within room; -1: none, or not looked at."""
        groups, steps = self.steps.groups_N[later], self.steps
        costs_R = self.costs_RGF[:, groups, steps.columns_N[later]]
        costs_R = costs_R - self.costs_RGF[:, groups, steps.before_N[later]]
        looked_at = by_bound[:NUM_COMPLETED]
        room_R = self.room_R - self.start_costs_RG[:, position + 1 :].sum(axis=1)
        room_RS = room_R[:, None] - self.cost_RS[:, looked_at]
        ends_R = np.stack([_running(row) for row in costs_R])
        within = (ends_R[:, None, :] <= room_RS[:, :, None]).all(axis=0)
        last = within.shape[1] - 1 - within[:, ::-1].argmax(axis=1)
        num_steps = np.full(len(by_bound), -1)
        num_steps[looked_at] = np.where(within.any(axis=1), last, -1)
        return num_steps

    def _remember(self, position: int, later: Indices, value: Floats, num_steps: Indices) -> None:
        """Keep the best completion as the allocation to beat."""
        state = int(value.argmin())
        is_exact = position == len(self.core) - 1 and self.let_go == math.inf
        if value[state] < self.target or is_exact:
            self.target = float(value[state])
            self.best = (position, state, later[: num_steps[state]])

    def _narrow(self, states: Indices, lowest: Floats) -> Indices:
        """Keep the ``width`` states with the lowest bounds, and remember what was let go."""
        if len(states) <= self.width:
            return states
        by_bound = np.argsort(lowest, kind="stable")
        self.let_go = min(self.let_go, float(lowest[by_bound[self.width]]) - self.margin)
        return states[np.sort(by_bound[: self.width])]

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


def _running(values: Floats) -> Floats:
    """Running sums from 0 on, one more than values."""
    return np.concatenate(([0.0], np.cumsum(values)))


def _pareto(score_S: Floats, cost_RS: Floats) -> Indices:
    """Positions of the states that no other one dominates.

    With several resources each state is compared only with its neighbours in score: comparing all
    pairs costs more than it drops.
    """
    order = np.lexsort((score_S, *cost_RS[::-1]))
    score, cost_R = score_S[order], cost_RS[:, order]
    keep = np.ones(len(order), dtype=bool)
    if len(cost_R) == 1:
        keep[1:] = score[1:] < np.minimum.accumulate(score)[:-1]
        return order[keep]
    keep[1:] = (cost_R[:, 1:] != cost_R[:, :-1]).any(axis=0)
    order = order[keep]
    order = order[np.argsort(score_S[order], kind="stable")]
    cost_R = cost_RS[:, order]
    keep = np.ones(len(order), dtype=bool)
    for distance in range(1, min(NUM_NEIGHBOURS, len(order) - 1) + 1):
        dominated = (cost_R[:, :-distance] <= cost_R[:, distance:]).all(axis=0)
        keep[distance:] &= ~dominated
    return order[keep]
