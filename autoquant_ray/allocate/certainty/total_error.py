"""The error bar of a solution's predicted KL, and of any ratio of sums.

A shard of harder text raises the scores of most groups at once, so their errors must not be added
up as if they were independent: on SmolLM2-135M (8 shards, 6 bits) that would give a quarter of the
error below. Where the shards are known (``resampling.parquet``), the summed score of the chosen
formats is one number per bucket of shards, and its standard error is that of a ratio, as for a
single score: with the sum ``e_b`` and the tokens ``n_b`` of B buckets and ``R = sum e / sum n``,
the variance is ``B/(B-1) * sum (e_b - R n_b)^2 / (sum n)^2`` (Cochran 1977, "Sampling Techniques",
chapter 6). It takes in all correlations between groups and assumes that the buckets are
independent of each other. Where the shards are not known, the standard errors of the scores are
added, which bounds that of the total whatever the correlations are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.arrays import Floats
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.table_rows import numbers_of


@dataclass(frozen=True, kw_only=True)
class TotalError:
    """Standard error of a solution's predicted KL.

    Attributes:
        stderr: In nats per token.
        is_bound: It is at most this; the shards are not known.
    """

    stderr: float
    is_bound: bool


def total_error(
    formats: Mapping[str, str],
    score_rows: Sequence[Mapping[str, Any]],
    buckets: pa.Table | None,
) -> TotalError | None:
    """How far off the predicted KL may be because the calibration data is finite.

    Args:
        formats: Searched group -> chosen format.
        score_rows: Rows of ``sensitivity.parquet``.
        buckets: ``resampling.parquet``; None where the run has none.

    Returns:
        None where nothing is known: a single shard, or imported scores.
    """
    chosen = [row for row in score_rows if formats.get(row["group"], NONE) == row["format"]]
    if not chosen:
        return None
    # Rows are drawn apart for every module, so this noise is independent between groups.
    drawn = math.sqrt(math.fsum((row["sampling_stderr"] or 0.0) ** 2 for row in chosen))
    spread = None if buckets is None else _spread(formats, buckets)
    if spread is not None:
        return TotalError(stderr=max(spread, drawn), is_bound=False)
    errors = [row["score_stderr"] for row in chosen]
    if any(error is None for error in errors):
        return None
    return TotalError(stderr=math.fsum(errors), is_bound=True)


def _spread(formats: Mapping[str, str], buckets: pa.Table) -> float | None:
    """None for a single bucket, and for a run of an earlier version: tokens are not known."""
    tokens = buckets.column("bucket_tokens")
    if tokens.null_count:
        return None
    count = int(numbers_of(buckets.column("bucket")).max()) + 1
    num_keys = buckets.num_rows // count
    keys = buckets.slice(0, num_keys)
    names = (keys.column(name).to_pylist() for name in ("group", "format"))
    is_chosen_K = np.array([formats.get(g, NONE) == f for g, f in zip(*names, strict=True)])
    sums_BK = numbers_of(buckets.column("sum")).reshape(count, num_keys)
    sums_B: Floats = 0.5 * sums_BK[:, is_chosen_K].sum(axis=1)
    return ratio_stderr(sums_B, numbers_of(tokens)[::num_keys].astype(np.float64))


def ratio_stderr(sums_S: Floats, tokens_S: Floats) -> float | None:
    """Standard error of ``sum(sums) / sum(tokens)``, by the formula above, from independent parts.

    Args:
        sums_S: Of each sample or bucket.
        tokens_S: Its tokens.

    Returns:
        None for a single one, and where a sum is infinite.
    """
    count = len(sums_S)
    if count < 2 or not np.isfinite(sums_S).all():
        return None
    ratio = math.fsum(sums_S) / math.fsum(tokens_S)
    spread = math.fsum((sums_S - ratio * tokens_S) ** 2)
    return math.sqrt(count / (count - 1) * spread) / math.fsum(tokens_S)
