"""The greedy knapsack for one resource: prefixes of the sweep along the hulls, and their bound.

Shapes as in :mod:`autoquant_ray.allocate.knapsack.knapsack`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoquant_ray.allocate.knapsack.knapsack import SLACK, Answer, Knapsack, Sweep, bound, sweep
from autoquant_ray.arrays import Floats, Indices


def frontier_points(knapsack: Knapsack) -> list[tuple[float, float]]:
    """Summed cost and score after every step of the sweep, for the knapsack's one resource."""
    steps = sweep(knapsack.scores_GF, knapsack.costs_RGF[0])
    cheapest = knapsack.costs(steps.start_G)[0]
    costs = cheapest + np.concatenate(([0.0], np.cumsum(steps.costs_N)))
    # Summed from the good end: there the scores are smallest and rounding would show most.
    best = knapsack.score(steps.prefix(len(steps.costs_N)))
    scores = best + np.concatenate(([0.0], np.cumsum(steps.gains_N[::-1])))[::-1]
    return list(zip(costs.tolist(), scores.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """The answer of the greedy method.

    Attributes:
        answer: The allocation and its Lagrangian bound.
        multiplier_R: The Lagrange multiplier (1,): gain per cost of the step after the prefix.
        prefix_G: The allocation (G,) of the hull steps within the limit.
    """

    answer: Answer
    multiplier_R: Floats
    prefix_G: Indices


def relax(knapsack: Knapsack, *, fill: bool = True, steps: Sweep | None = None) -> Relaxed | None:
    """Greedy allocation, its lower bound and the multiplier, for the knapsack's one resource.

    Args:
        knapsack: Scores, costs and one limit.
        fill: After the last hull step within the limit, also take later ones that still fit.
        steps: The sweep of the knapsack, where it is known.

    Returns:
        The answer, or None where even the cheapest choices exceed the limit.
    """
    steps = steps or sweep(knapsack.scores_GF, knapsack.costs_RGF[0])
    num_steps = _num_steps_within(knapsack, steps)
    if num_steps is None:
        return None
    prefix_G = columns_G = steps.prefix(num_steps)
    if fill:
        columns_G = _fill(knapsack, steps, num_steps)
    multiplier_R = steps.rates_N[num_steps : num_steps + 1]
    if not multiplier_R.size:
        multiplier_R = np.zeros(1)
    score = knapsack.score(columns_G)
    answer = Answer(
        columns_G=columns_G, score=score, lower=min(score, bound(knapsack, multiplier_R))
    )
    return Relaxed(answer=answer, multiplier_R=multiplier_R, prefix_G=prefix_G)


def _num_steps_within(knapsack: Knapsack, steps: Sweep) -> int | None:
    """How many hull steps fit within the knapsack's one limit; None where the start does not."""
    if not knapsack.is_within(steps.start_G):
        return None
    spent_N = knapsack.costs(steps.start_G)[0] + np.cumsum(steps.costs_N)
    num_steps = int(np.searchsorted(spent_N, _limit(knapsack), side="right"))
    while not knapsack.is_within(steps.prefix(num_steps)):
        num_steps -= 1
    return num_steps


def _limit(knapsack: Knapsack) -> float:
    return float(knapsack.limits_R[0]) * (1 + SLACK / 2)


def _fill(knapsack: Knapsack, steps: Sweep, num_steps: int) -> Indices:
    """Take the hull prefix, then every later step that still fits."""
    columns_G = steps.prefix(num_steps)
    spare = _limit(knapsack) - knapsack.costs(columns_G)[0]
    later = num_steps + _reached(steps, num_steps, spare)
    rows = zip(
        *(values[later].tolist() for values in (steps.groups_N, steps.columns_N, steps.costs_N)),
        np.minimum.accumulate(steps.costs_N[later][::-1])[::-1].tolist(),
        strict=True,
    )
    blocked: set[int] = set()
    filled_G = columns_G.copy()
    for group, column, cost, least in rows:
        if least > spare:
            break
        if cost > spare:
            blocked.add(group)
        if group not in blocked:
            filled_G[group] = column
            spare -= cost
    return filled_G if knapsack.is_within(filled_G) else columns_G


def _reached(steps: Sweep, num_steps: int, spare: float) -> Indices:
    """Which steps after the prefix have no earlier step of their group, or are one, beyond spare.

    What is left out cannot be taken: a group's steps are taken in their order.
    """
    groups_N, is_beyond_N = steps.groups_N[num_steps:], steps.costs_N[num_steps:] > spare
    first_G = np.full(len(steps.start_G), len(groups_N))
    beyond = np.flatnonzero(is_beyond_N)[::-1]
    first_G[groups_N[beyond]] = beyond
    return np.flatnonzero(np.arange(len(groups_N)) < first_G[groups_N])
