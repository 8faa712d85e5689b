"""Evaluates a solution of a finished run: how much it really loses on held-out data.

The solution is compared with other allocations within the same budget. This module chooses them and
writes the results; :mod:`autoquant_ray.evaluate.measurement` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from autoquant_ray.allocate.candidate import SOLUTION, UNQUANTIZED, Candidate, make_candidate
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.audit import Audit, audit_solution
from autoquant_ray.evaluate.chosen_on import untouched_shards
from autoquant_ray.evaluate.measurement import Measurement, measuring
from autoquant_ray.evaluate.rivals import MODELOPT_SHAPLEY, collect_candidates
from autoquant_ray.evaluate.shapley import require_shapley, shapley_scores
from autoquant_ray.evaluate.table import Measured, evaluation_rows
from autoquant_ray.evaluate.tasks.suite import Suite, load_suite
from autoquant_ray.evaluate.tasks.table import task_rows
from autoquant_ray.formats.format import NONE
from autoquant_ray.notebook import lines_html, table_html
from autoquant_ray.report import write_reports
from autoquant_ray.report.measured import HEADS, measured_sections
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    AUDIT_FILE,
    EVALUATION_FILE,
    TASKS_FILE,
    solution_folder,
    solution_of,
)
from autoquant_ray.runs.state import RunState
from autoquant_ray.tracking.mlflow_runs import log_measurements
from autoquant_ray.wording import with_error


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """A finished evaluation.

    Attributes:
        rows: Rows of ``evaluation.parquet``, the solution first.
        left_out: Shards left out -> reason.
        paths: Files written.
        grave: Reasons why the solution should not be used as it is, one line each.
        audit: The audit, if there was one; the evaluated solution is then the audited one.
        tasks: Rows of ``tasks.parquet`` of this evaluation.
    """

    rows: list[dict[str, Any]]
    left_out: dict[int, str]
    paths: dict[str, str]
    grave: list[str]
    audit: Audit | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        audit = {} if self.audit is None else {"audit": self.audit.to_json()}
        tasks = {"tasks": self.tasks} if self.tasks else {}
        return {"rows": self.rows, "paths": self.paths} | audit | tasks

    def __repr__(self) -> str:
        """The solution's measured loss; rows of many columns would hide it."""
        first = self.rows[0]
        loss = with_error(first["kl_mean"], first["kl_stderr"])
        return (
            f"Evaluation(measured KL {loss}, predicted {first['predicted_kl']:.4g}, "
            f"{len(self.rows)} allocations on {first['dataset']!r})"
        )

    def _repr_html_(self) -> str:
        first = self.rows[0]
        (section,) = measured_sections(self.rows, first["solution"], first["allocation"])
        return lines_html([section.title, section.verdict]) + table_html(HEADS, section.rows)


def evaluate_run(config: EvaluationConfig) -> Evaluation:
    """Measure a solution of a run and its rivals.

    With ``config.audit`` the solution is audited first. Then the audited solution, the original and
    their rivals are measured, on data that played no part in the audit.

    Raises:
        AutoQuantError: One of its subclasses; finished parts are kept.
    """
    state = RunState.open(RunDirectory(config.run))
    if MODELOPT_SHAPLEY in config.against:
        require_shapley(state)
    suite = None
    if config.tasks:
        suite = load_suite(config.tasks, config.tasks_dir, config.task_limit)
    run = ScoredRun.read(state)
    folder = solution_folder(config.solution)
    collect = partial(collect_candidates, run, against=config.against, num_random=config.num_random)
    candidates = collect(folder)
    with measuring(state, config) as measurement:
        if MODELOPT_SHAPLEY in config.against:
            collect = partial(collect, shapley=shapley_scores(run, measurement))
            candidates = collect(folder)
        if config.audit is None:
            measured = measurement.measure(candidates, untouched_shards(measurement, folder))
            tasks = ask(run, measurement, folder, candidates, suite)
            return record(run, measurement, folder, candidates, measured, tasks)
        untouched_shards(measurement, folder)
        audit = audit_solution(run, measurement, folder, config)
        candidates = collect(audit.folder)
        candidates.insert(1, audit.before)
        measured = measurement.measure(candidates, untouched_shards(measurement, audit.folder))
        tasks = ask(run, measurement, audit.folder, candidates, suite)
        evaluation = record(run, measurement, audit.folder, candidates, measured, tasks)
        paths = {AUDIT_FILE: audit.path} | evaluation.paths
        return replace(evaluation, audit=audit, paths=paths)


