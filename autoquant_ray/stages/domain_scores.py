"""Scores of each domain of the data -> ``domain_sensitivity.parquet``."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from autoquant_ray.errors import ScoreError
from autoquant_ray.runs.names import (
    DOMAIN_RESAMPLING_FILE,
    DOMAIN_SCORES_FILE,
    DOMAINS_FILE,
    SCORES,
)
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.aggregate import NUM_BUCKETS, aggregate_parts

logger = logging.getLogger(__name__)

_MIN_BUCKETS = 8  # of a domain: fewer would not show how its sums vary


def write_domain_scores(
    state: RunState,
    plan_rows: Sequence[Mapping[str, Any]],
    estimator: str,
    left_out: Collection[str] = (),
) -> None:
    """Write ``domain_sensitivity.parquet`` and ``domain_resampling.parquet``, if there are domains.

    A domain is left out with a warning if none of its shards is used, or if a group has no gradient
    in any of them; the scores of the run do not depend on it. An expert that saw none of a domain's
    tokens loses nothing there.

    Args:
        state: The run.
        plan_rows: Rows of ``plan.parquet``.
        estimator: ``elementwise`` or ``token``.
        left_out: Groups without a score in the whole run.
    """
    directory = state.directory
    if not directory.exists(DOMAINS_FILE):
        return
    shards = _shards_of(directory.read_table(DOMAINS_FILE), state.used_shards)
    schema = SCHEMAS[DOMAIN_SCORES_FILE]
    tables, buckets = [schema.empty_table()], [SCHEMAS[DOMAIN_RESAMPLING_FILE].empty_table()]
    num_buckets = max(_MIN_BUCKETS, NUM_BUCKETS // len(shards))
    for domain, of_domain in shards.items():
        parts = Parts(directory, SCORES, of_domain)
        try:
            result = aggregate_parts(parts, plan_rows, estimator, num_buckets, left_out)
        except ScoreError as error:
            logger.warning("domain %s has no scores of its own: %s", domain, error)
            continue
        rows = [row | {"domain": domain} for row in result.rows]
        tables.append(pa.Table.from_pylist(rows, schema=schema))
        buckets.append(_bucket_table(domain, result.buckets))
    directory.write_table(DOMAIN_RESAMPLING_FILE, pa.concat_tables(buckets))
    directory.write_table(DOMAIN_SCORES_FILE, pa.concat_tables(tables))


def _shards_of(table: pa.Table, used: Sequence[int]) -> dict[str, list[int]]:
    """Domain -> those of its shards that are used, by name."""
    columns = (table.column(name).to_pylist() for name in ("shard", "domain"))
    domain_of = dict(zip(*columns, strict=True))
    shards: dict[str, list[int]] = {domain: [] for domain in sorted(set(domain_of.values()))}
    for shard in used:
        shards[domain_of[shard]].append(shard)
    return shards


def _bucket_table(domain: str, buckets: pa.Table) -> pa.Table:
    """A domain's rows of ``domain_resampling.parquet``."""
    table = buckets.append_column("domain", pa.array([domain] * buckets.num_rows))
    schema = SCHEMAS[DOMAIN_RESAMPLING_FILE]
    return table.select(schema.names).cast(schema)
