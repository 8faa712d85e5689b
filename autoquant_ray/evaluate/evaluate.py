"""The story of an evaluation: how much a solution of a finished run really loses.

Beside it stand other allocations within the same budget. :mod:`autoquant_ray.evaluate.measurement`
runs them; here they are chosen, and what came out is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.allocate.candidate import SOLUTION, Candidate
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.audit import Audit, audit_solution
from autoquant_ray.evaluate.chosen_on import untouched_shards
from autoquant_ray.evaluate.measurement import Measurement, measuring
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.table import Measured, evaluation_rows
from autoquant_ray.report import write_reports
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import AUDIT_FILE, EVALUATION_FILE, solution_folder, solution_of
from autoquant_ray.runs.state import RunState


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        rows: Of ``evaluation.parquet``, the solution first.
        left_out: Shards left out -> reason.
        paths: Files written.
        audit: What an audit found before; the solution is then the audited one.
    """

    rows: list[dict[str, Any]]
    left_out: dict[int, str]
    paths: dict[str, str]
    audit: Audit | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        audit = {} if self.audit is None else {"audit": self.audit.to_json()}
        return {"rows": self.rows, "paths": self.paths} | audit


def evaluate_run(config: EvaluationConfig) -> Evaluation:
    """Measure a solution of a run, and what it is compared with.

    With ``config.audit`` the solution is audited first; measured are then the audited plan, the
    plan as it was, and their rivals, on data that has not chosen the audited one.

    Raises:
        AutoQuantError: One of its subclasses; finished parts are kept.
    """
    state = RunState.open(RunDirectory(config.run))
    start = solution_folder(config.solution)
    candidates = collect_candidates(state, start, config.against, num_random=config.num_random)
    with measuring(state, config) as measurement:
        if config.audit is None:
            measured = measurement.measure(candidates, untouched_shards(measurement, start))
            return record(measurement, start, candidates, measured)
        untouched_shards(measurement, start)
        audit = audit_solution(measurement, start, config)
        plans = collect_candidates(state, audit.start, config.against, num_random=config.num_random)
        plans.insert(1, audit.before)
        measured = measurement.measure(plans, untouched_shards(measurement, audit.start))
        found = record(measurement, audit.start, plans, measured)
        return replace(found, audit=audit, paths={AUDIT_FILE: audit.path} | found.paths)


def record(
    measurement: Measurement,
    start: str,
    candidates: Sequence[Candidate],
    measured: Sequence[Measured],
) -> Evaluation:
    """Write ``evaluation.parquet`` and the solution's reports.

    Rows of this solution on this data are replaced, and those of another allocation that had its
    name; others stay.

    Args:
        measurement: What measured.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.
        candidates: The solution and its rivals.
        measured: The same, measured.
    """
    directory = measurement.state.directory
    measurement.require_lease()
    labels = {
        "solution": solution_of(start),
        "dataset": measurement.facts["name"],
        "data_key": measurement.data_key,
    }
    rows = evaluation_rows(candidates, measured, labels)
    before = []
    if directory.exists(EVALUATION_FILE):
        before = directory.read_table(EVALUATION_FILE, "evaluation").to_pylist()
    stale = {
        row["data_key"]
        for row in before
        if (row["solution"], row["name"]) == (labels["solution"], SOLUTION)
        and row["allocation"] != rows[0]["allocation"]
    } | {labels["data_key"]}
    kept = [r for r in before if r["solution"] != labels["solution"] or r["data_key"] not in stale]
    path = directory.write_table(EVALUATION_FILE, "evaluation", [*kept, *rows])
    paths = {EVALUATION_FILE: path} | write_reports(measurement.state, start)
    return Evaluation(rows=rows, left_out=dict(measurement.left_out), paths=paths)