def ask(
    run: ScoredRun,
    measurement: Measurement,
    folder: str,
    candidates: Sequence[Candidate],
    suite: Suite | None,
) -> list[dict[str, Any]]:
    """Rows of ``tasks.parquet``: the model in 16 bits, then allocations but shuffled ones.

    Args:
        run: The run.
        measurement: Runs the model.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.
        candidates: The solution and its rivals.
        suite: The tasks; None: there are no rows.
    """
    if suite is None:
        return []
    nothing = dict.fromkeys(candidates[0].formats, NONE)
    asked = [make_candidate(run.problem, run.scores, UNQUANTIZED, nothing)]
    asked += [candidate for candidate in candidates if not candidate.name.startswith("random ")]
    scores = [suite.scores(partial(measurement.answer, candidate)) for candidate in asked]
    return task_rows(asked, scores, solution_of(folder))


def record(
    run: ScoredRun,
    measurement: Measurement,
    folder: str,
    candidates: Sequence[Candidate],
    measured: Sequence[Measured],
    tasks: Sequence[dict[str, Any]] = (),
) -> Evaluation:
    """Write ``evaluation.parquet``, ``tasks.parquet`` where there are any, and reports.

    Replaces the rows of this solution on this data, and those of an earlier allocation under the
    same name; keeps all others.

    Args:
        run: The run.
        measurement: The data.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.
        candidates: The solution and its rivals.
        measured: What each of them loses.
        tasks: Rows of ``tasks.parquet``.
    """
    directory = measurement.state.directory
    measurement.require_lease()
    labels = {
        "solution": solution_of(folder),
        "dataset": measurement.facts["name"],
        "data_key": measurement.data_key,
    }
    rows = evaluation_rows(candidates, measured, labels)
    before = []
    if directory.exists(EVALUATION_FILE):
        before = directory.read_table(EVALUATION_FILE).to_pylist()
    stale = {
        row["data_key"]
        for row in before
        if (row["solution"], row["name"]) == (labels["solution"], SOLUTION)
        and row["allocation"] != rows[0]["allocation"]
    } | {labels["data_key"]}
    kept = [r for r in before if r["solution"] != labels["solution"] or r["data_key"] not in stale]
    with directory.together():
        paths = {EVALUATION_FILE: directory.write_table(EVALUATION_FILE, [*kept, *rows])}
        if tasks:
            paths[TASKS_FILE] = _write_tasks(directory, tasks)
        reports = write_reports(run, folder)
    log_measurements(directory, measurement.state.record, labels["solution"], rows, tasks)
    return Evaluation(
        rows=rows,
        left_out=dict(measurement.left_out),
        paths=paths | reports.paths,
        grave=reports.grave,
        tasks=list(tasks),
    )


def _write_tasks(directory: RunDirectory, rows: Sequence[dict[str, Any]]) -> str:
    """Replace a solution's rows of the same tasks, and those of an earlier allocation."""
    before = directory.read_table(TASKS_FILE).to_pylist() if directory.exists(TASKS_FILE) else []
    (solution,) = {row["solution"] for row in rows}
    (allocation,) = {row["allocation"] for row in rows if row["name"] == SOLUTION}
    stale = {row["task"] for row in rows} | {
        row["task"]
        for row in before
        if (row["solution"], row["name"]) == (solution, SOLUTION)
        and row["allocation"] != allocation
    }
    kept = [row for row in before if row["solution"] != solution or row["task"] not in stale]
    return directory.write_table(TASKS_FILE, [*kept, *rows])
