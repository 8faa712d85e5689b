"""How sure a solution is: the shards resampled, the budget solved again, and the null beside it.

Scores are measured on a finite number of shards. :mod:`autoquant_ray.allocate.certainty.resampling`
resamples them (bootstrap) and solves every resample with the fast solver; here its findings get the
names of groups. The null is what allocations from shuffled scores would lose under the true ones: a
allocation that is not clearly better has learned nothing from its scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from autoquant_ray.allocate.certainty.resampling import (
    NUM_RESAMPLES,
    Stability,
    allocate,
    assess,
    compare_resamples,
    drawn_counts,
)
from autoquant_ray.allocate.certainty.stopping import budget_knapsack
from autoquant_ray.allocate.domains import read_domain_scores
from autoquant_ray.allocate.group_choices import GroupChoices, Scores
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.kv_caches import shuffled_order
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.arrays import Floats
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.names import DOMAIN_RESAMPLING_FILE, RESAMPLING_FILE
from autoquant_ray.runs.state import RunState

CERTAIN = 0.95
"""A group that keeps its format in this share of the resamples is decided."""
COIN_TOSS = 0.6
"""One that keeps it in less than this share might as well be drawn."""
NUM_SHUFFLES = 20
MAX_CHOICES = 100_000  # groups times formats; beyond, the resamples would take longer than a solve


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """What resampling says about an allocation.

    Attributes:
        num_buckets: Shards, or sets of shards, that were resampled.
        expected_regret: Share of its predicted KL that the allocation is expected to lose because
            its scores are estimates.
        kept: Group -> share of the resamples in which it keeps its format.
        shares: Group -> format -> share of the resamples in which it takes that one.
        null_score: Mean score of allocations from shuffled scores; None if none was found.
    """

    num_buckets: int
    expected_regret: float
    kept: dict[str, float]
    shares: dict[str, dict[str, float]]
    null_score: float | None

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
    sums_SGF = bucket_sums(buckets, problem, menu)
    num_buckets = len(sums_SGF)
    if num_buckets < 2 or sums_SGF[0].size > MAX_CHOICES:
        return None
    costs, truth = as_arrays(problem, scores, options, formats, menu)
    stability = assess(costs, sums_SGF, (0, num_buckets))
    return (
        None
        if stability is None
        else certainty_from(problem, formats, menu, truth, stability, num_buckets)
    )


def bucket_sums(buckets: pa.Table, problem: Problem, menu: Sequence[str]) -> Floats:
    """Sums of the buckets (S, G, F), with a column of zeros for 16 bits at the end.

    Args:
        buckets: Rows of each bucket, in one order of (group, format).
        problem: Its searched groups are the G groups.
        menu: Formats in the order of the columns; 0 where a group has no such format.
    """
    row_of = {group.name: number for number, group in enumerate(problem.searched)}
    num_keys = sum(len(group.rows.keys() - {NONE}) for group in problem.searched)
    first = buckets.slice(0, num_keys)
    names = (first.column(name).to_pylist() for name in ("group", "format"))
    keys = [(row_of[group], menu.index(name)) for group, name in zip(*names, strict=True)]
    rows_K, columns_K = np.array(keys, dtype=np.intp).T
    sums_SK = buckets.column("sum").to_numpy().reshape(-1, num_keys)
    sums_SGF = np.zeros((len(sums_SK), len(row_of), len(menu) + 1))
    sums_SGF[:, rows_K, columns_K] = sums_SK
    return sums_SGF


def as_arrays(
    problem: Problem,
    scores: Mapping[tuple[str, str], float],
    options: SolveOptions,
    formats: Mapping[str, str],
    menu: Sequence[str],
) -> tuple[Knapsack, Knapsack]:
    """Costs and limits of the choices that the options leave, without scores and with them.

    Args:
        problem, scores, options, formats: As in :func:`assess_solution`.
        menu: Formats in the order of the buckets; 16 bits becomes the last column.
    """
    groups, columns = problem.searched, [*menu, NONE]
    allowed = _allowed(problem, scores, options, formats)
    mask_GF = np.array([[(g.name, name) in allowed for name in columns] for g in groups])
    costs = budget_knapsack(problem, options, menu).keep(mask_GF)
    scores_GF = np.array(
        [[0.0 if f == NONE else scores.get((g.name, f), 0.0) for f in columns] for g in groups]
    )
    return costs, replace(costs, scores_GF=costs.scores_GF + scores_GF)


def certainty_from(
    problem: Problem,
    formats: Mapping[str, str],
    menu: Sequence[str],
    truth: Knapsack,
    stability: Stability,
    num_buckets: int,
) -> Certainty:
    """Give what resampling found the groups' names, and add the null.

    Args:
        problem: Groups with their costs.
        formats: The allocation.
        menu: Formats in the order of the columns; 16 bits is the last one.
        truth: The problem with the full sample's scores.
        found: What resampling found.
        num_buckets: Shards, or sets of shards, that were resampled.
    """
    groups, columns = problem.searched, [*menu, NONE]
    own_G = np.array([columns.index(formats[group.name]) for group in groups])
    kept_G = stability.share_of(own_G)
    return Certainty(
        num_buckets=num_buckets,
        expected_regret=stability.expected_regret,
        kept={g.name: float(share) for g, share in zip(groups, kept_G, strict=True)},
        shares={
            group.name: {name: share_F[columns.index(name)] for name in group.rows}
            for group, share_F in zip(groups, stability.share_GF.tolist(), strict=True)
        },
        null_score=_null_score(truth, groups),
    )


def _allowed(
    problem: Problem,
    scores: Mapping[tuple[str, str], float],
    options: SolveOptions,
    formats: Mapping[str, str],
) -> set[tuple[str, str]]:
    choices = allowed_choices(problem, scores, options)
    used = {NONE, *formats.values()}
    return {
        (choice.group, choice.format)
        for choice in choices
        if options.max_formats is None or choice.format in used
    }


def _null_score(truth: Any, groups: Sequence[GroupChoices]) -> float | None:
    """Mean true score of allocations for which the groups' rows of scores were shuffled.

    A format that the other group lacks takes its largest score; 16 bits lose nothing.
    """
    known_GF = np.where(truth.present_GF, truth.scores_GF, 0.0)
    finite_GF = np.where(truth.present_GF, known_GF, known_GF.max(axis=1, keepdims=True))
    finite_GF[:, -1] = 0.0
    losses = []
    for number in range(NUM_SHUFFLES):
        order_G = shuffled_order(groups, np.random.default_rng(number))
        shuffled_GF: Floats = np.where(truth.present_GF, finite_GF[order_G], np.inf)
        allocation = allocate(replace(truth, scores_GF=shuffled_GF))
        if allocation is None:
            return None
        losses.append(truth.score(allocation[0]))
    return math.fsum(losses) / len(losses)


def certainty_of(
    state: RunState,
    problem: Problem,
    scores: Scores,
    options: SolveOptions,
    formats: dict[str, str],
) -> Certainty | None:
    """How sure an allocation is, from the sums that the run keeps for it.

    None for an imported run and for one of an earlier version: no shards to resample. None for the
    least loss of the worst domain, and where groups share a format (for an engine, or as experts of
    a cluster), too: no fast solver solves their resamples.
    """
    if (
        options.worst_domain
        or ties_of(problem, options)
        or not state.directory.exists(RESAMPLING_FILE)
    ):
        return None
    if options.domains:
        return assess_weighted(state, problem, options, formats)
    buckets = state.directory.read_table(RESAMPLING_FILE)
    return assess_solution(problem, scores, options, formats, buckets)


def assess_weighted(
    state: RunState, problem: Problem, options: SolveOptions, formats: Mapping[str, str]
) -> Certainty | None:
    """Resample the shards of each domain behind an allocation.

    Args:
        state: The run.
        problem: Its groups with their costs.
        options: What the allocation was solved for, domains with their weights among it.
        formats: The allocation: group -> format.

    Returns:
        None where a domain with a weight has a single bucket, for more than 100,000 (group,
        format), and where the fast solver finds no allocation.
    """
    domains = read_domain_scores(state)
    if domains is None:
        return None
    buckets = state.directory.read_table(DOMAIN_RESAMPLING_FILE)
    menu = list(dict.fromkeys(buckets.column("format").to_pylist()))
    num_groups = len(problem.searched)
    if num_groups * (len(menu) + 1) > MAX_CHOICES:
        return None
    totals_BGF = np.zeros((NUM_RESAMPLES, num_groups, len(menu) + 1))
    num_buckets = 0
    for number, (name, weight) in enumerate(options.domains.items()):
        domain_buckets = buckets.filter(pc.equal(buckets.column("domain"), name))
        sums_SGF = bucket_sums(domain_buckets, problem, menu)
        tokens_S = domain_buckets.column("bucket_tokens").to_numpy()[
            :: len(domain_buckets) // len(sums_SGF)
        ]
        if len(tokens_S) < 2:
            return None
        totals_BGF += weight * _resampled_scores(sums_SGF, tokens_S, number)
        num_buckets += len(tokens_S)
    scores = domains.weighted(options.domains)
    costs, truth = as_arrays(problem, scores, options, formats, menu)
    stability = compare_resamples(costs, truth, totals_BGF)
    if stability is None:
        return None
    return certainty_from(problem, formats, menu, truth, stability, num_buckets)


def _resampled_scores(sums_SGF: Floats, tokens_S: Floats, seed: int) -> Floats:
    """Scores (B, G, F) of one domain from as many of its buckets as there are, drawn anew."""
    counts_BS = drawn_counts(len(tokens_S), (0, seed, len(tokens_S)), NUM_RESAMPLES)
    sums_BGF = np.zeros((NUM_RESAMPLES, *sums_SGF.shape[1:]))
    for counts_B, sums_GF in zip(counts_BS.T, sums_SGF, strict=True):
        sums_BGF += counts_B[:, None, None] * sums_GF
    tokens_B = (counts_BS * tokens_S).sum(axis=1)
    scores_BGF: Floats = 0.5 * sums_BGF / tokens_B[:, None, None]
    return scores_BGF
