"""How sure a solution is: the shards resampled, the budget solved again, and the null beside it.

Scores are measured on a finite number of shards. :mod:`autoquant_ray.stability` resamples them
(bootstrap) and solves every resample with the fast solver; here its findings get the names of
groups. The null is what allocations from shuffled scores would lose under the true ones: a plan
that is not clearly better has learned nothing from its scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.allocation import restrict
from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.formats import NONE
from autoquant_ray.knapsack import Floats
from autoquant_ray.stability import NUM_RESAMPLES, allocate, assess
from autoquant_ray.stopping import budget_problem

CERTAIN = 0.95
"""A group that keeps its format in this share of the resamples is decided."""
COIN_TOSS = 0.6
"""One that keeps it in less than this share might as well be drawn."""
NUM_SHUFFLES = 20
_MAX_CHOICES = 100_000  # groups times formats; beyond, the resamples would take longer than a solve


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """What resampling says about an allocation.

    Attributes:
        num_buckets: Shards, or sets of shards, that were resampled.
        expected_regret: Share of its predicted KL that the allocation is expected to lose because
            its scores are estimates.
        kept: Group -> share of the resamples in which it keeps its format.
        null_score: Mean score of allocations from shuffled scores; None if none was found.
        shares: (group, format) -> share of the resamples in which the group takes the format.
    """

    num_buckets: int
    expected_regret: float
    kept: dict[str, float]
    null_score: float | None
    shares: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def coin_tosses(self) -> list[str]:
        """Groups whose format is not decided, the least certain first."""
        return sorted((g for g, k in self.kept.items() if k < COIN_TOSS), key=self.kept.__getitem__)

    @property
    def num_certain(self) -> int:
        """Groups whose format is decided."""
        return sum(share >= CERTAIN for share in self.kept.values())

    def to_json(self) -> dict[str, Any]:
        """The ``stability`` object of ``manifest.json``."""
        return {
            "num_resamples": NUM_RESAMPLES,
            "num_buckets": self.num_buckets,
            "expected_regret": self.expected_regret,
            "num_certain": self.num_certain,
            "num_groups": len(self.kept),
            "coin_tosses": self.coin_tosses,
            "null_score": self.null_score,
            "kept": self.kept,
        }


def assess_solution(
    problem: Problem,
    scores: Mapping[tuple[str, str], float],
    options: SolveOptions,
    formats: Mapping[str, str],
    buckets: pa.Table,
) -> Certainty | None:
    """Resample the shards behind an allocation.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> nats per token.
        options: What the allocation was solved for. With ``max_formats``, the formats that it
            uses are taken as given.
        formats: The allocation.
        buckets: ``resampling.parquet``.

    Returns:
        None for a single bucket, for more than 100,000 (group, format), and where the fast solver
        finds no allocation.
    """
    menu = list(dict.fromkeys(buckets.column("format").to_pylist()))
    groups = problem.searched
    columns = [*menu, NONE]
    num_buckets = buckets.num_rows // (len(groups) * len(menu))
    if num_buckets < 2 or len(groups) * len(columns) > _MAX_CHOICES:
        return None
    sums_SGF = buckets.column("sum").to_numpy().reshape(num_buckets, len(groups), len(menu))
    sums_SGF = np.pad(sums_SGF, ((0, 0), (0, 0), (0, 1)))
    allowed = _allowed(problem, scores, options, formats)
    mask_GF = np.array([[(g.name, name) in allowed for name in columns] for g in groups])
    costs = budget_problem(problem, options, menu).keep(mask_GF)
    found = assess(costs, sums_SGF, (0, num_buckets))
    if found is None:
        return None
    own_G = np.array([columns.index(formats[group.name]) for group in groups])
    kept_G = found.share_of(own_G)
    scores_GF = np.array(
        [[0.0 if f == NONE else scores.get((g.name, f), 0.0) for f in columns] for g in groups]
    )
    return Certainty(
        num_buckets=num_buckets,
        expected_regret=found.expected_regret,
        kept={g.name: float(share) for g, share in zip(groups, kept_G, strict=True)},
        null_score=_null_score(replace(costs, scores_GF=costs.scores_GF + scores_GF)),
        shares={
            (group.name, name): float(share)
            for group, share_F in zip(groups, found.share_GF, strict=True)
            for name, share in zip(columns, share_F, strict=True)
        },
    )


def _allowed(
    problem: Problem,
    scores: Mapping[tuple[str, str], float],
    options: SolveOptions,
    formats: Mapping[str, str],
) -> set[tuple[str, str]]:
    choices = restrict(problem.choices(scores), options.pins, options.allow)
    used = {NONE, *formats.values()}
    return {
        (choice.group, choice.format)
        for choice in choices
        if options.max_formats is None or choice.format in used
    }


def _null_score(truth: Any) -> float | None:
    """Mean true score of allocations for which the groups' rows of scores were shuffled."""
    finite_GF = np.where(truth.present_GF, truth.scores_GF, 0.0)
    losses = []
    for number in range(NUM_SHUFFLES):
        order_G = np.random.default_rng(number).permutation(len(finite_GF))
        shuffled_GF: Floats = np.where(truth.present_GF, finite_GF[order_G], np.inf)
        found = allocate(replace(truth, scores_GF=shuffled_GF))
        if found is None:
            return None
        losses.append(truth.score(found[0]))
    return math.fsum(losses) / len(losses)
