"""The scores of each domain of a run: written from its shards' parts, and read back.

A domain's score is made of the shards that hold it exactly as the whole run's is made of all of
them, so that it is what a scan of this domain alone would find under the same input maxima.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from autoquant_ray.aggregation import NUM_BUCKETS, aggregate_parts
from autoquant_ray.errors import ConfigError, ScoreError
from autoquant_ray.manifest import predicted_loss
from autoquant_ray.parts import Parts
from autoquant_ray.run_files import DOMAIN_RESAMPLING_FILE, DOMAIN_SCORES_FILE, DOMAINS_FILE, SCORES
from autoquant_ray.schemas import SCHEMAS
from autoquant_ray.state import RunState

logger = logging.getLogger(__name__)

_MIN_BUCKETS = 8  # of a domain: fewer would not show its spread

Scores = dict[tuple[str, str], float]
"""(group, format) -> nats per token."""


@dataclass(frozen=True, kw_only=True)
class DomainScores:
    """The scores of several domains.

    Attributes:
        scores: Domain -> scores on its tokens.
        num_tokens: Domain -> predicted tokens behind them.
    """

    scores: dict[str, Scores]
    num_tokens: dict[str, int]

    @property
    def equal_weights(self) -> dict[str, float]:
        """Every domain counts alike, however many tokens it has."""
        return dict.fromkeys(self.scores, 1 / len(self.scores))

    def weighted(self, weights: Mapping[str, float]) -> Scores:
        """``sum_d w_d * score_d`` for every (group, format).

        Args:
            weights: Domain -> weight; a domain without one counts nothing.

        Raises:
            ConfigError: A domain that the run does not have.
        """
        self.require(weights)
        first = next(iter(self.scores.values()))
        return {
            key: math.fsum(weight * self.scores[name][key] for name, weight in weights.items())
            for key in first
        }

    def losses(self, formats: Mapping[str, str]) -> dict[str, float]:
        """Predicted KL of each domain under an allocation, in nats per token of that domain.

        Args:
            formats: Searched group -> format; further groups in 16 bits may be there too.
        """
        return {domain: predicted_loss(scores, formats) for domain, scores in self.scores.items()}

    def require(self, names: Mapping[str, float]) -> None:
        """Check that domains exist.

        Raises:
            ConfigError: One does not.
        """
        for name in names:
            if name not in self.scores:
                known = ", ".join(self.scores)
                raise ConfigError(
                    f"--domains: the run has no scores of a domain {name!r}; it has: {known}"
                )


def write_domain_scores(
    state: RunState,
    plan_rows: Sequence[Mapping[str, Any]],
    estimator: str,
    left_out: Collection[str] = (),
) -> None:
    """``domain_sensitivity.parquet`` and ``domain_resampling.parquet``, of several domains.

    A domain that has no shard left, or a group without a gradient in all its shards, has no score
    and is left out with a warning: the whole run's scores do not need it. An expert that saw none
    of a domain's tokens loses nothing there.

    Args:
        state: The run.
        plan_rows: Rows of ``plan.parquet``.
        estimator: ``elementwise`` or ``token``.
        left_out: Groups without a score in the whole run.
    """
    directory = state.directory
    if not directory.exists(DOMAINS_FILE):
        return
    shards = _shards_of(directory.read_table(DOMAINS_FILE, "domains"), state.used_shards)
    schema = SCHEMAS["domain_sensitivity"]
    tables, buckets = [schema.empty_table()], [SCHEMAS["domain_resampling"].empty_table()]
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
    directory.write_table(DOMAIN_RESAMPLING_FILE, "domain_resampling", pa.concat_tables(buckets))
    directory.write_table(DOMAIN_SCORES_FILE, "domain_sensitivity", pa.concat_tables(tables))


def read_domain_scores(state: RunState) -> DomainScores | None:
    """The scores of a run's domains; None where it has fewer than two.

    Raises:
        StoreError: A file is damaged.
    """
    if not state.directory.exists(DOMAIN_SCORES_FILE):
        return None
    table = state.directory.read_table(DOMAIN_SCORES_FILE, "domain_sensitivity")
    scores: dict[str, Scores] = {}
    num_tokens: dict[str, int] = {}
    for row in table.select(["domain", "group", "format", "score", "num_tokens"]).to_pylist():
        scores.setdefault(row["domain"], {})[row["group"], row["format"]] = row["score"]
        num_tokens[row["domain"]] = row["num_tokens"]
    return DomainScores(scores=scores, num_tokens=num_tokens) if len(scores) > 1 else None


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
    schema = SCHEMAS["domain_resampling"]
    return table.select(schema.names).cast(schema)
