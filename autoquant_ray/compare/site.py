"""What the history page says: all runs below a folder, by job, read from their files.

A run belongs to the nightly job whose history names it (``history.parquet``), or to its model. Its
churn is the share of groups whose format changed: against the run that the history names, or
against the run of the same model before it. Nothing is guessed: what a run does not have is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.allocate.losses import allocation_key
from autoquant_ray.errors import StoreError, one_line
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    EVALUATION_FILE,
    HISTORY_FILE,
    MANIFEST_JSON,
    MANIFEST_TABLE,
    REPORT_HTML,
    REPORT_MARKDOWN,
    RUN_FILE,
)
from autoquant_ray.runs.parts import map_ahead
from autoquant_ray.runs.record import RunRecord

_DEPTH = 3
"""How far below the folder runs are looked for."""

_STATUS_OF_HISTORY = {"done": "done", "quarantined": "quarantined", "infeasible": "infeasible"}


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run, or one night without a run.

    Attributes:
        name: Folder below the runs' folder; of a night that failed early there may be none.
        started: ISO time in UTC, '' where unknown; rows are sorted by their day and then by it.
        status: ``done``, ``quarantined`` (shards left out), ``failed``, ``infeasible``,
            ``unfinished`` or ``damaged``.
        problem: What went wrong, for people.
        verdict: Of the nightly comparison: ``baseline``, ``same``, ``noise`` or ``drift``.
        compared_with: Run that the churn is against.
        date: Day that the night is for (``nightly --date``); None for other runs.
        predicted_kl_nats: Nats per token.
        measured_kl_nats: Nats per token, of the run's own solution; of the data measured last.
        num_changed: Groups whose format changed.
        num_groups: Groups that have a format in either of the two runs.
        effective_bits: Stored bits per searched weight.
        weight_bytes: Of the whole model.
        seconds: All stages together.
        report: Name of the report below the runs' folder.
    """

    name: str
    model: str | None = None
    started: str = ""
    date: str | None = None
    status: str = "done"
    problem: str | None = None
    verdict: str | None = None
    compared_with: str | None = None
    predicted_kl_nats: float | None = None
    measured_kl_nats: float | None = None
    num_changed: int | None = None
    num_groups: int | None = None
    effective_bits: float | None = None
    weight_bytes: int | None = None
    seconds: float | None = None
    report: str | None = None

    @property
    def day(self) -> str:
        """``YYYY-MM-DD``; '' where unknown."""
        return self.date or self.started[:10]

    @property
    def churn(self) -> float | None:
        """Share of groups whose format changed, 0 to 1."""
        if self.num_changed is None or not self.num_groups:
            return None
        return self.num_changed / self.num_groups

    @property
    def needs_a_look(self) -> bool:
        """Whether its owner should look at it."""
        return self.status != "done" or self.verdict == "drift"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Runs that are compared with each other, oldest first.

    Attributes:
        name: Name of the nightly job, or of the model.
        is_nightly: Whether a history names it.
    """

    name: str
    is_nightly: bool
    rows: list[RunRow]


@dataclass(frozen=True, kw_only=True)
class _SiteRun:
    """A run's row with the formats of its groups, where it has any, and its model's fingerprint."""

    row: RunRow
    formats: Mapping[str, str]
    fingerprint: str | None = None


def collect_jobs(folder: RunDirectory) -> list[Job]:
    """All runs below a folder, nightly jobs first.

    Raises:
        StoreError: There are none, the folder is a run itself, or its history is damaged.
    """
    if folder.exists(RUN_FILE):
        raise StoreError(f"{folder.uri} is a run itself; give the folder that holds the runs")
    nights: list[dict[str, Any]] = []
    if folder.exists(HISTORY_FILE):
        nights = folder.read_table(HISTORY_FILE).to_pylist()
    names = list(_run_names(folder, ""))
    rows = map_ahead(lambda name: _read_run(folder, name), names)
    runs = {run.row.name: run for run in rows if run is not None}
    if not runs and not nights:
        folder.require_bucket()
        raise StoreError(f"{folder.uri} holds no run; give the folder that holds the runs")
    return _nightly_jobs(nights, runs) + _model_jobs(list(runs.values()))


def _run_names(folder: RunDirectory, start: str) -> Iterator[str]:
    """Folders that may be runs: those with a ``run.json``, none inside another."""
    for name in folder.list_folders(start):
        path = f"{start}/{name}".lstrip("/")
        if name.startswith("."):
            continue
        if folder.exists(f"{path}/{RUN_FILE}"):
            yield path
        elif path.count("/") < _DEPTH - 1:
            yield from _run_names(folder, path)


def _read_run(folder: RunDirectory, name: str) -> _SiteRun | None:
    """A run's row; None for another program's ``run.json``."""
    files = set(folder.list_files(name))
    report = next((f"{name}/{f}" for f in (REPORT_HTML, REPORT_MARKDOWN) if f in files), None)
    try:
        values = folder.read_json(f"{name}/{RUN_FILE}")
        if not isinstance(values, dict) or "schema_version" not in values:
            return None
        record = RunRecord.from_json(values, folder.path(f"{name}/{RUN_FILE}"))
        row = replace(_run_row(name, record), report=report)
        run = _SiteRun(row=row, formats={}, fingerprint=record.model.get("fingerprint"))
        if row.status not in ("done", "quarantined"):
            return run
        return _with_solution(folder, run, record.plan["unsearched"] if record.plan else ())
    except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:
        row = RunRow(name=name, status="damaged", problem=_explain(error), report=report)
        return _SiteRun(row=row, formats={})


def _run_row(name: str, record: RunRecord) -> RunRow:
    """A row from ``run.json`` alone."""
    stages, left_out = record.stages, record.quarantined
    is_done = record.is_imported or record.is_done("aggregate")
    if not is_done:
        running = [stage for stage, entry in stages.items() if entry.get("state") != "done"]
        where = f"in the stage {running[-1]!r}" if running else "between stages"
        status, problem = "unfinished", f"stopped, or still running, {where}"
    elif left_out:
        status = "quarantined"
        problem = f"{len(left_out)} shard(s) left out, the first: {left_out[0]['reason']}"
    else:
        status, problem = "done", None
    seconds = [entry["seconds"] for entry in stages.values() if "seconds" in entry]
    return RunRow(
        name=name,
        model=str(record.model["name"]),
        started=str(record.created),
        status=status,
        problem=problem,
        seconds=sum(seconds) if seconds else None,
    )


def _with_solution(folder: RunDirectory, run: _SiteRun, unsearched: Collection[str]) -> _SiteRun:
    """Add what the run's own budget gave."""
    row = run.row
    if not folder.exists(f"{row.name}/{MANIFEST_JSON}"):
        problem = "scored, but its budget was not solved; go on with --resume"
        return replace(run, row=replace(row, status="unfinished", problem=problem))
    solution = folder.read_json(f"{row.name}/{MANIFEST_JSON}")["solution"]
    table = folder.read_table(f"{row.name}/{MANIFEST_TABLE}")
    columns = (table.column(name).to_pylist() for name in ("group", "format"))
    formats = dict(zip(*columns, strict=True))
    row = replace(
        row,
        predicted_kl_nats=solution["predicted_kl_nats"],
        measured_kl_nats=_measured(
            folder, row.name, {name: f for name, f in formats.items() if name not in unsearched}
        ),
        effective_bits=solution["effective_bits"],
        weight_bytes=round(solution["weight_bytes"]),
    )
    return replace(run, row=row, formats=formats)


