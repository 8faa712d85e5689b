"""Shard parts -> ``sensitivity.parquet``: sums in shard order, in float64.

The order of the sums is the shards' order, never the order in which workers finished, so the
file is the same to the byte for any number of workers and any pattern of deaths and resumes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.arrays import Floats, Indices, Integers, Mask
from autoquant_ray.errors import ScoreError
from autoquant_ray.plan.silent_experts import Counts, add_counts, without_tokens
from autoquant_ray.runs.names import RESAMPLING_FILE, SCORES
from autoquant_ray.runs.schemas import SCHEMAS

NUM_BUCKETS = 64
_SUMS = ("elementwise_sum", "token_sum", "sequence_sum", "elementwise_variance", "token_variance")
"""Columns of a part that are added up; an estimator without a variance scores all rows."""


def score_part(
    shard: int, keys_K: Sequence[tuple[str, str]], formats: Sequence[str], scores: Any
) -> pa.Table:
    """Content of ``scores/shard-*.parquet``: one row per (group, format).

    The sums of a group that saw no gradient in this shard are null, not zero. What drawing rows
    would do is there in a shard that was scored to find that out, null in others.

    Args:
        shard: Shard number.
        keys_K: (group, format) of every row: the plan's ``score_keys``.
        formats: All formats in the order of the sums' columns.
        scores: :class:`~autoquant_ray.score.scorer.ShardScores`.
    """
    num_rows = len(keys_K)
    groups = list(dict.fromkeys(group for group, _ in keys_K))
    row_of, column_of = _positions(groups), _positions(formats)
    rows_K = np.array([row_of[group] for group, _ in keys_K], dtype=np.intp)
    columns_K = np.array([column_of[format_] for _, format_ in keys_K], dtype=np.intp)
    sums = scores.sums
    unseen_K = np.equal(sums.num_rows_G, 0)[rows_K]

    def values(sums_GF: Floats) -> pa.Array:
        return pa.array(sums_GF[rows_K, columns_K], mask=unseen_K)

    columns = {
        "shard": np.full(num_rows, shard),
        "group": [group for group, _ in keys_K],
        "format": [format_ for _, format_ in keys_K],
        "elementwise_sum": values(sums.elementwise_GF),
        "token_sum": values(sums.token_GF),
        "num_tokens": np.full(num_rows, scores.num_tokens),
        "num_samples": np.full(num_rows, scores.num_samples),
        "seconds": np.full(num_rows, scores.seconds),
        "elementwise_variance": values(sums.elementwise_variance_GF),
        "token_variance": values(sums.token_variance_GF),
        "sequence_sum": [None] * num_rows if sums.sequence_GF is None else values(sums.sequence_GF),
        "expert_tokens": _once_per_group(keys_K, sums.expert_tokens),
        **_drawing_columns(scores, rows_K, columns_K),
    }
    return pa.table(columns, schema=SCHEMAS[SCORES])


def _drawing_columns(scores: Any, rows_K: Indices, columns_K: Indices) -> dict[str, Any]:
    """Share of the rows that was scored, and what drawing some would do; null where unknown."""
    trial, nulls = scores.trial, [None] * len(rows_K)
    columns: dict[str, Any] = dict.fromkeys(
        ("sample_sums", "sample_tokens", "drawing_variances"), nulls
    )
    if trial is not None:
        columns = {
            "sample_sums": trial.sample_sums_NGF[:, rows_K, columns_K].T.tolist(),
            "sample_tokens": [trial.sample_tokens_N.astype(np.int64).tolist(), *nulls[1:]],
            "drawing_variances": trial.variances_SGF[:, rows_K, columns_K].T.tolist(),
        }
    return columns | {"row_share": scores.row_shares_GF[rows_K, columns_K]}


def _once_per_group(
    keys_K: Sequence[tuple[str, str]], expert_tokens: Mapping[str, Counts]
) -> pa.Array:
    """Tokens of experts, which are the same for all formats of a group: in its first row only."""
    previous_K = [None, *(group for group, _ in keys_K)]
    counts_K = [
        expert_tokens.get(group) if group != previous else None
        for (group, _), previous in zip(keys_K, previous_K, strict=False)
    ]
    return pa.array(counts_K, type=pa.list_(pa.int64()))


def _positions(names: Sequence[str]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


def is_complete_part(table: pa.Table, shard: int, keys: Sequence[tuple[str, str]]) -> bool:
    """Whether a scores part belongs to this shard and covers exactly these (group, format)."""
    return _keys(table) == list(keys) and set(table.column("shard").to_pylist()) == {shard}


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Scores over all shards.

    Attributes:
        rows: Of ``sensitivity.parquet``.
        left_out: Experts that are groups of their own and saw no token: they have no row.
        buckets: Content of ``resampling.parquet``: the sums behind the scores in at most 64
            buckets of successive shards with their tokens. A solution's certainty and the error of
            its total are computed from them, without reading the shards again.
    """

    rows: list[dict[str, Any]]
    buckets: pa.Table
    left_out: tuple[str, ...] = ()


