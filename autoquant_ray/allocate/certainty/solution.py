"""How sure a solution is: the shards resampled, the budget solved again, and the null beside it.

Scores are measured on a finite number of shards. :mod:`autoquant_ray.allocate.certainty.resampling`
resamples them (bootstrap) and solves every resample as exactly as the plan; here its findings get
the names of groups. The null is what allocations from shuffled scores, solved exactly too, would
lose under the true ones: an allocation that is not clearly better has learned nothing from its
scores.

Shapes: S shards, B resamples, G groups, F formats, R limits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from autoquant_ray.allocate.allocation import without_scores
from autoquant_ray.allocate.certainty.resampling import (
    Stability,
    affordable_resamples,
    assess,
    compare_resamples,
    drawn_counts,
    mean_loss,
)
from autoquant_ray.allocate.domains import read_domain_scores
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.resolve import Resolver
from autoquant_ray.allocate.kv_caches import shuffled_order
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.arrays import Floats
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.method_names import without_method
from autoquant_ray.runs.directory import KEYS
from autoquant_ray.runs.names import DOMAIN_RESAMPLING_FILE, RESAMPLING_FILE, remedy_of
from autoquant_ray.runs.state import RunState
from autoquant_ray.runs.table_rows import numbers_of

logger = logging.getLogger(__name__)

CERTAIN = 0.95
"""A group that keeps its format in this share of the resamples is decided."""
COIN_TOSS = 0.6
"""One that keeps it in less than this share might as well be drawn."""
NUM_SHUFFLES = 20
_FEWER_SHUFFLES = 5  # where limits are felt together, and a solution takes long
MAX_CHOICES = 100_000  # groups times formats; beyond, the resamples would take longer than a solve
_MAX_COUPLED = 10_000  # the same where limits are felt together


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """What resampling says about an allocation.

    Attributes:
        num_resamples: Resamples; 200, or fewer for a large problem.
        num_buckets: Shards, or sets of shards, that were resampled.
        expected_regret: Share of its predicted KL that the allocation is expected to lose because
            its scores are estimates; errs high.
        kept: Group -> share of the resamples in which it keeps its format.
        shares: Group -> format -> share of the resamples in which it takes that one.
        null_score: Mean score of allocations from shuffled scores; None if none was found.
    """

    num_resamples: int
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
            "num_resamples": self.num_resamples,
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
        None for a single bucket, for more than 100,000 (group, format) (10,000 where groups feel
        several limits), and where no allocation is within the limits.
    """
    knapsack = unscored_knapsack(problem, scores, options, formats)
    resolver = Resolver(knapsack)
    if _is_too_large(resolver):
        return None
    sums_SGF = bucket_sums(buckets, problem)
    if len(sums_SGF) < 2:
        return None
    plan_G = problem.menus.columns_of(formats)
    stability = assess(knapsack, sums_SGF, (0, len(sums_SGF)), plan_G=plan_G)
    if stability is None:
        return None
    total_GF = np.nan_to_num(problem.menus.scores(scores), posinf=0.0)
    return certainty_from(problem, formats, resolver, total_GF, stability, len(sums_SGF))


def _is_too_large(resolver: Resolver) -> bool:
    return resolver.num_choices > (MAX_CHOICES if resolver.is_fast else _MAX_COUPLED)


def bucket_sums(buckets: pa.Table, problem: Problem) -> Floats:
    """Sums of the buckets (S, G, F); 0 for 16 bits and where a group lacks a format.

    Args:
        buckets: Rows of each bucket, in one order of (group, format).
        problem: Its searched groups are the G groups, in the columns of its menus.
    """
    menus = problem.menus
    row_of = {name: row for row, name in enumerate(menus.names)}
    num_keys = int(menus.has_GF.sum()) - sum(NONE in group.rows for group in problem.searched)
    first = buckets.slice(0, num_keys)
    names = (first.column(name).to_pylist() for name in ("group", "format"))
    keys = [(row_of[group], menus.columns[name]) for group, name in zip(*names, strict=True)]
    rows_K, columns_K = np.array(keys, dtype=np.intp).T
    sums_SK = numbers_of(buckets.column("sum")).reshape(-1, num_keys)
    sums_SGF = np.zeros((len(sums_SK), *menus.has_GF.shape))
    sums_SGF[:, rows_K, columns_K] = sums_SK
    return sums_SGF


def unscored_knapsack(
    problem: Problem, scores: Scores, options: SolveOptions, formats: Mapping[str, str]
) -> Knapsack:
    """Costs and limits of the choices that the options leave, in the columns of the menus."""
    choices = allowed_choices(problem, scores, options)
    if options.max_formats is not None:
        used = {without_method(name) for name in (NONE, *formats.values())}
        choices = choices.keep(np.array([without_method(n) in used for n in choices.formats]))
    return without_scores(choices, problem.budgets(options))