def _measured(folder: RunDirectory, name: str, formats: Mapping[str, str]) -> float | None:
    """The newest measured loss of the run's own solution; None where none is finite."""
    if not folder.exists(f"{name}/{EVALUATION_FILE}"):
        return None
    of = {"solution": "", "name": "solution", "allocation": allocation_key(formats)}
    rows = folder.read_table(f"{name}/{EVALUATION_FILE}").to_pylist()
    losses = [row["kl_mean"] for row in rows if all(row[key] == of[key] for key in of)]
    return losses[-1] if losses and math.isfinite(losses[-1]) else None


def _nightly_jobs(nights: list[dict[str, Any]], runs: dict[str, _SiteRun]) -> list[Job]:
    """Jobs of the history; takes their runs out of ``runs``."""
    jobs = []
    for job in sorted({night["job"] for night in nights}):
        nights_of_job = [night for night in nights if night["job"] == job]
        names = {night["run"] for night in nights_of_job}
        runs_of_job = {
            name: run for name, run in runs.items() if name in names or _is_night(name, job)
        }
        sizes = {len(run.formats) for run in runs_of_job.values() if run.formats}
        size = sizes.pop() if len(sizes) == 1 else None  # runs that were deleted had it too
        rows = [_night_row(night, runs_of_job.get(night["run"]), size) for night in nights_of_job]
        rows += [
            replace(run.row, date=name.removeprefix(f"{job}-"))
            for name, run in runs_of_job.items()
            if name not in names
        ]
        for name in runs_of_job:
            del runs[name]
        jobs.append(Job(name=job, is_nightly=True, rows=sorted(rows, key=_age)))
    return jobs


