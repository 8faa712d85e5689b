"""The story of an evaluation: how much a solution of a finished run really loses.

Beside it stand other allocations within the same budget. :mod:`autoquant_ray.measurement` runs
them; here they are chosen, and what came out is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.candidates import Candidate, collect_candidates
from autoquant_ray.evaluation_config import EvaluationConfig
from autoquant_ray.evaluation_table import Measured, evaluation_rows
from autoquant_ray.measurement import Measurement, measuring
from autoquant_ray.report import write_reports
from autoquant_ray.state import RunState
from autoquant_ray.store import SOLUTIONS, RunDirectory

EVALUATION_FILE = "evaluation.parquet"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        rows: Of ``evaluation.parquet``, the solution first.
        left_out: Shards left out -> reason.
        paths: Files written.
    """

    rows: list[dict[str, Any]]
    left_out: dict[int, str]
    paths: dict[str, str]


def evaluate_run(config: EvaluationConfig) -> Evaluation:
    """Measure a solution of a run, and what it is compared with.

    Raises:
        AutoQuantError: One of its subclasses; finished parts are kept.
    """
    state = RunState.open(RunDirectory(config.run))
    start = f"{SOLUTIONS}/{config.solution}/" if config.solution else ""
    candidates = collect_candidates(state, start, config.against, num_random=config.num_random)
    with measuring(state, config) as measurement:
        measured = measurement.measure(candidates)
        return record(measurement, start, candidates, measured)


def record(
    measurement: Measurement,
    start: str,
    candidates: Sequence[Candidate],
    measured: Sequence[Measured],
) -> Evaluation:
    """Write ``evaluation.parquet`` and the solution's reports.

    Rows of this solution on this data are replaced, others stay.

    Args:
        measurement: What measured.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.
        candidates: The solution and its rivals.
        measured: The same, measured.
    """
    directory = measurement.state.directory
    labels = {
        "solution": start.removeprefix(f"{SOLUTIONS}/").rstrip("/"),
        "dataset": measurement.facts["name"],
        "data_key": measurement.data_key,
    }
    rows = evaluation_rows(candidates, measured, labels)
    before = []
    if directory.exists(EVALUATION_FILE):
        before = directory.read_table(EVALUATION_FILE, "evaluation").to_pylist()
    kept = [r for r in before if any(r[k] != labels[k] for k in ("solution", "data_key"))]
    path = directory.write_table(EVALUATION_FILE, "evaluation", [*kept, *rows])
    paths = {EVALUATION_FILE: path} | write_reports(measurement.state, start)
    return Evaluation(rows=rows, left_out=dict(measurement.left_out), paths=paths)
