"""Which shards a group's scores come from, and whether one odd shard decides its format.

A score is ``1/2 * sum over shards / tokens``, so a shard's part of the sum is its share of the
score. The parts under ``scores/`` are read in order, with bounded memory. Shapes: K (group,
format), C shards that are left out one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import search
from autoquant_ray.arrays import Floats
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.names import SCORES
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState
from autoquant_ray.runs.table_rows import TableRows, has_values, numbers_of, rows_with

NUM_LARGEST = 5
"""Shards named per format."""
MIN_SHARE = 0.05
"""A shard with a smaller share of a score is not tried without: it cannot decide alone."""


@dataclass(frozen=True, kw_only=True)
class ShardShare:
    """One shard's part of one score.

    Attributes:
        share: Of the score, 0 to 1.
        token_share: Of the predicted tokens; the share of an unremarkable shard is near it.
    """

    shard: int
    share: float
    token_share: float


class ShardParts:
    """The parts behind the scores of a run.

    Args:
        state: A finished scan.
    """

    def __init__(self, state: RunState) -> None:
        self._shards = state.used_shards
        self._parts = Parts(state.directory, SCORES, self._shards)
        self._column = f"{state.config['estimator']}_sum"

    def __len__(self) -> int:
        return len(self._shards)

    def largest(self, group: str) -> dict[str, list[ShardShare]]:
        """The shards with the largest shares of a group's scores, by format, largest first.

        A format whose score is 0 has none.
        """
        sums: list[dict[str, float]] = []
        tokens: list[int] = []
        for part in self._parts:
            rows = TableRows(rows_with(part, "group", group))
            columns = (rows.column(name) for name in ("group", "format", self._column))
            sums.append({f: sum_ or 0.0 for g, f, sum_ in zip(*columns, strict=True) if g == group})
            tokens.append(_num_tokens(part))
        return {
            format_: self._ranked(np.array([of_shard[format_] for of_shard in sums]), tokens)
            for format_ in sums[0]
        }

    def _ranked(self, sums_S: Floats, tokens: Sequence[int]) -> list[ShardShare]:
        total = float(sums_S.sum())
        if total <= 0:
            return []
        order = np.argsort(-sums_S, kind="stable")[:NUM_LARGEST]
        return [
            ShardShare(
                shard=self._shards[index],
                share=float(sums_S[index]) / total,
                token_share=tokens[index] / sum(tokens),
            )
            for index in order
        ]

    def scores_without(
        self, left_out: Sequence[int], groups: Collection[str]
    ) -> Iterator[tuple[int, dict[tuple[str, str], float] | None]]:
        """Scores of some groups from the other shards, for each of some shards, one at a time.

        None for a shard without which one of these groups was never seen.

        Args:
            left_out: Shards to leave out, one at a time.
            groups: Those that have a score.
        """
        out_C = np.array(left_out)
        tokens_C = np.zeros(len(out_C))
        sums_CK, is_seen_CK = np.zeros((len(out_C), 1)), np.zeros((len(out_C), 1), dtype=np.bool_)
        keys: list[tuple[str, str]] = []
        for shard, part in zip(self._shards, self._parts, strict=True):
            counts_C1 = (out_C != shard)[:, None]
            column = part.column(self._column)
            sums_CK = sums_CK + counts_C1 * numbers_of(column, null=0.0)
            is_seen_CK = is_seen_CK | (counts_C1 & has_values(column))
            tokens_C += counts_C1[:, 0] * _num_tokens(part)
            if not keys:
                rows = TableRows(part.select(["group", "format"]))
                keys = list(zip(rows.column("group"), rows.column("format"), strict=True))
        is_asked_K = np.array([group in groups for group, _ in keys])
        asked = [key for key in keys if key[0] in groups]
        for shard, sums_K, tokens, is_seen_K in zip(
            left_out, sums_CK, tokens_C, is_seen_CK, strict=True
        ):
            scores_K = (0.5 * sums_K / tokens)[is_asked_K]
            is_seen = bool(is_seen_K[is_asked_K].all())
            yield shard, dict(zip(asked, scores_K.tolist(), strict=True)) if is_seen else None


@dataclass(frozen=True, kw_only=True)
class ShardFindings:
    """What the shards say about one group.

    Attributes:
        num_shards: Shards behind the scores; None where they cannot be looked at.
        reason: Why they cannot; None where they can.
        largest: Format -> shards with the largest shares of its score, largest first.
        without: Shard -> format that the group gets when the budget is solved without it; None
            where some group was seen in that shard alone. For the largest shard of every format,
            if its share is at least 5%. Empty for a plan for the
            worst domain, which needs all shards.
    """

    num_shards: int | None = None
    reason: str | None = None
    largest: dict[str, list[ShardShare]] = field(default_factory=dict)
    without: dict[int, str | None] = field(default_factory=dict)


def find_shards(
    state: RunState, group: str, problem: Problem, options: SolveOptions
) -> ShardFindings:
    """Look at the shards behind a group's scores, if they are still there.

    Args:
        state: A run whose scores are complete.
        group: Name of a searched group.
        problem: Groups with their costs.
        options: Budget and constraints of the solution.
    """
    if options.domains:
        return ShardFindings(reason="the plan weighs domains, shards are of all tokens alike")
    if state.record.is_imported:
        return ShardFindings(reason="imported scores have no shards")
    missing = sorted(set(state.used_shards) - set(state.directory.list_parts(SCORES)))
    if missing:
        gone = f"{len(missing)} of {len(state.used_shards)} parts are gone"
        return ShardFindings(reason=f"{gone}, the first of shard {missing[0]}")
    parts = ShardParts(state)
    try:
        largest = parts.largest(group)
        without = _formats_without(parts, largest, group, problem, options)
    except StoreError as error:
        return ShardFindings(reason=str(error))
    return ShardFindings(num_shards=len(parts), largest=largest, without=without)


def _formats_without(
    parts: ShardParts,
    largest: Mapping[str, Sequence[ShardShare]],
    group: str,
    problem: Problem,
    options: SolveOptions,
) -> dict[int, str | None]:
    first = (shares[0] for shares in largest.values() if shares)
    tried = sorted({share.shard for share in first if share.share >= MIN_SHARE})
    if group in options.pins or len(parts) < 2 or options.worst_domain:
        return {}
    groups = {g.name for g in problem.searched}
    return {
        shard: None if scores is None else search(problem, scores, options).formats[group]
        for shard, scores in (parts.scores_without(tried, groups) if tried else ())
    }


def _num_tokens(part: pa.Table) -> int:
    return int(part.column("num_tokens")[0].as_py())
