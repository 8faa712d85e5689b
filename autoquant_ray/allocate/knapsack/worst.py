"""The knapsack whose loss is the largest of several: least ``max_d sum_g score_dg``, within limits.

For any weights on the domains that sum to 1, the weighted loss of an allocation is at most its
largest one, so the exact best weighted allocation bounds the answer from below and is a first one.
The best such weights are the multipliers of the linear relaxation; by them most choices are shown
to be in no better allocation and are dropped. HiGHS then looks at what is left
(:mod:`autoquant_ray.allocate.knapsack.several` says what its tolerances need), with a bound of its
own. It may leave a gap of 1e-4, far below what a score is exact to, and more where it ends early;
``gap`` says how far from proven the answer is.

Shapes: D domains, and those of :mod:`autoquant_ray.allocate.knapsack.knapsack`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import scipy  # its parts are loaded where they are first used: most knapsacks need none

from autoquant_ray.allocate.knapsack.knapsack import (
    MARGIN,
    Answer,
    FormatLimit,
    Knapsack,
    bound,
    losses,
    undominated,
)
from autoquant_ray.allocate.knapsack.several import TIGHTER, LinearModel
from autoquant_ray.allocate.knapsack.solve import solve_knapsack
from autoquant_ray.arrays import Floats, Indices, Mask

_SCALE = 1e4  # of the loss that is known to be reached, in HiGHS' rows
_TOLERANCE = 1e-5  # of that scale, taken off HiGHS' bound
_ROUNDS = ((1e-3, 20), (1e-4, 200))  # relative gap that HiGHS may leave, and its nodes
_EXACT, _FEW = 1e-7, 200  # gap where there are at most so many choices beside one per group


def largest_loss(scores_DGF: Floats, columns_G: Indices) -> float:
    """The largest summed score over the domains of one format (column) per group."""
    chosen_DG = scores_DGF[:, np.arange(len(columns_G)), columns_G]
    return max(math.fsum(row) for row in chosen_DG)


def solve_worst(knapsack: Knapsack, scores_DGF: Floats, limit: FormatLimit | None) -> Answer | None:
    """Choose formats for the least largest loss; None where the limits cannot be met.

    Args:
        knapsack: Costs and limits; its scores only say which group has which format.
        scores_DGF: Score per domain, >= 0, inf where a group lacks a format.
        limit: How many formats may be used; None: any number.
    """
    num_domains = len(scores_DGF)
    equal_D = np.full(num_domains, 1 / num_domains)
    best = _weighted(knapsack, scores_DGF, equal_D, limit)
    if best is None or best.is_proven:
        return best
    multipliers = _WorstModel(knapsack, scores_DGF, best, None).multipliers()
    if multipliers is None:
        multipliers = equal_D, np.zeros(len(knapsack.limits_R))
    weights_D, multipliers_R = multipliers
    best = _better(best, _weighted(knapsack, scores_DGF, weights_D, limit))
    mixed = _mixed(knapsack, scores_DGF, weights_D)
    for gap, num_nodes in _ROUNDS:
        if best.gap <= _EXACT:
            break
        spare = best.score - bound(mixed, multipliers_R)
        may_be_better_GF = losses(mixed, multipliers_R) <= spare + MARGIN * best.score
        # Prices may be far above the losses, and with them the rounding of the bound.
        may_be_better_GF[np.arange(len(best.columns_G)), best.columns_G] = True
        kept = knapsack.keep(may_be_better_GF)
        if kept.present_GF.sum() - len(kept.scores_GF) <= _FEW:
            gap = _EXACT
        model = _WorstModel(kept, scores_DGF, best, limit)
        best = _better(best, _by_highs(model, knapsack, scores_DGF, gap, num_nodes))
    return best


def _better(best: Answer, other: Answer | None) -> Answer:
    """The lower of two answers, with the higher of their bounds."""
    if other is None:
        return best
    least = min(best, other, key=lambda answer: answer.score)
    return replace(least, lower=min(least.score, max(best.lower, other.lower)))


def _mixed(knapsack: Knapsack, scores_DGF: Floats, weights_D: Floats) -> Knapsack:
    """The knapsack with the weighted scores."""
    mixed_GF = np.where(knapsack.present_GF, 0.0, np.inf)
    for weight, scores_GF in zip(weights_D.tolist(), scores_DGF, strict=True):
        mixed_GF += weight * np.where(knapsack.present_GF, scores_GF, 0.0)
    return replace(knapsack, scores_GF=mixed_GF)


def _weighted(
    knapsack: Knapsack,
    scores_DGF: Floats,
    weights_D: Floats,
    limit: FormatLimit | None,
) -> Answer | None:
    """The best allocation of a weighted loss, and what it says of the largest loss."""
    answer = solve_knapsack(_mixed(knapsack, scores_DGF, weights_D), limit)
    if answer is None:
        return None
    score = largest_loss(scores_DGF, answer.columns_G)
    # Weights may sum to 1 only up to rounding.
    lower = answer.lower * (1 - MARGIN * len(weights_D)) / max(1.0, math.fsum(weights_D))
    return Answer(columns_G=answer.columns_G, score=score, lower=min(score, lower))


def _by_highs(
    model: _WorstModel, knapsack: Knapsack, scores_DGF: Floats, gap: float, num_nodes: int
) -> Answer | None:
    """The mixed-integer programme; None where HiGHS found no allocation within the limits."""
    lower: float | None = None
    for cut in TIGHTER:
        columns_G, proven = model.solve(cut, gap, num_nodes)
        lower = proven if lower is None else lower  # only the uncut limits prove something
        if columns_G is None:
            break
        if knapsack.is_within(columns_G):
            score = largest_loss(scores_DGF, columns_G)
            return Answer(columns_G=columns_G, score=score, lower=min(score, lower))
    return None


class _WorstModel:
    """The linear model: a binary variable per choice, then per counted format, then the loss.

    Choices that alone lose more than is known to be reached are left out, and those that another
    one of the group beats in all costs and all domains; the latter stay where formats are counted.
    """

    def __init__(
        self,
        knapsack: Knapsack,
        scores_DGF: Floats,
        best: Answer,
        limit: FormatLimit | None,
    ) -> None:
        self._scale = _SCALE / best.score
        kept = knapsack.keep(_within_reach(knapsack, scores_DGF, best.score))
        if limit is None:
            kept = kept.keep(_unbeaten(kept, scores_DGF))
        self._model = LinearModel(kept, limit)
        chosen_DN = scores_DGF[:, self._model.groups, self._model.columns]
        self._num_domains, self._num_choices = chosen_DN.shape
        self._extra = len(self._model.counted)
        loss = -np.ones((self._num_domains, 1))
        switches = scipy.sparse.csr_array((self._num_domains, self._extra))
        self._losses = scipy.sparse.csr_array(
            scipy.sparse.hstack([scipy.sparse.csr_array(chosen_DN * self._scale), switches, loss])
        )
        self._objective = np.zeros(self._losses.shape[1])
        self._objective[-1] = 1.0

    def multipliers(self) -> tuple[Floats, Floats] | None:
        """Multipliers of the relaxation: (D,) of the domains, summing to 1, and (R,) of costs."""
        model = self._model
        none = scipy.sparse.csr_array((len(model.room_R), 1))
        loss_column = scipy.sparse.csr_array((model.choose_one.shape[0], 1))
        relaxation = scipy.optimize.linprog(
            self._objective,
            A_ub=scipy.sparse.vstack([self._losses, scipy.sparse.hstack([model.usage, none])]),
            b_ub=np.concatenate((np.zeros(self._num_domains), model.room_R)),
            A_eq=scipy.sparse.hstack([model.choose_one, loss_column]),
            b_eq=np.ones(model.choose_one.shape[0]),
            bounds=[(0, 1)] * self._num_choices + [(0, None)],
            method="highs",
        )
        if relaxation.status != 0:
            return None
        all_N = np.maximum(0.0, -np.asarray(relaxation.ineqlin.marginals, dtype=np.float64))
        weights_D, prices_R = all_N[: self._num_domains], all_N[self._num_domains :]
        total = float(weights_D.sum())
        if total <= 0:
            return None
        return weights_D / total, prices_R * model.cost_scale_R / (total * self._scale)

    def solve(self, cut: float, gap: float, num_nodes: int) -> tuple[Indices | None, float]:
        """Columns (G,), or None, and HiGHS' lower bound.

        Args:
            cut: Share by which the limits are lowered.
            gap: Relative gap that may be left.
            num_nodes: Nodes of the search at most.
        """
        rows = [
            scipy.optimize.LinearConstraint(
                scipy.sparse.hstack([row.A, scipy.sparse.csr_array((row.A.shape[0], 1))]),
                row.lb,
                row.ub,
            )
            for row in self._model.constraints(cut)
        ]
        rows.append(scipy.optimize.LinearConstraint(self._losses, -np.inf, 0))
        is_choice = np.ones(len(self._objective))
        is_choice[-1] = 0
        result = scipy.optimize.milp(
            self._objective,
            constraints=rows,
            integrality=is_choice,
            bounds=scipy.optimize.Bounds(0, np.where(is_choice > 0, 1.0, np.inf)),
            options={"mip_rel_gap": gap, "node_limit": num_nodes},
        )
        bound = result.mip_dual_bound
        lower = 0.0 if bound is None else max(0.0, (float(bound) - _TOLERANCE) / self._scale)
        if result.x is None or not math.isfinite(lower):
            return None, 0.0
        chosen_GF = np.zeros(self._model.shape)
        chosen_GF[self._model.groups, self._model.columns] = result.x[: self._num_choices]
        return chosen_GF.argmax(axis=1), lower


def _within_reach(knapsack: Knapsack, scores_DGF: Floats, largest_loss: float) -> Mask:
    """Choices that can be part of an allocation with a largest loss of at most ``largest_loss``."""
    least_DG = scores_DGF.min(axis=2)
    spare_D = np.maximum(0.0, largest_loss - least_DG.sum(axis=1)) + MARGIN * largest_loss
    within_GF: Mask = (scores_DGF - least_DG[:, :, None] <= spare_D[:, None, None]).all(axis=0)
    return within_GF & knapsack.present_GF


def _unbeaten(knapsack: Knapsack, scores_DGF: Floats) -> Mask:
    """Choices of which no other in the group is as low in every domain and every cost."""
    losses_DGF = np.where(knapsack.present_GF, scores_DGF, 0.0)
    everything = Knapsack(
        scores_GF=np.where(knapsack.present_GF, 0.0, np.inf),
        costs_RGF=np.concatenate((knapsack.costs_RGF, losses_DGF)),
        limits_R=np.full(len(knapsack.limits_R) + len(scores_DGF), np.inf),
    )
    return undominated(everything)