def aggregate_parts(
    parts: Sequence[pa.Table],
    plan_rows: Sequence[Mapping[str, Any]],
    estimator: str,
    num_buckets: int = NUM_BUCKETS,
    left_out: Collection[str] | None = None,
) -> Aggregate:
    """Rows of ``sensitivity.parquet``, and the sums that can be resampled.

    The parts are read twice, one at a time, so memory does not grow with their number.

    Args:
        parts: Scores parts in shard order, all with the same rows.
        plan_rows: Rows of ``plan.parquet``.
        estimator: ``elementwise``, ``token`` or ``sequence``.
        num_buckets: Buckets at most.
        left_out: Experts that get no row; None: those that saw no token in these parts. Others
            that saw none here lose nothing on these tokens.

    Raises:
        ScoreError: No part, or a searched group without a score.
    """
    if not len(parts):
        raise ScoreError("no shard was scored; see the quarantined shards in run.json")
    buckets_BK = np.zeros((min(len(parts), num_buckets), parts[0].num_rows))
    tokens_B = np.zeros(len(buckets_BK), dtype=np.int64)
    totals = _add_up(parts, f"{estimator}_sum", buckets_BK, tokens_B)
    silent = without_tokens(totals.expert_tokens)
    left_out = silent if left_out is None else left_out
    _require_scores(totals, silent)
    kept_K = np.array([group not in left_out for group, _ in totals.keys_K])
    rows = _sensitivity_rows(totals, _estimate(parts, totals, estimator), plan_rows, kept_K)
    keys = [(row["group"], row["format"]) for row in rows]
    buckets = _bucket_table(keys, buckets_BK[:, kept_K], tokens_B)
    return Aggregate(rows=rows, buckets=buckets, left_out=tuple(left_out))


@dataclass(frozen=True, kw_only=True)
class _Estimate:
    """Scores of K (group, format) in nats per token.

    Attributes:
        scores_K: ``1/2 * sum / num_tokens``.
        stderrs_K: Standard errors over shards; None for a single shard. Where few shards make them
            smaller than the noise of row sampling, which they contain, the noise counts.
        sampling_stderrs_K: Of row sampling: the standard errors against scoring all rows of the
            same shards, zero where all were scored.
    """

    scores_K: Floats
    stderrs_K: Floats | None
    sampling_stderrs_K: Floats


def _estimate(parts: Sequence[pa.Table], totals: _Totals, estimator: str) -> _Estimate:
    sums_K = totals.sums_K[f"{estimator}_sum"]
    scores_K = 0.5 * sums_K / totals.num_tokens
    variances_K = totals.sums_K.get(f"{estimator}_variance", np.zeros_like(sums_K))
    noise_K = 0.5 * np.sqrt(variances_K) / totals.num_tokens
    stderrs_K = _standard_errors(parts, f"{estimator}_sum", scores_K, totals.num_tokens)
    if stderrs_K is not None:
        stderrs_K = np.maximum(stderrs_K, noise_K)
    return _Estimate(scores_K=scores_K, stderrs_K=stderrs_K, sampling_stderrs_K=noise_K)


def _sensitivity_rows(
    totals: _Totals, estimate: _Estimate, plan_rows: Sequence[Mapping[str, Any]], kept_K: Mask
) -> list[dict[str, Any]]:
    """Rows of ``sensitivity.parquet``, of the pairs that are kept.

    ``modelopt_score`` is what ``mtq.auto_quantize`` would report if every shard were one of its
    scoring batches. ``expert_tokens`` are the tokens that each expert of a group of fused experts
    saw; null for other groups, and where a shard's part does not say. ``row_share`` is the share of
    the rows that was scored, by tokens over the shards.
    """
    costs = {(row["group"], row["format"]): row for row in plan_rows if row["is_searched"]}
    stderrs_K = estimate.stderrs_K
    shares_K = totals.shared_tokens_K / totals.num_tokens
    return [
        {
            "group": group,
            "format": format_,
            "score": float(estimate.scores_K[k]),
            "score_stderr": None if stderrs_K is None else float(stderrs_K[k]),
            "elementwise": float(totals.sums_K["elementwise_sum"][k]),
            "token": float(totals.sums_K["token_sum"][k]),
            "modelopt_score": float(totals.modelopt_K[k]),
            "num_tokens": totals.num_tokens,
            "num_shards": totals.num_parts,
            "weight_bits": costs[group, format_]["weight_bits"],
            "weight_bytes": costs[group, format_]["weight_bytes"],
            "sampling_stderr": float(estimate.sampling_stderrs_K[k]),
            "expert_tokens": totals.expert_tokens[group],
            "row_share": None if np.isnan(shares_K[k]) else float(shares_K[k]),
        }
        for k, (group, format_) in enumerate(totals.keys_K)
        if kept_K[k]
    ]


