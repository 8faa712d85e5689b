"""The knapsack with one limit: from the greedy prefix to a proven or nearly proven allocation.

1. The costs' lattice lowers the limit, the hulls give a greedy allocation and a bound; exchanges of
   two choices improve the allocation.
2. Where few groups stay undecided, the dynamic programme decides them.
3. Where many do, the lattice's cheapest walk and a search over a small core, the moves that lose
   least (Pisinger's core), improve allocation and bound first. That leaves few undecided groups, or
   thousands of nearly equal ones, whose scores then differ from the bound in the last digits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autoquant_ray.allocate.knapsack.dynamic import WIDTHS, search
from autoquant_ray.allocate.knapsack.exchange import exchange
from autoquant_ray.allocate.knapsack.greedy import Relaxed, relax
from autoquant_ray.allocate.knapsack.knapsack import Answer, Knapsack, bound, losses
from autoquant_ray.allocate.knapsack.lattice import Lattice, fill, find
from autoquant_ray.arrays import Floats, Indices, Mask

FEW_GROUPS = 200  # undecided groups that need no preparation
_CORE = 100  # moves in the core
_CORE_ALIKE = 4  # of them with the same cost
_CORE_SHADES = 1e6  # losses that differ by less than the gap over this count as equal
_PATIENT_GROUPS = 5_000  # with more groups, wide searches are not worth their seconds below a gap
_PATIENCE = dict(zip(WIDTHS, (0.0, 1e-8, 1e-6), strict=True))  # width -> that gap


def solve_single(knapsack: Knapsack, close: float = 0.0) -> Answer | None:
    """Solve a knapsack with one resource; None where the limit cannot be met.

    Args:
        knapsack: Scores, costs and one limit.
        close: Relative gap that is good enough.
    """
    return solve_on(knapsack, find(knapsack), close=close)


def solve_on(
    knapsack: Knapsack,
    lattice: Lattice | None,
    start_G: Indices | None = None,
    close: float = 0.0,
) -> Answer | None:
    """The same with the lattice of the costs at hand.

    Args:
        knapsack: Scores, costs and one limit.
        lattice: From :func:`~autoquant_ray.allocate.knapsack.lattice.find`, with the same scores.
        start_G: An allocation within the limit that is likely to be good.
        close: Relative gap that is good enough.
    """
    knapsack = lattice.knapsack if lattice else knapsack
    relaxed = relax(knapsack)
    if relaxed is None:
        return None
    answer, multiplier_R = relaxed.answer, relaxed.multiplier_R
    if not answer.is_proven:
        answer = exchange(knapsack, multiplier_R, relaxed.prefix_G, answer)
    if start_G is not None and (score := knapsack.score(start_G)) < answer.score:
        answer = Answer(columns_G=start_G, score=score, lower=min(score, answer.lower))
    if answer.gap > close and lattice and _is_large(knapsack, multiplier_R, answer):
        answer = fill(lattice, multiplier_R, relaxed.prefix_G, answer)
    if answer.gap > close and _is_large(knapsack, multiplier_R, answer):
        kept = knapsack.keep(_core(knapsack, relaxed, answer))
        core_answer = search(kept, multiplier_R, answer, WIDTHS[0])
        answer = replace(core_answer, lower=answer.lower)
    for width in WIDTHS:
        patience = _PATIENCE[width] if len(knapsack.scores_GF) > _PATIENT_GROUPS else 0.0
        is_enough = answer.gap <= patience and _is_large(knapsack, multiplier_R, answer)
        if answer.gap <= close or is_enough:
            break
        answer = search(knapsack, multiplier_R, answer, width)
    return answer


def _is_large(knapsack: Knapsack, multiplier_R: Floats, answer: Answer) -> bool:
    if answer.is_proven:
        return False
    possible_GF = losses(knapsack, multiplier_R) <= answer.score - bound(knapsack, multiplier_R)
    return int((possible_GF.sum(axis=1) > 1).sum()) > FEW_GROUPS


def _core(knapsack: Knapsack, relaxed: Relaxed, answer: Answer) -> Mask:
    """Which choices (G, F) make the core: the hull prefix and the moves from it that lose least.

    Half of the moves cost more and half less, so that they can be combined to any sum. Of equal
    costs only a few are taken, and of about equal losses the smaller moves.
    """
    prefix_G, rows = relaxed.prefix_G, np.arange(len(relaxed.prefix_G))
    loss_GF = losses(knapsack, relaxed.multiplier_R)
    moved_GF = knapsack.costs_RGF[0] - knapsack.costs_RGF[0][rows, prefix_G][:, None]
    spare = answer.score - answer.lower
    groups_N, columns_N = np.nonzero((loss_GF <= spare) & (moved_GF != 0))
    loss_N, moved_N = loss_GF[groups_N, columns_N], moved_GF[groups_N, columns_N]
    order = np.lexsort((loss_N, moved_N))
    is_first = np.diff(moved_N[order], prepend=np.nan) != 0
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    order = order[np.arange(len(order)) - first < _CORE_ALIKE]
    shade = np.floor(loss_N[order] / spare * _CORE_SHADES)
    order = order[np.lexsort((np.abs(moved_N[order]), shade))]
    is_up = moved_N[order] > 0
    chosen = np.concatenate((order[is_up][: _CORE // 2], order[~is_up][: _CORE // 2]))
    mask_GF = np.zeros(loss_GF.shape, dtype=bool)
    mask_GF[rows, prefix_G] = True
    mask_GF[groups_N[chosen], columns_N[chosen]] = True
    return mask_GF
