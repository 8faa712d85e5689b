"""Shard parts -> ``sensitivity.parquet``: sums in shard order, in float64.

The order of the sums is the shards' order, never the order in which workers finished, so the
file is the same to the byte for any number of workers and any pattern of deaths and resumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.errors import ScoreError

Floats = np.ndarray[Any, np.dtype[np.float64]]


def score_part_rows(
    shard: int, groups: Sequence[str], formats: Sequence[str], scores: Any
) -> list[dict[str, Any]]:
    """Rows of ``scores/shard-*.parquet``: one per (group, format).

    The sums of a group that saw no gradient in this shard are null, not zero.

    Args:
        shard: Shard number.
        groups: Searched groups in plan order.
        formats: Formats in menu order.
        scores: :class:`~autoquant_ray.engine.ShardScores`.
    """

    def seen(sums_GF: Floats, g: int, f: int) -> float | None:
        return float(sums_GF[g, f]) if scores.sums.num_rows_G[g] else None

    return [
        {
            "shard": shard,
            "group": group,
            "format": format_,
            "elementwise_sum": seen(scores.sums.elementwise_GF, g, f),
            "token_sum": seen(scores.sums.token_GF, g, f),
            "num_tokens": scores.num_tokens,
            "num_samples": scores.num_samples,
            "seconds": scores.seconds,
        }
        for g, group in enumerate(groups)
        for f, format_ in enumerate(formats)
    ]


def is_complete_part(table: pa.Table, shard: int, keys: Sequence[tuple[str, str]]) -> bool:
    """Whether a scores part belongs to this shard and covers exactly these (group, format)."""
    found = list(
        zip(table.column("group").to_pylist(), table.column("format").to_pylist(), strict=True)
    )
    return found == list(keys) and set(table.column("shard").to_pylist()) == {shard}


def sensitivity_rows(
    parts: Iterable[pa.Table], plan_rows: Sequence[Mapping[str, Any]], estimator: str
) -> list[dict[str, Any]]:
    """Rows of ``sensitivity.parquet``.

    ``score = 1/2 * sum / num_tokens`` in nats per token. ``score_stderr`` is the standard error
    of that ratio from its spread over shards (the usual ratio estimator: with ``e_s`` and
    ``n_s`` of S shards and ``R = sum e / sum n``, the variance is
    ``S/(S-1) * sum (e_s - R n_s)^2 / (sum n)^2``); null for a single shard. ``modelopt_score``
    is what ``mtq.auto_quantize`` would report if every shard were one of its scoring batches.

    Args:
        parts: Scores parts in shard order, all with the same rows.
        plan_rows: Rows of ``plan.parquet``.
        estimator: ``elementwise`` or ``token``.

    Raises:
        ScoreError: No part, or a searched group without a score.
    """
    tables = list(parts)
    if not tables:
        raise ScoreError("no shard was scored; see the quarantined shards in run.json")
    costs = {(row["group"], row["format"]): row for row in plan_rows if row["is_searched"]}
    _require_scores(tables)
    elementwise = np.stack([t.column("elementwise_sum").fill_null(0.0).to_numpy() for t in tables])
    token = np.stack([t.column("token_sum").fill_null(0.0).to_numpy() for t in tables])
    tokens_S = np.array([t.column("num_tokens")[0].as_py() for t in tables], dtype=np.float64)
    sums = elementwise if estimator == "elementwise" else token
    scores, errors = _ratio(0.5 * sums, tokens_S)
    modelopt = (elementwise / tokens_S[:, None] ** 2).cumsum(axis=0)[-1]
    keys = list(
        zip(
            tables[0].column("group").to_pylist(),
            tables[0].column("format").to_pylist(),
            strict=True,
        )
    )
    return [
        {
            "group": group,
            "format": format_,
            "score": float(scores[index]),
            "score_stderr": None if errors is None else float(errors[index]),
            "elementwise": float(elementwise[:, index].cumsum()[-1]),
            "token": float(token[:, index].cumsum()[-1]),
            "modelopt_score": float(modelopt[index]),
            "num_tokens": int(tokens_S.sum()),
            "num_shards": len(tables),
            "weight_bits": costs[group, format_]["weight_bits"],
            "weight_bytes": costs[group, format_]["weight_bytes"],
        }
        for index, (group, format_) in enumerate(keys)
    ]


def _require_scores(tables: list[pa.Table]) -> None:
    unseen = np.stack([t.column("elementwise_sum").is_null().to_numpy() for t in tables]).all(
        axis=0
    )
    groups = tables[0].column("group").to_pylist()
    missing = list(dict.fromkeys(groups[index] for index in np.flatnonzero(unseen)))
    if missing:
        raise ScoreError(
            f"{len(missing)} group(s) received no gradient and have no score, first "
            f"{missing[0]!r}; use longer or more samples, or --disable them"
        )


def _ratio(sums_SK: Floats, tokens_S: Floats) -> tuple[Floats, Floats | None]:
    """Ratio of sums and its standard error; sums run in shard order."""
    total = tokens_S.sum()
    ratio_K = sums_SK.cumsum(axis=0)[-1] / total
    num_shards = len(tokens_S)
    if num_shards < 2:
        return ratio_K, None
    residuals = sums_SK - ratio_K * tokens_S[:, None]
    squares = np.square(residuals).cumsum(axis=0)[-1]
    return ratio_K, np.sqrt(num_shards / (num_shards - 1) * squares) / total
