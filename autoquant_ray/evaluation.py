"""The story of an evaluation: how much a solution of a finished run really loses.

Beside it stand other allocations within the same budget. :mod:`autoquant_ray.measurement` runs
them; here they are chosen, and what came out is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.candidates import SOLUTION, Candidate, collect_candidates
from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluation_config import EvaluationConfig
from autoquant_ray.evaluation_table import Measured, evaluation_rows
from autoquant_ray.measurement import Measurement, measuring
from autoquant_ray.plan_search import split_shards
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
        measured = measurement.measure(candidates, untouched_shards(measurement, start))
        return record(measurement, start, candidates, measured)


def untouched_shards(measurement: Measurement, start: str) -> list[int] | None:
    """Shards that played no part in choosing a refined solution; None for all.

    Args:
        measurement: The data.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.

    Raises:
        ConfigError: It was refined on another part of the same data, so that this cannot be told.
    """
    refinement = measurement.state.directory.read_json(f"{start}manifest.json").get("refinement")
    if refinement is None or refinement["source"] != measurement.facts["source"]:
        return None
    if refinement["data_key"] != measurement.data_key:
        raise ConfigError(
            f"{start.rstrip('/')} was refined on this data cut in another way; use the --samples "
            "and --seq-len of its refinement, so that only what chose nothing is measured, or "
            "other data with --data"
        )
    return split_shards(measurement.facts["num_shards"])[2]


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
        "solution": start.removeprefix(f"{SOLUTIONS}/").rstrip("/"),
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
