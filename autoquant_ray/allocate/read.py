"""A run's problem, scores and solutions, read from its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from autoquant_ray.allocate.expert_clusters import experts_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.config.expert_groups import LAYER
from autoquant_ray.errors import ScoreError, StoreError
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.names import MANIFEST_JSON, MANIFEST_TABLE, PLAN_FILE, SENSITIVITY_FILE
from autoquant_ray.runs.state import RunState
from autoquant_ray.runs.table_rows import TableRows


def solution_formats(state: RunState, start: str, problem: Problem) -> dict[str, str]:
    """Searched group -> format of a solution."""
    rows = state.directory.read_rows(f"{start}{MANIFEST_TABLE}")
    chosen = {row["group"]: row["format"] for row in rows}
    return {group.name: chosen[group.name] for group in problem.searched}


def solution_options(state: RunState, start: str) -> SolveOptions:
    """Budget and constraints that a solution was solved for.

    Raises:
        StoreError: There is no such solution.
    """
    if not state.directory.exists(f"{start}{MANIFEST_JSON}"):
        names = ", ".join(state.directory.list_folders("solutions")) or "none"
        raise StoreError(
            f"{state.directory.path(start)} is not a solution; solutions of the run: {names}"
        )
    return options_of(state.directory.read_json(f"{start}{MANIFEST_JSON}"))


def options_of(manifest: Mapping[str, Any]) -> SolveOptions:
    """Budget and constraints of the content of a ``manifest.json``."""
    return SolveOptions.from_json(manifest["budget"])


def is_chosen_by_measurement(manifest: Mapping[str, Any]) -> bool:
    """Whether measured losses chose a solution, so that it is not what the scores would choose."""
    return not {"chosen_on", "refinement"}.isdisjoint(manifest)


@dataclass(frozen=True, kw_only=True)
class ScoredRun:
    """A run with its problem and its scores: ``plan.parquet`` and ``sensitivity.parquet``.

    A command reads it once and hands it on.

    Attributes:
        state: The run.
        problem: Its groups with their costs.
        rows: Rows of ``sensitivity.parquet``.
    """

    state: RunState
    problem: Problem
    rows: TableRows

    @classmethod
    def read(cls, state: RunState) -> ScoredRun:
        """Read a run whose scores are complete.

        Raises:
            StoreError: A file is missing or damaged.
            ScoreError: A searched group lacks a score.
        """
        directory = state.directory
        summary = state.plan
        if not directory.exists(SENSITIVITY_FILE):
            missing = directory.path(SENSITIVITY_FILE)
            raise StoreError(f"{missing} does not exist; finish the scan with `resume`")
        plan_rows = directory.read_rows(PLAN_FILE)
        rows = directory.read_rows(SENSITIVITY_FILE)
        problem = Problem.from_plan(plan_rows, summary)
        run = cls(state=state, problem=problem, rows=rows)
        for group in problem.searched:
            for format_ in group.rows:
                if format_ != NONE and run.scores.get((group.name, format_)) is None:
                    raise ScoreError(f"group {group.name} has no score for {format_}")
        experts = experts_of(
            {group.name: group.num_weights for group in problem.searched},
            problem.summary.get("experts", ()),
            run.scores,
            (state.record.config or {}).get("expert_groups", LAYER),
        )
        return replace(run, problem=replace(problem, experts=experts))

    def with_problem(self, problem: Problem) -> ScoredRun:
        """The same run with another problem, such as one that is timed."""
        return self if problem is self.problem else replace(self, problem=problem)

    @cached_property
    def scores(self) -> dict[tuple[str, str], float]:
        """(group, format) -> score in nats per token."""
        return dict(zip(self._keys, self.rows.column("score"), strict=True))

    @cached_property
    def errors(self) -> dict[tuple[str, str], float | None]:
        """(group, format) -> standard error of its score; None where a single shard gives none."""
        return dict(zip(self._keys, self.rows.column("score_stderr"), strict=True))

    @cached_property
    def drawing_errors(self) -> dict[tuple[str, str], float | None]:
        """(group, format) -> the part of that which comes from drawing rows; 0 without."""
        return dict(zip(self._keys, self.rows.column("sampling_stderr"), strict=True))

    @cached_property
    def _keys(self) -> list[tuple[str, str]]:
        return list(zip(self.rows.column("group"), self.rows.column("format"), strict=True))

    @property
    def sensitivities(self) -> list[tuple[str, float]]:
        """Searched groups with the largest score over the menu, most sensitive first."""
        largest: dict[str, float] = {}
        for (group, _), score in self.scores.items():
            largest[group] = max(score, largest.get(group, 0.0))
        return sorted(largest.items(), key=lambda item: -item[1])

    @property
    def modelopt_scores(self) -> dict[tuple[str, str], float]:
        """ModelOpt's scores: at most that of the coarser format before it in ModelOpt's order."""
        compressions = {
            entry["name"]: entry["modelopt_compression"]
            for entry in self.problem.summary["formats"]
            if entry.get("weight")
        }
        scores: dict[tuple[str, str], float] = {}
        lowest: dict[str, float] = {}
        for row in sorted(self.rows, key=lambda row: compressions.get(row["format"], 1.0)):
            group = row["group"]
            if row["format"] not in compressions:  # ModelOpt does not search caches
                scores[group, row["format"]] = row["modelopt_score"]
                continue
            lowest[group] = min(row["modelopt_score"], lowest.get(group, math.inf))
            scores[group, row["format"]] = lowest[group]
        return scores
