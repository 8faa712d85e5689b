"""Which scores moved between two runs by more than their error bars explain.

Two runs on the same samples are compared shard by shard, because the same text's share of the
noise is in both and cancels. Runs on different samples are compared by their standard errors.
Neither is taken at its word, because a false alarm every other night is worse than none:

- A standard error of S shards is itself uncertain. A move is held against Student's t distribution
  with S - 1 degrees of freedom (of the run with fewer shards), not the normal one.
- With few shards some of many standard errors are small by luck. One that is, relative to its
  score, below the median of its run counts as the median (the idea of Tusher et al., 2001).
- On different samples, calibration finds other input maxima, which the spread over the shards of
  one run does not contain: all of them use the same maxima. The step of a static integer format
  grows with the maximum, its error with the square of that. If the logarithms of the shards' maxima
  follow a Gumbel distribution, then that of their maximum has the same standard deviation, so that
  it adds twice this deviation to the score's relative error.

Benjamini-Hochberg is applied across all (group, format) pairs, not across groups: each pair is a
number that the allocation reads, and the scores of one group, or of one shard, move together,
which is the positive dependence under which the procedure still holds (Benjamini and Yekutieli,
2001). Where nothing moved, the chance that any pair is called moved is at most the significance.

Shape letters: K (group, format) pairs, S shards.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from autoquant_ray.arrays import Floats, Mask


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Scores of K (group, format) pairs, in nats per token.

    Attributes:
        score_K: Scores.
        stderr_K: Their standard errors over shards; NaN where a single shard gives none.
        num_shards: Shards that they are made of.
        maxima_K: Standard deviation of the logarithm of the input maximum that a pair's format
            depends on; 0 where it depends on none.
    """

    score_K: Floats
    stderr_K: Floats
    num_shards: int
    maxima_K: Floats

    def cautious_stderr(self) -> Floats:
        """Standard errors that no luck made small, with the noise of the maxima."""
        stderr_K = _at_least_median_share(self.stderr_K, self.score_K)
        errors_K: Floats = np.hypot(stderr_K, 2 * self.maxima_K * self.score_K)
        return errors_K


@dataclass(frozen=True, kw_only=True)
class Moves:
    """How scores moved from a run to another.

    Attributes:
        z_K: Difference over the root of the summed squares of both standard errors, taken at
            their word; 0 where nothing changed, NaN where there are no error bars.
        p_K: Two-sided probability of such a difference without a cause, with all the caution
            above; NaN where untested.
        is_significant_K: Whether the pair is among the discoveries.
        is_paired: Whether the runs were compared shard by shard.
    """

    z_K: Floats
    p_K: Floats
    is_significant_K: Mask
    is_paired: bool


def find_moves(
    before: PairScores,
    after: PairScores,
    significance: float,
    paired_stderr_K: Floats | None = None,
) -> Moves:
    """Test every pair.

    Args:
        before: Scores of the first run.
        after: Scores of the second run, of the same pairs.
        significance: False discovery rate.
        paired_stderr_K: Standard errors of the differences, where both runs scored the same
            shards; else the runs' own standard errors are used.
    """
    difference_K = after.score_K - before.score_K
    if paired_stderr_K is None:
        stderr_K = np.hypot(before.cautious_stderr(), after.cautious_stderr())
    else:
        stderr_K = _at_least_median_share(
            paired_stderr_K, np.maximum(before.score_K, after.score_K)
        )
    freedom = max(min(before.num_shards, after.num_shards) - 1, 1)
    p_K = 2 * stats.t.sf(_ratio(np.abs(difference_K), stderr_K), freedom)
    return Moves(
        z_K=_ratio(difference_K, np.hypot(before.stderr_K, after.stderr_K)),
        p_K=p_K,
        is_significant_K=benjamini_hochberg(p_K, significance),
        is_paired=paired_stderr_K is not None,
    )


def paired_stderr(shards: Iterable[tuple[Floats, int]], difference_K: Floats) -> Floats:
    """Standard errors of the scores' differences over shards that both runs scored.

    The ratio estimator of :func:`~autoquant_ray.stages.aggregate.sensitivity_rows`, of the shards'
    differences.

    Args:
        shards: Of each shard, at least 2: half its sums in the second run less those in the
            first, and its predicted tokens.
        difference_K: Differences of the scores.
    """
    squares_K, num_shards, num_tokens = np.zeros_like(difference_K), 0, 0
    for difference_of_shard_K, tokens in shards:
        squares_K += np.square(difference_of_shard_K - tokens * difference_K)
        num_shards, num_tokens = num_shards + 1, num_tokens + tokens
    errors_K: Floats = np.sqrt(num_shards / (num_shards - 1) * squares_K) / num_tokens
    return errors_K


def benjamini_hochberg(p_K: Floats, significance: float) -> Mask:
    """Discoveries at a false discovery rate; untested pairs (NaN) do not count.

    Benjamini and Hochberg (1995): of the m sorted p-values, the largest k with
    ``p_k <= k / m * significance``, and all before it.
    """
    tested_J = np.flatnonzero(~np.isnan(p_K))
    is_discovery_K = np.zeros(len(p_K), dtype=np.bool_)
    if len(tested_J):
        adjusted_J = stats.false_discovery_control(p_K[tested_J], method="bh")
        is_discovery_K[tested_J] = adjusted_J <= significance
    return is_discovery_K


def rank_correlation(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Spearman's coefficient; None for fewer than 3 scores, or where all are equal."""
    if len(before) < 3 or len(set(before)) < 2 or len(set(after)) < 2:
        return None
    return float(stats.spearmanr(before, after).statistic)


def _at_least_median_share(stderr_K: Floats, score_K: Floats) -> Floats:
    """Standard errors of at least their median share of the scores; NaN stays."""
    shares_K = _ratio(stderr_K, score_K)
    finite_K = shares_K[np.isfinite(shares_K)]
    median = float(np.median(finite_K)) if len(finite_K) else 0.0
    errors_K: Floats = np.where(np.isnan(stderr_K), np.nan, np.fmax(stderr_K, median * score_K))
    return errors_K


def _ratio(above_K: Floats, below_K: Floats) -> Floats:
    """``above / below``; 0 where nothing is above, infinite where only nothing is below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_K = above_K / below_K
    ratio_K[(above_K == 0) & ~np.isnan(below_K)] = 0.0
    return ratio_K


def has_integer_input(format_: Mapping[str, Any]) -> bool:
    """Whether a format of ``run.json`` quantizes inputs to integers, whose step is their maximum's.

    The error of a floating-point format hardly depends on the maximum.
    """
    return isinstance((format_.get("input") or {}).get("num_bits"), int)


def log_deviations(parts: Iterable[pa.Table]) -> dict[str, float]:
    """Module -> standard deviation over shards of the logarithm of its input maximum.

    Args:
        parts: ``calibration`` parts, one per shard. A module with several maxima counts by the
            noisiest one; a shard in which a maximum is 0 (no token came by) is not counted.
    """
    logs: dict[tuple[str, str], list[float]] = {}
    for part in parts:
        columns = (part.column(name).to_pylist() for name in ("module", "statistic", "value"))
        for module, statistic, value in zip(*columns, strict=True):
            if value > 0:
                logs.setdefault((module, statistic), []).append(math.log(value))
    deviations: dict[str, float] = {}
    for (module, _), values in logs.items():
        if len(values) > 1:
            deviations[module] = max(deviations.get(module, 0.0), statistics.stdev(values))
    return deviations