def _bucket_table(
    keys_K: Sequence[tuple[str, str]], buckets_BK: Floats, tokens_B: Integers
) -> pa.Table:
    count = len(buckets_BK)
    columns = {
        "bucket": np.repeat(np.arange(count), len(keys_K)),
        "group": [group for group, _ in keys_K] * count,
        "format": [format_ for _, format_ in keys_K] * count,
        "sum": buckets_BK.ravel(),
        "bucket_tokens": np.repeat(tokens_B, len(keys_K)),
    }
    return pa.table(columns, schema=SCHEMAS[RESAMPLING_FILE])


@dataclass
class _Totals:
    """Sums over the parts for each of K (group, format); ``sums_K`` by the parts' columns."""

    keys_K: list[tuple[str, str]]
    sums_K: dict[str, Floats]
    modelopt_K: Floats
    shared_tokens_K: Floats
    is_unseen_K: Mask
    num_parts: int
    num_tokens: int = 0
    expert_tokens_G: list[Counts | None] | None = None

    @property
    def expert_tokens(self) -> dict[str, Counts | None]:
        """Group -> tokens of its experts."""
        groups = dict.fromkeys(group for group, _ in self.keys_K)
        return dict(zip(groups, self.expert_tokens_G or (), strict=True))


def _add_up(
    parts: Sequence[pa.Table], column: str, buckets_BK: Floats, tokens_B: Integers
) -> _Totals:
    """Totals over all parts; also adds a column, and tokens, into buckets of successive parts."""
    num_rows = parts[0].num_rows
    totals = _Totals(
        keys_K=_keys(parts[0]),
        sums_K={name: np.zeros(num_rows) for name in _SUMS},
        modelopt_K=np.zeros(num_rows),
        shared_tokens_K=np.zeros(num_rows),
        is_unseen_K=np.ones(num_rows, dtype=np.bool_),
        num_parts=len(parts),
    )
    for number, part in enumerate(parts):
        num_tokens = _num_tokens(part)
        bucket = number * len(buckets_BK) // len(parts)
        buckets_BK[bucket] += _filled(part, column)
        tokens_B[bucket] += num_tokens
        for name, sums_K in totals.sums_K.items():
            sums_K += _filled(part, name)
        totals.modelopt_K += _filled(part, "elementwise_sum") / float(num_tokens) ** 2
        totals.shared_tokens_K += num_tokens * part.column("row_share").to_numpy()
        totals.is_unseen_K &= part.column("elementwise_sum").is_null().to_numpy()
        totals.num_tokens += num_tokens
        counts_G = _expert_tokens(part)
        before_G = totals.expert_tokens_G
        totals.expert_tokens_G = counts_G if before_G is None else add_counts(before_G, counts_G)
    return totals


def _expert_tokens(part: pa.Table) -> list[Counts | None]:
    """Counts of each group, from its first row."""
    groups = part.column("group").to_pylist()
    firsts = [n for n, group in enumerate(groups) if n == 0 or groups[n - 1] != group]
    counts: list[Counts | None] = part.column("expert_tokens").take(firsts).to_pylist()
    return counts


def _keys(part: pa.Table) -> list[tuple[str, str]]:
    columns = (part.column(name).to_pylist() for name in ("group", "format"))
    return list(zip(*columns, strict=True))


def _num_tokens(part: pa.Table) -> int:
    return int(part.column("num_tokens")[0].as_py())


def _filled(part: pa.Table, column: str) -> Floats:
    values_K: Floats = part.column(column).fill_null(0.0).to_numpy()
    return values_K


def _require_scores(totals: _Totals, silent: Collection[str]) -> None:
    unseen = [totals.keys_K[index][0] for index in np.flatnonzero(totals.is_unseen_K)]
    missing = [group for group in dict.fromkeys(unseen) if group not in silent]
    if missing:
        raise ScoreError(
            f"{len(missing)} group(s) received no gradient and have no score, first "
            f"{missing[0]!r}; use longer or more samples, or `disable` them"
        )


def _standard_errors(
    parts: Sequence[pa.Table], column: str, ratios_K: Floats, num_tokens: int
) -> Floats | None:
    """Standard errors of ratios of sums, from their scatter over the parts; None for a single part.

    The usual ratio estimator: with ``e_s`` and ``n_s`` of S parts and ``R = sum e / sum n``, the
    variance is ``S/(S-1) * sum (e_s - R n_s)^2 / (sum n)^2``.
    """
    if len(parts) < 2:
        return None
    squares_K = np.zeros_like(ratios_K)
    for part in parts:
        squares_K += np.square(0.5 * _filled(part, column) - ratios_K * _num_tokens(part))
    errors_K: Floats = np.sqrt(len(parts) / (len(parts) - 1) * squares_K) / num_tokens
    return errors_K
