"""Sums over shards, their error bars, and groups without a score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from autoquant_ray.errors import ScoreError
from autoquant_ray.runs.names import SCORES
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.stages.aggregate import aggregate_parts, is_complete_part

PLAN = [
    {"group": "a", "format": "f", "weight_bits": 8.0, "weight_bytes": 80.0, "is_searched": True},
    {"group": "b", "format": "f", "weight_bits": 8.0, "weight_bytes": 40.0, "is_searched": True},
]


def sensitivity_rows(parts: Any, plan_rows: Any, estimator: str) -> list[dict[str, Any]]:
    return aggregate_parts(parts, plan_rows, estimator).rows


def part(
    shard: int, tokens: int, sums: list[float | None], variance: float | None = 0.0
) -> pa.Table:
    rows = [
        {
            "shard": shard,
            "group": group,
            "format": "f",
            "elementwise_sum": value,
            "token_sum": None if value is None else 2 * value,
            "num_tokens": tokens,
            "num_samples": 1,
            "seconds": 0.1,
            "elementwise_variance": variance,
            "token_variance": None if variance is None else 4 * variance,
        }
        for group, value in zip("ab", sums, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS[SCORES])


def test_rows_sum_shards_and_divide_by_tokens() -> None:
    parts = [part(0, 10, [4.0, 1.0]), part(1, 30, [8.0, 1.0])]
    first, second = sensitivity_rows(parts, PLAN, "elementwise")
    assert first["score"] == 0.5 * 12 / 40
    assert first["modelopt_score"] == pytest.approx(4 / 100 + 8 / 900)
    assert (first["elementwise"], first["token"]) == (12.0, 24.0)
    assert (first["num_tokens"], first["num_shards"]) == (40, 2)
    assert second["weight_bytes"] == 40.0
    assert sensitivity_rows(parts, PLAN, "token")[0]["score"] == 0.5 * 24 / 40


def test_stderr_covers_the_spread_of_the_ratio() -> None:
    """Against the spread of the score over many repetitions of the same experiment."""
    generator = np.random.default_rng(0)
    scores, errors = [], []
    for _ in range(400):
        tokens = generator.integers(20, 60, size=16)
        sums = tokens * generator.gamma(4.0, 0.5, size=16)
        parts = [
            part(s, int(n), [float(e), 1.0])
            for s, (n, e) in enumerate(zip(tokens, sums, strict=True))
        ]
        row = sensitivity_rows(parts, PLAN, "elementwise")[0]
        scores.append(row["score"])
        errors.append(row["score_stderr"])
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.15)


def test_stderr_single_shard_is_unknown() -> None:
    assert (
        sensitivity_rows([part(0, 10, [4.0, 1.0])], PLAN, "elementwise")[0]["score_stderr"] is None
    )


def test_group_unseen_in_one_shard_is_scored_from_the_others() -> None:
    parts = [part(0, 10, [4.0, None]), part(1, 10, [4.0, 2.0])]
    assert sensitivity_rows(parts, PLAN, "elementwise")[1]["score"] == 0.5 * 2 / 20


def test_group_unseen_in_all_shards_is_an_error_not_a_zero() -> None:
    with pytest.raises(ScoreError, match="'b'"):
        sensitivity_rows([part(0, 10, [4.0, None])], PLAN, "elementwise")


def test_group_with_a_true_zero_is_scored_zero() -> None:
    assert sensitivity_rows([part(0, 10, [4.0, 0.0])], PLAN, "elementwise")[1]["score"] == 0.0


def test_no_shard_is_an_error() -> None:
    with pytest.raises(ScoreError):
        sensitivity_rows([], PLAN, "elementwise")


def test_part_of_another_shard_or_menu_is_not_complete() -> None:
    keys = [("a", "f"), ("b", "f")]
    assert is_complete_part(part(3, 10, [1.0, 1.0]), 3, keys)
    assert not is_complete_part(part(3, 10, [1.0, 1.0]), 4, keys)
    assert not is_complete_part(part(3, 10, [1.0, 1.0]), 3, [("a", "f"), ("a", "g")])
    assert not is_complete_part(part(3, 10, [1.0, math.inf])[:1], 3, keys)


def test_stderr_contains_the_noise_of_sampled_rows() -> None:
    """Two shards that happen to agree: the spread alone would claim certainty."""
    parts = [part(0, 10, [4.0, 1.0], variance=9.0), part(1, 10, [4.0, 1.0], variance=16.0)]
    for estimator, noise in (("elementwise", 5.0), ("token", 10.0)):
        row, _ = sensitivity_rows(parts, PLAN, estimator)
        assert row["sampling_stderr"] == pytest.approx(0.5 * noise / 20)
        assert row["score_stderr"] == row["sampling_stderr"]


def test_stderr_spread_larger_than_the_noise_of_sampled_rows_stands() -> None:
    exact = [part(0, 10, [4.0, 1.0]), part(1, 10, [8.0, 1.0])]
    noisy = [part(0, 10, [4.0, 1.0], variance=1.0), part(1, 10, [8.0, 1.0], variance=1.0)]
    rows = [sensitivity_rows(parts, PLAN, "elementwise")[0] for parts in (exact, noisy)]
    assert rows[0]["sampling_stderr"] == 0.0
    assert rows[1]["score_stderr"] == rows[0]["score_stderr"] > rows[1]["sampling_stderr"] > 0