def certainty_from(
    problem: Problem,
    formats: Mapping[str, str],
    resolver: Resolver,
    total_GF: Floats,
    stability: Stability,
    num_buckets: int,
) -> Certainty:
    """Give what resampling found the groups' names, and add the null.

    Args:
        problem: Groups with their costs.
        formats: The allocation.
        resolver: Costs and limits.
        total_GF: The full sample's scores; 0 where a group lacks a format.
        stability: What resampling found.
        num_buckets: Shards, or sets of shards, that were resampled.
    """
    groups, menus = problem.searched, problem.menus
    kept_G = stability.share_of(menus.columns_of(formats))
    return Certainty(
        num_resamples=stability.num_resamples,
        num_buckets=num_buckets,
        expected_regret=stability.expected_regret,
        kept={g.name: float(share) for g, share in zip(groups, kept_G, strict=True)},
        shares={
            group.name: {name: share_F[menus.columns[name]] for name in group.rows}
            for group, share_F in zip(groups, stability.share_GF.tolist(), strict=True)
        },
        null_score=null_score(problem, resolver, total_GF),
    )


def null_score(problem: Problem, resolver: Resolver, total_GF: Floats) -> float | None:
    """Mean true score of allocations for which the groups' rows of scores were shuffled.

    A format that the other group lacks takes its largest score; 16 bits lose nothing.

    Args:
        problem: Groups with their costs.
        resolver: Costs and limits.
        total_GF: The true scores; 0 where a group lacks a format.
    """
    menus = problem.menus
    finite_GF = np.where(menus.has_GF, total_GF, total_GF.max(axis=1, keepdims=True))
    if NONE in menus.columns:
        finite_GF[:, menus.columns[NONE]] = 0.0
    orders = (
        shuffled_order(problem.searched, np.random.default_rng(number))
        for number in range(NUM_SHUFFLES if resolver.is_fast else _FEWER_SHUFFLES)
    )
    return mean_loss(resolver, total_GF, (finite_GF[order_G] for order_G in orders))


def certainty_of(
    state: RunState,
    problem: Problem,
    scores: Scores,
    options: SolveOptions,
    formats: dict[str, str],
) -> Certainty | None:
    """How sure an allocation is, from the sums that the run keeps for it.

    None for an imported run and for one of an earlier version: no shards to resample. None for the
    least loss of the worst domain, whose resamples would take too long, and where groups share a
    format (for an engine, or as experts of a cluster), too.
    """
    if (
        options.worst_domain
        or problem.menus.has_GF.sum() > MAX_CHOICES
        or ties_of(problem, options)
    ):
        return None
    if not state.directory.exists(RESAMPLING_FILE):
        if not state.record.is_imported:
            logger.warning(
                "%s is gone, so that no certainty is known; %s",
                state.directory.path(RESAMPLING_FILE),
                remedy_of(RESAMPLING_FILE),
            )
        return None
    if options.domains:
        return assess_weighted(state, problem, options, formats)
    buckets = state.directory.read_table(RESAMPLING_FILE, encoded=KEYS)
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
        format), and where no allocation is within the limits.
    """
    domains = read_domain_scores(state)
    if domains is None:
        return None
    scores = domains.weighted(options.domains)
    resolver = Resolver(unscored_knapsack(problem, scores, options, formats))
    if _is_too_large(resolver):
        return None
    buckets = state.directory.read_table(DOMAIN_RESAMPLING_FILE)
    totals_BGF = np.zeros((affordable_resamples(resolver), *problem.menus.has_GF.shape))
    counts = []
    for number, (name, weight) in enumerate(options.domains.items()):
        domain_buckets = buckets.filter(pc.equal(buckets.column("domain"), name))
        sums_SGF = bucket_sums(domain_buckets, problem)
        tokens_S = numbers_of(domain_buckets.column("bucket_tokens"))[
            :: len(domain_buckets) // len(sums_SGF)
        ]
        if len(tokens_S) < 2:
            return None
        totals_BGF += weight * _resampled_scores(sums_SGF, tokens_S, number, len(totals_BGF))
        counts.append(len(tokens_S))
    total_GF = np.nan_to_num(problem.menus.scores(scores), posinf=0.0)
    stability = compare_resamples(
        resolver,
        total_GF,
        totals_BGF,
        num_shards=min(counts),
        plan_G=problem.menus.columns_of(formats),
    )
    if stability is None:
        return None
    return certainty_from(problem, formats, resolver, total_GF, stability, sum(counts))


def _resampled_scores(sums_SGF: Floats, tokens_S: Floats, seed: int, count: int) -> Floats:
    """Scores (B, G, F) of one domain from as many of its buckets as there are, drawn anew."""
    counts_BS = drawn_counts(len(tokens_S), (0, seed, len(tokens_S)), count)
    sums_BGF = np.zeros((count, *sums_SGF.shape[1:]))
    for counts_B, sums_GF in zip(counts_BS.T, sums_SGF, strict=True):
        sums_BGF += counts_B[:, None, None] * sums_GF
    tokens_B = (counts_BS * tokens_S).sum(axis=1)
    scores_BGF: Floats = 0.5 * sums_BGF / tokens_B[:, None, None]
    return scores_BGF
