"""Two runs side by side, from their files: what changed, and whether that is more than noise.

Needs neither the models, torch nor Ray. What counts as moved stands in
:mod:`~autoquant_ray.compare.moved_scores`, what the verdicts mean in
:mod:`~autoquant_ray.compare.verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.arrays import Floats
from autoquant_ray.compare.allocation_changes import format_changes, regret
from autoquant_ray.compare.moved_scores import (
    Moves,
    PairScores,
    find_moves,
    has_integer_input,
    log_deviations,
    paired_stderr,
    rank_correlation,
)
from autoquant_ray.compare.run_changes import changed_weights, find_changes, same_tokens
from autoquant_ray.compare.verdict import MIN_CHANGE, Comparison, MovedGroup, Test, judged
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    CALIBRATION,
    MANIFEST_JSON,
    MANIFEST_TABLE,
    SCORES,
)
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState

Key = tuple[str, str]


def compare_runs(
    before: RunDirectory, after: RunDirectory, significance: float = 0.05
) -> Comparison:
    """Compare a run with an earlier one.

    Args:
        before: The earlier run, finished.
        after: The later run, finished.
        significance: False discovery rate of the groups that are said to have moved.

    Raises:
        StoreError: Not a finished run, or its files are damaged.
    """
    first, second = _Side(before), _Side(after)
    changes = find_changes(first.record, second.record)
    keys = [key for key in second.rows if key in first.rows]
    moves, test = _moves(first, second, keys, significance)
    weights = changed_weights(first.record, second.record)
    moved = _moved_groups(first, second, keys, moves)
    moved.sort(key=lambda group: group.group not in (weights or ()))  # stable: then by size
    comparison = Comparison(
        verdict="noise",
        reasons=[],
        before=first.facts(),
        after=second.facts(),
        changes=changes,
        changed_weights=weights,
        spearman=_rank_correlations(first, second, keys),
        test=test,
        significance=significance,
        num_tested=int(np.sum(~np.isnan(moves.p_K))),
        moved=moved,
        only_before=_only(first, second),
        only_after=_only(second, first),
        format_changes=format_changes(first.formats, second.formats, second.problem, second.scores),
        regret=regret(first.formats, second.formats, second.problem, second.scores),
    )
    is_equal = all(first.rows[key]["score"] == second.rows[key]["score"] for key in keys)
    return judged(comparison, is_equal=is_equal)


def run_facts(directory: RunDirectory) -> dict[str, Any]:
    """Facts about one finished run, as in :attr:`Comparison.after`.

    Raises:
        StoreError: Not a finished run, or its files are damaged.
    """
    return _Side(directory).facts()


class _Side:
    """One of the two runs, read from its files."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.state = RunState.open(directory)
        self.record = self.state.record
        self.problem: Problem
        run = ScoredRun.read(self.state)
        self.problem, self.scores = run.problem, run.scores
        self.rows: dict[Key, dict[str, Any]] = {
            (row["group"], row["format"]): row for row in run.rows
        }
        if not directory.exists(MANIFEST_JSON):
            raise StoreError(f"{directory.uri} has no solution yet; finish the scan with `resume`")
        self.manifest = directory.read_json(MANIFEST_JSON)
        modules = directory.read_table(MANIFEST_TABLE)
        columns = (modules.column(name).to_pylist() for name in ("group", "format"))
        self.formats = dict(zip(*columns, strict=True))

    @property
    def num_shards(self) -> int:
        """Shards behind the scores."""
        return max((row["num_shards"] or 1 for row in self.rows.values()), default=1)

    def facts(self) -> dict[str, Any]:
        """What a reader wants to know of the run as a whole."""
        solution = self.manifest["solution"]
        names = ("predicted_kl_nats", "effective_bits", "weight_bytes")
        return {
            "run_id": self.record.run_id,
            "uri": self.directory.uri,
            "created": self.record.created,
            "model": self.record.model["name"],
            "data": self.record.dataset.get("name"),
            "num_shards": self.num_shards,
            "num_quarantined": len(self.record.quarantined),
            **{name: solution[name] for name in names},
        }

    def of(self, keys: Sequence[Key]) -> PairScores:
        """Scores of some pairs, as arrays."""
        rows = [self.rows[key] for key in keys]
        stderrs = [row["score_stderr"] for row in rows]
        return PairScores(
            score_K=np.array([row["score"] for row in rows], dtype=np.float64),
            stderr_K=np.array([math.nan if e is None else e for e in stderrs], dtype=np.float64),
            num_shards=self.num_shards,
            maxima_K=self._maxima_deviations(keys),
        )

    def _maxima_deviations(self, keys: Sequence[Key]) -> Floats:
        """Standard deviation over shards of the logarithm of each pair's input maximum."""
        formats = self.state.plan["formats"]
        static = {f["name"] for f in formats if has_integer_input(f)}
        groups = {group for group, format_ in keys if format_ in static}
        if not groups or not self._has(CALIBRATION):
            return np.zeros(len(keys))
        parts = Parts(self.directory, CALIBRATION, self.state.used_shards)
        by_module = log_deviations(parts)
        by_group = {
            name: max(
                (by_module.get(module, 0.0) for module in self.problem.groups[name].module_names),
                default=0.0,
            )
            for name in groups
        }
        return np.array([by_group[g] if f in static else 0.0 for g, f in keys], dtype=np.float64)

    def half_sums(self, keys: Sequence[Key]) -> Iterator[tuple[Floats, int]]:
        """Half the sums and the predicted tokens of each shard, in the order of the shards.

        Parts also have rows of experts that no shard has a token for, and that have no score.
        """
        column = f"{self.state.config['estimator']}_sum"
        for part in Parts(self.directory, SCORES, self.state.used_shards):
            names = (part.column(name).to_pylist() for name in ("group", "format"))
            place_of = {key: place for place, key in enumerate(zip(*names, strict=True))}
            index_K = np.array([place_of[key] for key in keys])
            sums_K = part.column(column).fill_null(0.0).to_numpy()
            yield 0.5 * sums_K[index_K], int(part.column("num_tokens")[0].as_py())

    @property
    def has_scores(self) -> bool:
        """Whether every used shard's scores are still there."""
        return self._has(SCORES)

    def _has(self, folder: str) -> bool:
        if self.record.config is None:
            return False
        return set(self.state.used_shards) <= set(self.directory.list_parts(folder))


