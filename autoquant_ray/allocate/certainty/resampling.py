"""How sure an allocation is, given that its scores were measured on a finite number of shards.

The shards are resampled with replacement (bootstrap), and every resample is solved again. The
scores of all shards play the truth, a resample plays the estimate. With ``S`` the full sample's
score of an allocation, ``a`` the full sample's own allocation and ``a_b`` that of resample b:

- expected regret = mean over b of ``max(0, S(a_b) - S(a)) / S(a)``: the share of its predicted KL
  that the allocation is expected to lose because its scores are estimates;
- the share of the resamples in which a group keeps its format: near 1 the decision is certain,
  near one half it is a coin toss.

A score is a ratio, ``1/2 * sum / num_tokens``. Both numbers above, and the choice of an
allocation, do not change when all scores are multiplied by one factor, so sums are enough here.

Every resample is solved along the frontier, in well under a millisecond, not exactly. Two
allocations near the frontier may differ by one step of it where the scores hardly do, so the
regret of a model with few groups comes out too high rather than too low, and never below a small
floor. Source of the bootstrap: Efron 1979, "Bootstrap methods: another look at the jackknife".

Shapes: S shards, B resamples, G groups, F formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.arrays import Floats, Indices

NUM_RESAMPLES = 200
_NUM_DOUBLINGS = 100  # of the price of the second budget until it is met
_NUM_HALVINGS = 8  # of the interval of that price


@dataclass(frozen=True, kw_only=True)
class Stability:
    """What the resamples say about the full sample's allocation.

    Attributes:
        columns_G: The allocation: format (column) per group.
        expected_regret: Share of the allocation's own score, >= 0; 0 where that score is 0.
        share_GF: Share of the resamples in which a group takes a format, 0 to 1.
    """

    columns_G: Indices
    expected_regret: float
    share_GF: Floats

    def share_of(self, columns_G: Indices) -> Floats:
        """Share of the resamples in which each group takes a given format (column)."""
        share_G: Floats = self.share_GF[np.arange(len(columns_G)), columns_G]
        return share_G

    @property
    def kept_G(self) -> Floats:
        """Share of the resamples in which a group keeps its format, 0 to 1."""
        return self.share_of(self.columns_G)


def assess(
    knapsack: Knapsack,
    sums_SGF: Floats,
    seed: Sequence[int],
    num_resamples: int = NUM_RESAMPLES,
) -> Stability | None:
    """Resample the shards and compare the allocations.

    The result depends on the arguments alone, to the last bit: only elementwise operations in
    the order of the shards, no matrix product whose order of sums a library chooses.

    Args:
        knapsack: Costs and limits; its scores are 0, and inf where a group lacks a format.
        sums_SGF: Every shard's sums, in any one unit; where a group lacks a format, 0.
        seed: Seed of the resampling.
        num_resamples: Number of resamples.

    Returns:
        The comparison, or None where an allocation within the limits was not found.
    """
    truth = replace(knapsack, scores_GF=knapsack.scores_GF + sums_SGF.cumsum(axis=0)[-1])
    return compare_resamples(knapsack, truth, _resampled(sums_SGF, seed, num_resamples))


def compare_resamples(knapsack: Knapsack, truth: Knapsack, totals_BGF: Floats) -> Stability | None:
    """Solve every resample and compare its allocation with that of the full sample.

    Args:
        knapsack: Costs and limits; its scores are 0, and inf where a group lacks a format.
        truth: The same with the full sample's scores.
        totals_BGF: The resamples' scores.

    Returns:
        The comparison, or None where an allocation within the limits was not found.
    """
    allocation = allocate(truth)
    if allocation is None:
        return None
    columns_G, price = allocation
    score = truth.score(columns_G)
    losses = []
    share_GF = np.zeros_like(truth.scores_GF)
    groups_G = np.arange(len(columns_G))
    num_resamples = len(totals_BGF)
    for totals_GF in totals_BGF:
        resample = replace(knapsack, scores_GF=knapsack.scores_GF + totals_GF)
        other = allocate(resample, price)
        if other is None:
            return None
        losses.append(max(0.0, truth.score(other[0]) - score))
        share_GF[groups_G, other[0]] += 1
    mean = math.fsum(losses) / num_resamples
    return Stability(
        columns_G=columns_G,
        expected_regret=mean / score if score > 0 else 0.0,
        share_GF=share_GF / num_resamples,
    )


def allocate(knapsack: Knapsack, price: float = 0.0) -> tuple[Indices, float] | None:
    """Format (column) per group, near the least score within one or two limits; no proof.

    Along the frontier of the first limit. Where that breaks the second one, its cost is added to
    the scores at the lowest price, found by bisection, at which both limits hold.

    Args:
        knapsack: Scores, costs and limits.
        price: The price of a similar knapsack, from which to look for this one's; 0 if unknown.

    Returns:
        The formats and the price, or None where no such allocation was found.
    """
    columns_G = _along_first(knapsack, 0.0)
    if columns_G is None or knapsack.is_within(columns_G):
        return None if columns_G is None else (columns_G, 0.0)
    low, high = 0.0, price / 2 or _first_price(knapsack)
    for _ in range(_NUM_DOUBLINGS):
        columns_G = _along_first(knapsack, high)
        if columns_G is not None and knapsack.is_within(columns_G):
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        middle_G = _along_first(knapsack, middle)
        if middle_G is not None and knapsack.is_within(middle_G):
            high, columns_G = middle, middle_G
        else:
            low = middle
    return columns_G, high


def _along_first(knapsack: Knapsack, price: float) -> Indices | None:
    """Allocation within the first limit, the second cost priced in; None where there is none."""
    scores_GF = knapsack.scores_GF
    if price:
        scores_GF = scores_GF + price * knapsack.costs_RGF[1]
    first = Knapsack(
        scores_GF=scores_GF, costs_RGF=knapsack.costs_RGF[:1], limits_R=knapsack.limits_R[:1]
    )
    answer = relax(first)
    return None if answer is None else answer.answer.columns_G


def _first_price(knapsack: Knapsack) -> float:
    """A price far below any that matters: a millionth of all scores over all costs."""
    scores = float(np.where(knapsack.present_GF, knapsack.scores_GF, 0.0).sum())
    return 1e-6 * scores / float(knapsack.costs_RGF[1].sum()) if scores > 0 else 1e-300


def drawn_counts(num_shards: int, seed: Sequence[int], num_resamples: int) -> Indices:
    """How often each shard is in each resample (B, S) of as many shards as there are."""
    drawn_BS = np.random.default_rng(seed).integers(num_shards, size=(num_resamples, num_shards))
    return np.stack([np.bincount(drawn_S, minlength=num_shards) for drawn_S in drawn_BS])


def _resampled(sums_SGF: Floats, seed: Sequence[int], num_resamples: int) -> Floats:
    """Totals (B, G, F) of as many shards as there are, drawn with replacement."""
    counts_BS = drawn_counts(len(sums_SGF), seed, num_resamples)
    totals_BGF = np.zeros((num_resamples, *sums_SGF.shape[1:]))
    for counts_B, sums_GF in zip(counts_BS.T, sums_SGF, strict=True):
        totals_BGF += counts_B[:, None, None] * sums_GF
    return totals_BGF
