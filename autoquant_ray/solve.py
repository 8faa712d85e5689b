"""Re-solve a finished run for a budget: needs neither the model, torch nor Ray.

Reads ``plan.parquet``, ``sensitivity.parquet`` and ``run.json``; writes two manifests and the
reports into a solution's folder (the run's own folder for the budget of the scan itself).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.allocation import Allocation
from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.certainty import Certainty, assess_solution
from autoquant_ray.domain_certainty import assess_weighted
from autoquant_ray.domain_plans import domain_summary, solve_domains
from autoquant_ray.errors import ScoreError, StoreError
from autoquant_ray.expert_clusters import experts_of
from autoquant_ray.expert_groups import LAYER
from autoquant_ray.formats import NONE
from autoquant_ray.manifest import (
    build_manifest,
    chosen_formats,
    manifest_rows,
    quantization_config,
    solution_summary,
)
from autoquant_ray.notebook import facts_html
from autoquant_ray.report import write_reports
from autoquant_ray.run_files import SOLUTIONS, solution_folder
from autoquant_ray.served_search import served_problem, ties_of
from autoquant_ray.state import RunState
from autoquant_ray.stopping import describe_stopping
from autoquant_ray.store import RunDirectory

Scores = dict[tuple[str, str], float]
"""(group, format) -> nats per token."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An allocation that has been written.

    Attributes:
        name: Folder name under ``solutions/``; empty for the scan's own budget.
        summary: The ``solution`` object of ``manifest.json``.
        formats: Group -> chosen format, unsearched groups included.
        paths: File kind -> full path.
        added_bytes: Heads tied to the embedding that are quantized -> bytes that this adds.
        shards_used: How many shards were used and why, for a scan that was asked to stop early.
        certainty: How sure it is; None where there are no shards to resample.
    """

    name: str
    summary: dict[str, Any]
    formats: dict[str, str]
    paths: dict[str, str]
    added_bytes: dict[str, float]
    shards_used: str | None
    certainty: Certainty | None

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            **self.summary,
            "name": self.name,
            "formats": self.formats,
            "paths": self.paths,
        }

    def _repr_html_(self) -> str:
        kl = self.summary["predicted_kl_nats"]
        facts = [
            ("Effective bits", f"{self.summary['effective_bits']:.4f}"),
            ("Weights of the whole model", f"{self.summary['weight_bytes'] / 2**20:,.1f} MiB"),
            ("Predicted KL", "unknown" if kl is None else f"{kl:.4g} nats per token"),
            *((kind, path) for kind, path in self.paths.items()),
        ]
        return facts_html(f"Solution {self.name}" if self.name else "The scan's solution", facts)


def load_problem(state: RunState) -> tuple[Problem, Scores]:
    """Groups with their costs, and the measured scores, of a run.

    Raises:
        StoreError: A file is missing or damaged.
        ScoreError: A searched group lacks a score.
    """
    if "plan" not in state.values:
        raise StoreError(f"{state.directory.uri} has no plan yet; finish the scan with --resume")
    if not state.directory.exists("sensitivity.parquet"):
        missing = state.directory.path("sensitivity.parquet")
        raise StoreError(f"{missing} does not exist; finish the scan with --resume")
    plan_rows = state.directory.read_table("plan.parquet", "plan").to_pylist()
    problem = Problem(plan_rows, state.values["plan"])
    table = state.directory.read_table("sensitivity.parquet", "sensitivity")
    scores = {
        (row["group"], row["format"]): row["score"]
        for row in table.select(["group", "format", "score"]).to_pylist()
    }
    for group in problem.searched:
        for format_ in group.rows:
            if format_ != NONE and scores.get((group.name, format_)) is None:
                raise ScoreError(f"group {group.name} has no score for {format_}")
    problem.experts = experts_of(
        {group.name: group.num_weights for group in problem.searched},
        problem.summary.get("experts", ()),
        scores,
        (state.values.get("config") or {}).get("expert_groups", LAYER),
    )
    return problem, scores


def score_errors(directory: RunDirectory) -> dict[tuple[str, str], float | None]:
    """(group, format) -> standard error of its score; None where there is no spread."""
    table = directory.read_table("sensitivity.parquet", "sensitivity")
    rows = table.select(["group", "format", "score_stderr"]).to_pylist()
    return {(row["group"], row["format"]): row["score_stderr"] for row in rows}


def solve_run(
    directory: RunDirectory, options: SolveOptions, folder: str | None = None
) -> Solution:
    """Solve a budget and write manifests and reports.

    Args:
        directory: A run whose scores are complete.
        options: Budget and constraints.
        folder: Folder to write to, relative to the run; default ``solutions/<name>``.

    Raises:
        InfeasibleBudgetError: With the reachable range.
        ConfigError: A constraint names something that does not exist.
        StoreError: Not a run, or its files are damaged.
    """
    state = RunState.open(directory)
    problem, scores = load_problem(state)
    problem = problem.timed(options.latency)
    name = solution_name(options) if folder is None else folder.rstrip("/")
    if problem.experts is not None and options.expert_groups is None:
        options = replace(options, expert_groups=problem.experts.scanned_as)
    allocation = solve_domains(state, problem, scores, options)
    return write_solution(state, problem, scores, options, allocation, name)


def write_solution(
    state: RunState,
    problem: Problem,
    scores: Scores,
    options: SolveOptions,
    allocation: Allocation,
    name: str,
    notes: Mapping[str, Any] | None = None,
) -> Solution:
    """Write an allocation's manifests and reports.

    Args:
        state: The run.
        problem: Its groups with their costs.
        scores: (group, format) -> nats per token.
        options: Budget and constraints that the allocation meets.
        allocation: What to write.
        name: Folder below ``solutions/``; '' for the run's own folder.
        notes: More keys of ``manifest.json``: how the allocation was chosen.
    """
    directory = state.directory
    formats = chosen_formats(problem, allocation)
    problem = served_problem(problem, options, formats)
    plan = state.values["plan"]
    is_imported = "imported_from" in state.values
    summary = solution_summary(problem, allocation, scores_are_nats=not is_imported)
    summary |= domain_summary(state, problem, scores, options, formats)
    config = quantization_config(problem, formats, plan)
    is_foreign = "imported_from" in (notes or {})
    certainty = None if is_foreign else certainty_of(state, problem, scores, options, formats)
    stability = None if certainty is None else certainty.to_json()
    manifest = build_manifest(state.values, options, summary, config, stability) | dict(notes or {})
    start = solution_folder(name)
    paths = {
        "manifest.parquet": directory.write_table(
            f"{start}manifest.parquet", "manifest", manifest_rows(problem, formats, scores, plan)
        ),
        "manifest.json": directory.write_json(f"{start}manifest.json", manifest),
    }
    paths |= write_reports(state, start)
    added = {
        group.name: group.cost(formats[group.name], "model")
        for group in problem.groups.values()
        if group.is_tied and formats[group.name] != NONE
    }
    return Solution(
        name=name,
        summary=summary,
        formats=formats,
        paths=paths,
        added_bytes=added,
        shards_used=describe_stopping(state.values),
        certainty=certainty,
    )


def certainty_of(
    state: RunState,
    problem: Problem,
    scores: Scores,
    options: SolveOptions,
    formats: dict[str, str],
) -> Certainty | None:
    """How sure an allocation is, from the sums that the run keeps for it.

    None for an imported run and for one of an earlier version: no shards to resample. None for the
    least loss of the worst domain, and where groups share a format (for an engine, or as experts of
    a cluster), too: no fast solver solves their resamples.
    """
    if (
        options.worst_domain
        or ties_of(problem, options)
        or not state.directory.exists("resampling.parquet")
    ):
        return None
    if options.domains:
        return assess_weighted(state, problem, options, formats)
    buckets = state.directory.read_table("resampling.parquet", "resampling")
    return assess_solution(problem, scores, options, formats, buckets)


def solution_name(options: SolveOptions) -> str:
    """``bits-4.50``, ``bytes-1500000``, with a short hash where there are more constraints."""
    parts = []
    if options.bits is not None:
        text = f"{options.bits:.2f}"
        parts.append(f"bits-{text if float(text) == options.bits else repr(options.bits)}")
    if options.bytes is not None:
        parts.append(f"bytes-{options.bytes}")
    rest: dict[str, Any] = {
        "bits_over": options.bits_over if options.bits is not None else "searched",
        "cost": options.cost if options.bits is not None else "storage",
        "max_formats": options.max_formats,
        "pins": sorted(options.pins.items()),
        "allow": sorted((pattern, list(formats)) for pattern, formats in options.allow.items()),
    }
    if options.kv_bytes_per_token is not None:
        parts.append(f"kv-{options.kv_bytes_per_token:g}")
    if options.worst_domain:
        parts.append("worst-domain")
    if options.domains:
        rest["domains"] = sorted((name, f"{w:.9g}") for name, w in options.domains.items())
    if options.latency is not None:
        parts += options.latency.name_parts
        rest["latency"] = options.latency.to_json()
    parts += [name for name in (options.engine, options.gpu) if name is not None]
    parts += [] if options.expert_groups is None else [f"experts-{options.expert_groups}"]
    if rest != {
        "bits_over": "searched",
        "cost": "storage",
        "max_formats": None,
        "pins": [],
        "allow": [],
    }:
        parts.append(hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:6])
    return "-".join(parts)


def group_sensitivities(directory: RunDirectory) -> list[tuple[str, float]]:
    """Searched groups with the largest score over the menu, most sensitive first."""
    table = directory.read_table("sensitivity.parquet", "sensitivity")
    largest: dict[str, float] = {}
    for row in table.select(["group", "score"]).to_pylist():
        largest[row["group"]] = max(row["score"], largest.get(row["group"], 0.0))
    return sorted(largest.items(), key=lambda item: -item[1])


def rewrite_reports(directory: RunDirectory) -> list[str]:
    """Write the reports of the run and of all its solutions again; returns their paths.

    Raises:
        StoreError: Not a run, or its files are damaged.
    """
    state = RunState.open(directory)
    starts = [solution_folder(name) for name in directory.list_folders(SOLUTIONS)]
    paths: list[str] = []
    for start in ["", *starts]:
        if directory.exists(f"{start}manifest.json"):
            paths.extend(write_reports(state, start).values())
    if not paths:
        raise StoreError(f"{directory.uri} has no solution yet; finish the scan first")
    return paths
