"""Everything that a report is made from, read once from a run's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.allocate.certainty.total_error import TotalError, total_error
from autoquant_ray.allocate.losses import allocation_key, uniform_format
from autoquant_ray.allocate.read import ScoredRun, is_chosen_by_measurement, options_of
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import StoreError
from autoquant_ray.formats.kv_cache import is_described
from autoquant_ray.plan.silent_experts import experts_with_few_tokens, silent_experts
from autoquant_ray.report.domains import is_by_domain
from autoquant_ray.report.evidence import ChosenFormat, Evidence
from autoquant_ray.report.measured import measured_rows
from autoquant_ray.report.remedies import remedies
from autoquant_ray.runs.directory import KEYS
from autoquant_ray.runs.names import (
    EVALUATION_FILE,
    MANIFEST_JSON,
    MANIFEST_TABLE,
    RESAMPLING_FILE,
    TASKS_FILE,
    solution_of,
)
from autoquant_ray.runs.record import RunRecord
from autoquant_ray.runs.table_rows import TableRows
from autoquant_ray.serving.kv_cache import cache_problem
from autoquant_ray.serving.menus import formats_of, why_unserved

ScoresWithErrors = dict[str, dict[str, tuple[float, float | None]]]
"""Group -> format -> (score, standard error or None)."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """One solution with the run that it belongs to.

    Attributes:
        scored: The run.
        name: Of the solution; '' for the scan's own.
        manifest: Content of its ``manifest.json``.
        rows: Rows of its ``manifest.parquet``.
        scores: The run's scores by group and format.
        formats: Searched group -> chosen format.
        error: Of the predicted KL; None where unknown.
        evaluations: Rows of ``evaluation.parquet``, of all solutions.
        answered: Rows of ``tasks.parquet``, of all solutions.
    """

    scored: ScoredRun
    name: str
    manifest: dict[str, Any]
    rows: TableRows
    scores: ScoresWithErrors
    formats: dict[str, str]
    error: TotalError | None
    evaluations: list[dict[str, Any]]
    answered: list[dict[str, Any]]

    @property
    def run(self) -> RunRecord:
        """Content of ``run.json``."""
        return self.scored.state.record

    @property
    def run_path(self) -> str:
        """Where the run is, as its scan was told; an imported run's directory."""
        config = self.run.config
        return str(config["out"]) if config else self.scored.state.directory.uri

    @property
    def predicted(self) -> float:
        """Loss over all tokens, whatever was made least; without a unit if it was imported."""
        solution = self.manifest["solution"]
        nats = solution["predicted_kl_nats"]
        return float(solution["score"] if nats is None else nats)

    @property
    def is_by_domain(self) -> bool:
        """Whether it was made for domains rather than for all tokens alike."""
        return is_by_domain(self.manifest["budget"])

    @property
    def is_by_measurement(self) -> bool:
        """Whether measured losses chose it."""
        return is_chosen_by_measurement(self.manifest)

    @property
    def key(self) -> str:
        """Digest of the formats; measurements of others do not count."""
        return allocation_key(self.formats)

    @property
    def measured(self) -> list[list[dict[str, Any]]]:
        """This solution's row and its rivals' rows, per data set that it was measured on."""
        return measured_rows(self.evaluations, self.name, self.key)


def read_sources(scored: ScoredRun, start: str) -> Sources:
    """Read a solution of a run.

    Args:
        scored: The run.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.

    Raises:
        StoreError: A file is missing or damaged.
    """
    directory = scored.state.directory
    manifest = directory.read_json(f"{start}{MANIFEST_JSON}")
    if not isinstance(manifest, dict) or not {"solution", "budget"} <= set(manifest):
        name = directory.path(f"{start}{MANIFEST_JSON}")
        raise StoreError(f"{name} is damaged: it lacks solution or budget; solve the budget again")
    rows = directory.read_rows(f"{start}{MANIFEST_TABLE}")
    scores: ScoresWithErrors = {}
    for (group, format_), score in scored.scores.items():
        scores.setdefault(group, {})[format_] = (score, scored.errors[group, format_])
    unsearched = scored.state.plan["unsearched"]
    formats = {row["group"]: row["format"] for row in rows if row["group"] not in unsearched}

    def optional(name: str, encoded: Sequence[str] = ()) -> Any:
        return directory.read_table(name, encoded=encoded) if directory.exists(name) else None

    evaluations, answered = optional(EVALUATION_FILE), optional(TASKS_FILE)
    return Sources(
        scored=scored,
        name=solution_of(start),
        manifest=manifest,
        rows=rows,
        scores=scores,
        formats=formats,
        error=total_error(formats, scored.rows, optional(RESAMPLING_FILE, KEYS)),
        evaluations=[] if evaluations is None else evaluations.to_pylist(),
        answered=[] if answered is None else answered.to_pylist(),
    )


def _unserved(sources: Sources) -> str | None:
    """Why no engine serves the plan; None too where the formats are only names (imported)."""
    plan, budget = sources.scored.state.plan, sources.manifest["budget"]
    if not all(map(is_described, plan["formats"])):
        return None
    problem, chosen = sources.scored.problem, sources.formats
    groups = {name: g.module_names for name, g in problem.groups.items() if not g.is_cache}
    engine, gpu = budget.get("engine"), budget.get("gpu")
    weights = {name: format_ for name, format_ in chosen.items() if name in groups}
    reason = why_unserved(
        groups, weights, formats_of(plan), engine, gpu, plan.get("checkpoint_limits")
    )
    cache = cache_problem([group.name for group in problem.caches], chosen, engine, gpu)
    return reason or (None if cache is None else f"{cache[0].upper()}{cache[1:]}.")


def gather_evidence(sources: Sources) -> Evidence:
    """What is known for and against the plan."""
    solution = sources.manifest["solution"]
    stability = sources.manifest.get("stability") or {}
    config, rows = sources.run.config, sources.scored.rows
    chosen = (
        ChosenFormat(group=group, format=format_, score=entry[0], stderr=entry[1])
        for group, format_ in sources.formats.items()
        if (entry := sources.scores.get(group, {}).get(format_)) is not None
    )
    error = sources.error
    default = ScanConfig.model_fields["min_expert_tokens"].default
    min_tokens = (config or {}).get("min_expert_tokens", default)
    return Evidence(
        predicted=sources.predicted,
        stderr=None if error is None or error.is_bound else error.stderr,
        effective_bits=solution["effective_bits"],
        choices=[choice for choice in chosen if choice.score > 0],
        uniform=uniform_format(sources.scored.problem, sources.formats),
        is_satisfied=solution["is_satisfied"],
        num_shards=rows[0]["num_shards"] if config and rows else None,
        quarantined=sources.run.quarantined,
        labels=config["labels"] if config else None,
        measured=sources.measured,
        coin_tosses=stability.get("coin_tosses", ()),
        expected_regret=stability.get("expected_regret"),
        null=stability.get("null_score"),
        objective=solution["score"] if sources.is_by_domain else None,
        by_domain=sources.is_by_domain,
        unserved=_unserved(sources),
        by_measurement=sources.is_by_measurement,
        silent_experts=silent_experts(sources.scored.state.plan),
        few_tokens=experts_with_few_tokens(rows, min_tokens),
        min_expert_tokens=min_tokens,
        remedies=remedies(
            sources.run_path, sources.name, options_of(sources.manifest), sources.run.config
        ),
    )