def _moves(
    first: _Side, second: _Side, keys: Sequence[Key], significance: float
) -> tuple[Moves, Test]:
    before, after = first.of(keys), second.of(keys)
    stderr_K = None
    if keys and _is_paired(first, second):
        both = zip(first.half_sums(keys), second.half_sums(keys), strict=True)
        differences = ((after_K - before_K, tokens) for (before_K, _), (after_K, tokens) in both)
        stderr_K = paired_stderr(differences, after.score_K - before.score_K)
    moves = find_moves(before, after, significance, stderr_K)
    if np.isnan(moves.p_K).all():
        return moves, "none"
    return moves, "paired" if moves.is_paired else "unpaired"


def _is_paired(first: _Side, second: _Side) -> bool:
    return (
        same_tokens(first.record, second.record)
        and first.state.num_shards == second.state.num_shards
        and first.state.used_shards == second.state.used_shards
        and len(first.state.used_shards) > 1
        and first.has_scores
        and second.has_scores
    )


def _moved_groups(
    first: _Side, second: _Side, keys: Sequence[Key], moves: Moves
) -> list[MovedGroup]:
    """Groups with a significant move of at least :data:`MIN_CHANGE`, the largest change first."""
    moves_of: dict[str, list[tuple[float, int]]] = {}
    for index in np.flatnonzero(moves.is_significant_K).tolist():
        size = _log_change(first.rows[keys[index]]["score"], second.rows[keys[index]]["score"])
        if size >= math.log1p(MIN_CHANGE):
            moves_of.setdefault(keys[index][0], []).append((size, index))
    ranked = sorted(moves_of.items(), key=lambda item: -max(item[1])[0])
    moved = []
    for group, sizes in ranked:
        index = max(sizes)[1]
        before, after = (side.rows[keys[index]]["score"] for side in (first, second))
        moved.append(
            MovedGroup(
                group=group,
                format=keys[index][1],
                before=before,
                after=after,
                change=after / before - 1 if before > 0 else None,
                z=float(moves.z_K[index]),
                p_value=float(moves.p_K[index]),
                num_formats=len(sizes),
            )
        )
    return moved


def _log_change(before: float, after: float) -> float:
    """Size of a change, the same up and down; infinite from or to 0."""
    if before == after:
        return 0.0
    return math.inf if min(before, after) <= 0 else abs(math.log(after / before))


def _rank_correlations(first: _Side, second: _Side, keys: Sequence[Key]) -> dict[str, float | None]:
    scores: dict[str, tuple[list[float], list[float]]] = {}
    for key in keys:
        before, after = scores.setdefault(key[1], ([], []))
        before.append(first.rows[key]["score"])
        after.append(second.rows[key]["score"])
    return {name: rank_correlation(*both) for name, both in scores.items()}


def _only(side: _Side, other: _Side) -> list[str]:
    others = {group.name for group in other.problem.searched}
    return [group.name for group in side.problem.searched if group.name not in others]
