"""How sure an allocation is, given that its scores were measured on a finite number of shards.

The shards are resampled with replacement (bootstrap), and every resample is solved again, by the
exact solver of plans (:mod:`autoquant_ray.allocate.knapsack.resolve`): another solver would differ
from it in groups of which the scores are sure. Where the plan is as good as any in a resample, it
is the resample's allocation. With ``S`` the full sample's score of an allocation, ``S_b`` that of
resample b, ``a`` the full sample's own allocation and ``a_b`` that of resample b:

- the share of the resamples in which a group keeps its format: near 1 the decision is certain,
  near one half it is a coin toss;
- expected regret = n / (n - 1) * mean over b of ``(S(a_b) - S(a)) + (S_b(a) - S_b(a_b))``, as a
  share of ``S(a)``: what the allocation is expected to lose because its scores are estimates.

Why both differences. Let ``T`` be the true score and ``t`` its best allocation. The regret of ``a``
is ``T(a) - T(t)``. As ``S(a) <= S(t)``, it is at most ``(S - T)(t) - (S - T)(a)``: by how much more
the errors of the scores favour ``a`` than ``t``. The resamples play the estimates and the full
sample plays the truth, so the mean of ``(S - S_b)(a_b) - (S - S_b)(a)``, which is the sum above,
estimates that bound. The first difference alone, the regret of the resamples' allocations, is what
is expected only if the full sample is as well behaved as the truth. It is not: an allocation is
chosen where errors make scores small, and there errors, being relative, look small too. In
simulations with 4 to 60 shards the first difference alone was as little as 0.65 of the true regret;
the sum was 1.2 to 2.8 times the true regret: it errs high. ``n / (n - 1)``, n the number of shards,
makes up for the spread of resamples, whose square is that much below that of samples.

Sums of shards are enough: no number above changes when all scores are multiplied by one factor.
Source of the bootstrap: Efron 1979, "Bootstrap methods: another look at the jackknife".

Shapes: S shards, B resamples, G groups, F formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.resolve import Resolver
from autoquant_ray.arrays import Floats, Indices

NUM_RESAMPLES = 200
_FEWEST = 20
_FEWEST_COUPLED = 10
_MOST_CHOICES = 2_000_000  # all resamples together, so that they take seconds
_SLOWNESS = 60  # of limits that groups feel together, against a single one


@dataclass(frozen=True, kw_only=True)
class Stability:
    """What the resamples say about the full sample's allocation.

    Attributes:
        columns_G: The allocation: format (column) per group.
        expected_regret: Share of the allocation's own score, >= 0; 0 where that score is 0.
        share_GF: Share of the resamples in which a group takes a format, 0 to 1.
        num_resamples: Number of resamples.
    """

    columns_G: Indices
    expected_regret: float
    share_GF: Floats
    num_resamples: int

    def share_of(self, columns_G: Indices) -> Floats:
        """Share of the resamples in which each group takes a given format (column)."""
        share_G: Floats = self.share_GF[np.arange(len(columns_G)), columns_G]
        return share_G

    @property
    def kept_G(self) -> Floats:
        """Share of the resamples in which a group keeps its format, 0 to 1."""
        return self.share_of(self.columns_G)


def affordable_resamples(resolver: Resolver) -> int:
    """How many resamples take seconds: 200, fewer for large problems, the same on any machine."""
    slowness, fewest = (1, _FEWEST) if resolver.is_fast else (_SLOWNESS, _FEWEST_COUPLED)
    affordable = _MOST_CHOICES // max(1, slowness * resolver.num_choices)
    return max(fewest, min(NUM_RESAMPLES, affordable))


def assess(
    knapsack: Knapsack,
    sums_SGF: Floats,
    seed: Sequence[int],
    *,
    num_resamples: int | None = None,
    plan_G: Indices | None = None,
) -> Stability | None:
    """Resample the shards and compare the allocations.

    The result depends on the arguments alone, to the last bit: only elementwise operations in
    the order of the shards, no matrix product whose order of sums a library chooses.

    Args:
        knapsack: Costs and limits; its scores are 0, and inf where a group lacks a format.
        sums_SGF: Every shard's sums, in any one unit; where a group lacks a format, 0.
        seed: Seed of the resampling.
        num_resamples: Number of resamples; None: as many as are affordable.
        plan_G: The allocation, if it was solved before; it counts where it is as good as any.

    Returns:
        The comparison, or None where no allocation is within the limits.
    """
    resolver = Resolver(knapsack)
    count = affordable_resamples(resolver) if num_resamples is None else num_resamples
    total_GF = sums_SGF.cumsum(axis=0)[-1]
    totals_BGF = _resampled(sums_SGF, seed, count)
    # A resample has the tokens of other shards; only shares of scores are compared.
    return compare_resamples(
        resolver, total_GF, totals_BGF, num_shards=len(sums_SGF), plan_G=plan_G
    )


def compare_resamples(
    resolver: Resolver,
    total_GF: Floats,
    totals_BGF: Floats,
    *,
    num_shards: int,
    plan_G: Indices | None = None,
) -> Stability | None:
    """Solve every resample and compare its allocation with that of the full sample.

    Args:
        resolver: Costs and limits.
        total_GF: The full sample's scores.
        totals_BGF: The resamples' scores, in the same unit.
        num_shards: Shards that each resample was drawn from.
        plan_G: As in :func:`assess`.

    Returns:
        The comparison, or None where no allocation is within the limits.
    """
    columns_G = resolver.solve(total_GF, plan_G)
    if columns_G is None:
        return None
    groups_G = np.arange(len(columns_G))

    def difference(scores_GF: Floats, more_G: Indices, less_G: Indices) -> float:
        """How much more an allocation loses than another."""
        moved = np.flatnonzero(more_G != less_G)
        losses = (scores_GF[moved, more_G[moved]], scores_GF[moved, less_G[moved]])
        return math.fsum([*losses[0].tolist(), *(-losses[1]).tolist()])

    score = math.fsum(total_GF[groups_G, columns_G])
    regrets = []
    share_GF = np.zeros_like(total_GF)
    for totals_GF in totals_BGF:
        other_G = resolver.solve(totals_GF, columns_G)
        assert other_G is not None, "the plan is within the limits"
        bound = difference(total_GF, other_G, columns_G) + difference(totals_GF, columns_G, other_G)
        regrets.append(max(0.0, bound))
        share_GF[groups_G, other_G] += 1
    count = len(totals_BGF)
    mean = math.fsum(regrets) / count * num_shards / max(1, num_shards - 1)
    return Stability(
        columns_G=columns_G,
        expected_regret=mean / score if score > 0 else 0.0,
        share_GF=share_GF / count,
        num_resamples=count,
    )


def mean_loss(resolver: Resolver, total_GF: Floats, others_NGF: Iterable[Floats]) -> float | None:
    """Mean score of the allocations that other scores lead to; None where there is none.

    Args:
        resolver: Costs and limits.
        total_GF: The scores that count.
        others_NGF: The scores that are solved for.
    """
    losses = []
    for others_GF in others_NGF:
        columns_G = resolver.solve(others_GF)
        if columns_G is None:
            return None
        losses.append(math.fsum(total_GF[np.arange(len(columns_G)), columns_G]))
    return math.fsum(losses) / len(losses)


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
