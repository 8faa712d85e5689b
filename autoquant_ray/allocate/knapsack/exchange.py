"""Better greedy allocations: exchange two choices at a time while the sum gets better.

The hull prefix leaves room that no single step fits. One group's dearer choice, paid by another
group's cheaper one, often does: the first allocations that the dynamic programme has to beat are
then closer to the bound, and fewer groups stay undecided. The exact answer does not change.

Shapes as in :mod:`autoquant_ray.allocate.knapsack.knapsack`; N moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoquant_ray.allocate.knapsack.knapsack import SLACK, Answer, Knapsack, losses
from autoquant_ray.arrays import Floats, Indices

_MOVES = 300  # that lose least; all pairs of them are compared
_EXCHANGES = 8


def exchange(knapsack: Knapsack, multiplier_R: Floats, start_G: Indices, answer: Answer) -> Answer:
    """Improve an answer by exchanges from an allocation within the one limit.

    Args:
        knapsack: Scores, costs and one limit.
        multiplier_R: The Lagrange multiplier (1,).
        start_G: Where exchanges begin: the hull prefix.
        answer: The best allocation so far, with its bound.

    Returns:
        The answer, or the better one that exchanges led to, with the same bound.
    """
    loss_GF = losses(knapsack, multiplier_R)
    columns_G = start_G
    for _ in range(_EXCHANGES):
        moves = _Moves.of(knapsack, loss_GF, columns_G, answer.score - answer.lower)
        changed_G = moves.best(columns_G)
        if changed_G is None or not knapsack.is_within(changed_G):
            return answer
        columns_G = changed_G
        score = knapsack.score(columns_G)
        if score < answer.score:
            answer = Answer(columns_G=columns_G, score=score, lower=min(score, answer.lower))
    return answer


@dataclass(frozen=True)
class _Moves:
    """Single changes of an allocation, the last of which changes nothing, and the room it leaves.

    Attributes:
        groups_N, columns_N: What changes; -1 for no group.
        costs_N, scores_N: More than now; negative where less.
        room: Cost that may be added.
    """

    groups_N: Indices
    columns_N: Indices
    costs_N: Floats
    scores_N: Floats
    room: float

    @classmethod
    def of(
        cls, knapsack: Knapsack, loss_GF: Floats, columns_G: Indices, most_lost: float
    ) -> _Moves:
        """The moves to choices that lose least at the multiplier, of those that lose so much."""
        rows, cost_GF = np.arange(len(columns_G)), knapsack.costs_RGF[0]
        can_move_GF = loss_GF <= most_lost
        can_move_GF[rows, columns_G] = False
        groups_N, columns_N = np.nonzero(can_move_GF)
        order = np.argsort(loss_GF[groups_N, columns_N], kind="stable")[:_MOVES]
        groups_N, columns_N = groups_N[order], columns_N[order]
        now_N = columns_G[groups_N]

        def change(values_GF: Floats) -> Floats:
            return np.append(values_GF[groups_N, columns_N] - values_GF[groups_N, now_N], 0.0)

        limit = float(knapsack.limits_R[0]) * (1 + SLACK / 2)
        return cls(
            groups_N=np.append(groups_N, -1),
            columns_N=np.append(columns_N, 0),
            costs_N=change(cost_GF),
            scores_N=change(knapsack.scores_GF),
            room=limit - knapsack.costs(columns_G)[0],
        )

    def best(self, columns_G: Indices) -> Indices | None:
        """The allocation after the best two moves that fit; None where none is better."""
        fits_NN = self.costs_N[:, None] + self.costs_N[None, :] <= self.room
        fits_NN &= self.groups_N[:, None] != self.groups_N[None, :]
        score_NN = np.where(fits_NN, self.scores_N[:, None] + self.scores_N[None, :], np.inf)
        pair = np.unravel_index(int(score_NN.argmin()), score_NN.shape)
        if not score_NN[pair] < 0:
            return None
        changed_G = columns_G.copy()
        for move in pair:
            if self.groups_N[move] >= 0:
                changed_G[self.groups_N[move]] = self.columns_N[move]
        return changed_G