def _night_row(night: dict[str, Any], run: _SiteRun | None, num_groups: int | None) -> RunRow:
    status = _STATUS_OF_HISTORY.get(night["status"], "failed")
    row = run.row if run is not None else RunRow(name=night["run"])
    problem = night["error"] or (row.problem if status == "quarantined" else None)
    if problem is None and status != "done":
        problem = f"exit code {night['exit_code']}"
    return replace(
        row,
        started=night["started"] or night["date"],
        date=night["date"],
        status=status,
        problem=problem,
        verdict=night["verdict"],
        compared_with=night["baseline"],
        predicted_kl_nats=night["predicted_kl_nats"],
        num_changed=night["num_changed"],
        num_groups=num_groups,
        effective_bits=night["effective_bits"],
        weight_bytes=night["weight_bytes"],
        seconds=night["seconds"],
    )


def _model_jobs(runs: list[_SiteRun]) -> list[Job]:
    """The other runs by model, each compared with its predecessor.

    Runs are of one model where its name is the same, or its fingerprint under another name.
    """
    by_model: dict[str, list[_SiteRun]] = {}
    name_of: dict[str, str] = {}  # fingerprint -> name of the job
    for run in sorted(runs, key=lambda run: _age(run.row)):
        model = run.row.model or "unknown model"
        if run.fingerprint is not None and model not in by_model:
            model = name_of.get(run.fingerprint, model)
        if run.fingerprint is not None:
            name_of.setdefault(run.fingerprint, model)
        by_model.setdefault(model, []).append(run)
    jobs = []
    for model, runs_of_model in sorted(by_model.items()):
        rows, before = [], None
        for run in runs_of_model:
            rows.append(run.row if before is None else _with_churn(run, before))
            before = run if run.formats else before
        jobs.append(Job(name=model, is_nightly=False, rows=rows))
    return jobs


def _with_churn(run: _SiteRun, before: _SiteRun) -> RunRow:
    if not run.formats:
        return run.row
    groups = run.formats.keys() | before.formats.keys()
    changed = [group for group in groups if run.formats.get(group) != before.formats.get(group)]
    return replace(
        run.row,
        compared_with=before.row.name,
        num_changed=len(changed),
        num_groups=len(groups),
    )


def _is_night(run: str, job: str) -> bool:
    """Whether a run without a row in the history has the name of one of the job's nights."""
    return re.fullmatch(re.escape(job) + r"-\d{4}-\d\d-\d\d", run) is not None


def _age(row: RunRow) -> tuple[str, str, str]:
    return row.day, row.started, row.name


def _explain(error: BaseException) -> str:
    return one_line(error) if isinstance(error, StoreError) else f"unreadable: {error!r}"
