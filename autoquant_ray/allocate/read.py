"""A run's problem, scores and solutions, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autoquant_ray.allocate.expert_clusters import experts_of
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.load import Latency
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.config.expert_groups import LAYER
from autoquant_ray.errors import ScoreError, StoreError
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_JSON, MANIFEST_TABLE, PLAN_FILE, SENSITIVITY_FILE
from autoquant_ray.runs.state import RunState


def solution_formats(state: RunState, start: str, problem: Problem) -> dict[str, str]:
    """Searched group -> format of a solution."""
    rows = state.directory.read_table(f"{start}{MANIFEST_TABLE}").to_pylist()
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
    budget = state.directory.read_json(f"{start}{MANIFEST_JSON}")["budget"]
    return SolveOptions(**budget | {"latency": Latency.from_json(budget.get("latency"))})


def is_chosen_by_measurement(manifest: Mapping[str, Any]) -> bool:
    """Whether measured losses chose a solution, so that it is not what the scores would choose."""
    return not {"chosen_on", "refinement"}.isdisjoint(manifest)


def load_problem(state: RunState) -> tuple[Problem, Scores]:
    """Groups with their costs, and the measured scores, of a run.

    Raises:
        StoreError: A file is missing or damaged.
        ScoreError: A searched group lacks a score.
    """
    summary = state.plan
    if not state.directory.exists(SENSITIVITY_FILE):
        missing = state.directory.path(SENSITIVITY_FILE)
        raise StoreError(f"{missing} does not exist; finish the scan with --resume")
    plan_rows = state.directory.read_table(PLAN_FILE).to_pylist()
    problem = Problem.from_plan(plan_rows, summary)
    table = state.directory.read_table(SENSITIVITY_FILE)
    scores = {
        (row["group"], row["format"]): row["score"]
        for row in table.select(["group", "format", "score"]).to_pylist()
    }
    for group in problem.searched:
        for format_ in group.rows:
            if format_ != NONE and scores.get((group.name, format_)) is None:
                raise ScoreError(f"group {group.name} has no score for {format_}")
    experts = experts_of(
        {group.name: group.num_weights for group in problem.searched},
        problem.summary.get("experts", ()),
        scores,
        (state.record.config or {}).get("expert_groups", LAYER),
    )
    return replace(problem, experts=experts), scores


def score_errors(directory: RunDirectory) -> dict[tuple[str, str], float | None]:
    """(group, format) -> standard error of its score; None where there is no spread."""
    table = directory.read_table(SENSITIVITY_FILE)
    rows = table.select(["group", "format", "score_stderr"]).to_pylist()
    return {(row["group"], row["format"]): row["score_stderr"] for row in rows}


def group_sensitivities(directory: RunDirectory) -> list[tuple[str, float]]:
    """Searched groups with the largest score over the menu, most sensitive first."""
    table = directory.read_table(SENSITIVITY_FILE)
    largest: dict[str, float] = {}
    for row in table.select(["group", "score"]).to_pylist():
        largest[row["group"]] = max(row["score"], largest.get(row["group"], 0.0))
    return sorted(largest.items(), key=lambda item: -item[1])
