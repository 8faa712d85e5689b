"""The error bar of a plan's total, against the spread of totals that are drawn again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scored_run import put_scored_run

from autoquant_ray.allocate.certainty.total_error import total_error
from autoquant_ray.runs.names import RESAMPLING_FILE
from autoquant_ray.runs.schemas import SCHEMAS

GROUPS, FORMATS = ("a", "b"), ("x", "y")
CHOSEN = {"a": "x", "b": "y"}


def buckets_of(sums_BGF: Any, tokens_B: Any) -> pa.Table:
    rows = [
        {
            "bucket": b,
            "group": g,
            "format": f,
            "sum": sums_BGF[b, i, j],
            "bucket_tokens": tokens_B[b],
        }
        for b in range(len(sums_BGF))
        for i, g in enumerate(GROUPS)
        for j, f in enumerate(FORMATS)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS[RESAMPLING_FILE])


def rows_of(error: float | None = 0.3, drawn: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"group": g, "format": f, "score": 1.0, "score_stderr": error, "sampling_stderr": drawn}
        for g in GROUPS
        for f in FORMATS
    ]


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_error_is_the_spread_of_totals_drawn_again(shared: float) -> None:
    """Many runs of 40 shards: the stated error is the spread of their totals, correlated or not."""
    generator = np.random.default_rng(1)
    totals, stated = [], []
    for _ in range(400):
        tokens_B = generator.integers(50, 150, 40)
        common_B11 = 1 + shared * generator.normal(0, 0.3, (40, 1, 1))
        own_BGF = 1 + 0.3 * generator.normal(0, 1, (40, 2, 2))
        sums_BGF = 2 * tokens_B[:, None, None] * common_B11 * own_BGF
        error = total_error(CHOSEN, rows_of(), buckets_of(sums_BGF, tokens_B))
        assert error is not None
        assert not error.is_bound
        stated.append(error.stderr)
        totals.append((sums_BGF[:, 0, 0] + sums_BGF[:, 1, 1]).sum() / 2 / tokens_B.sum())
    assert np.mean(stated) == pytest.approx(np.std(totals), rel=0.12)


def test_error_of_one_group_is_its_scores_own(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", num_layers=1, num_shards=12)
    rows = directory.read_table("sensitivity.parquet").to_pylist()
    buckets = directory.read_table("resampling.parquet")
    for row in rows[::5]:
        error = total_error({row["group"]: row["format"]}, rows, buckets)
        assert error is not None
        assert error.stderr == pytest.approx(row["score_stderr"], rel=1e-9)


def test_noise_of_drawn_rows_is_the_least(tmp_path: Path) -> None:
    sums_BGF = np.full((4, 2, 2), 20.0)
    error = total_error(CHOSEN, rows_of(drawn=0.3), buckets_of(sums_BGF, [10] * 4))
    assert error is not None
    assert error.stderr == pytest.approx(0.3 * math.sqrt(2))


def test_without_shards_the_errors_are_added_as_a_bound() -> None:
    error = total_error(CHOSEN, rows_of(0.3), None)
    assert error is not None
    assert (error.stderr, error.is_bound) == (pytest.approx(0.6), True)


def test_buckets_of_an_earlier_version_give_the_bound() -> None:
    error = total_error(CHOSEN, rows_of(0.3), buckets_of(np.ones((4, 2, 2)), [None] * 4))
    assert error is not None
    assert error.is_bound


def test_nothing_is_known_of_a_single_shard_and_of_16_bits() -> None:
    assert total_error(CHOSEN, rows_of(None), buckets_of(np.ones((1, 2, 2)), [10])) is None
    assert total_error({"a": "none"}, rows_of(), None) is None
