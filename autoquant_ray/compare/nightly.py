"""One night of a nightly job: scan, compare with the last good run, tell, tidy up.

A night is a run directory named after the job and the UTC date. Started again on the same day, a
night goes on where it stopped, or shows what it found. Two that overlap do not meet: the second
says who is at work and leaves.

Who scans is the caller's choice, so that this module needs neither torch nor Ray.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from autoquant_ray.compare.drift import render_baseline, render_drift
from autoquant_ray.compare.history import (
    LOCKS,
    put_row,
    read_history,
    require_runs_folder,
    run_folder,
)
from autoquant_ray.compare.nights import Nights, is_finished, is_good
from autoquant_ray.compare.run_changes import is_same_place
from autoquant_ray.compare.runs import compare_runs, run_facts
from autoquant_ray.compare.verdict import Comparison
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import changed_fields
from autoquant_ray.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NEEDS_A_LOOK,
    AutoQuantError,
    ChangedError,
    HeldError,
    InfeasibleBudgetError,
    StoreError,
    one_line,
)
from autoquant_ray.jobs.file import NightlyJob
from autoquant_ray.jobs.names import parse_date
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import Lease, brief_lease, lease
from autoquant_ray.runs.names import DRIFT_JSON, DRIFT_MARKDOWN
from autoquant_ray.runs.state import Mode, RunState
from autoquant_ray.tracking.mlflow_runs import log_night

logger = logging.getLogger(__name__)

_PLACES = ("model", "data")  # fields whose values name files

Scan = Callable[[ScanConfig, Mode], object]


@dataclass(frozen=True, kw_only=True)
class Night:
    """What a night came to.

    Attributes:
        exit_code: 0, or 3 where somebody should look.
        document: Content of ``drift.json``; where another process is at work, who.
        lines: For people.
    """

    exit_code: int
    document: dict[str, Any]
    lines: list[str]


@dataclass(kw_only=True)
class _Tonight:
    """A night that is going on."""

    job: NightlyJob
    date: str
    folder: RunDirectory
    nights: Nights
    started: str = field(default_factory=lambda: _utc_now())
    baseline: str | None = None
    is_shown: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.nights.name(self.date)

    @property
    def directory(self) -> RunDirectory:
        return run_folder(self.folder, self.name)


def run_night(
    job: NightlyJob, runs: str, scan: Scan, *, keep: int | None = None, date: str | None = None
) -> Night:
    """Run, go on with, or show the night of a day.

    Args:
        job: What to scan, and with what to compare it.
        runs: Folder of the runs.
        scan: :func:`~autoquant_ray.scan.run_search`.
        keep: Runs to keep instead of the job's own number.
        date: ``YYYY-MM-DD`` instead of today's UTC date.

    Raises:
        AutoQuantError: The scan's own, noted in the history too; wrong input.
    """
    day = parse_date(date)
    job.require_secrets(os.environ)
    folder = RunDirectory(runs)
    require_runs_folder(folder)
    nights = Nights(folder, job.name)
    with ExitStack() as stack:
        stack.callback(folder.delete_if_empty, LOCKS)
        try:
            held = stack.enter_context(lease(folder, f"{LOCKS}/{job.name}"))
        except HeldError as error:
            document = {"job": job.name, "date": day, "status": "held", "holder": str(error)}
            line = f"{job.name} of {day} is at work elsewhere, nothing to do: {error}"
            return Night(exit_code=EXIT_DONE, document=document, lines=[line])
        tonight = _Tonight(job=job, date=day, folder=folder, nights=nights)
        night = _spend(tonight, scan, held)
        protected = {name for name in (job.baseline, tonight.baseline, tonight.name) if name}
        protected |= _baselines_of_others(folder, job.name)
        deleted = nights.retire(keep or job.keep, protected)
        night.lines.extend(
            f"deleted {name}, beyond the {keep or job.keep} kept" for name in deleted
        )
    return night


def _baselines_of_others(folder: RunDirectory, job: str) -> set[str]:
    """Runs with which the last nights of other jobs were compared: a job may name any run."""
    last = {row["job"]: row["baseline"] for row in read_history(folder) if row["job"] != job}
    return {name for name in last.values() if name}


def _spend(tonight: _Tonight, scan: Scan, held: Lease) -> Night:
    """Scan, compare, and write down what came of it."""
    with _failures_noted(tonight):
        tonight.baseline = tonight.nights.baseline(tonight.job.baseline, tonight.date)
        _note_unfinished(tonight)
        _scan(tonight, scan)
        held.require()
        comparison = None
        if tonight.baseline is not None:
            before = run_folder(tonight.folder, tonight.baseline)
            comparison = compare_runs(before, tonight.directory, tonight.job.significance)
        return _write(tonight, comparison)


def _scan(tonight: _Tonight, scan: Scan) -> None:
    """Finish the night's run, unless it is finished; a run with quarantined shards is not."""
    directory = tonight.directory
    config = tonight.job.config(out=directory.uri)
    if is_good(directory):
        tonight.is_shown = True
        before = RunState.open(directory).config
        same = {n: before[n] for n in _PLACES if is_same_place(before[n], getattr(config, n))}
        changes = changed_fields(before, config.model_copy(update=same))
        changes = [change for change in changes if not change.endswith(" -> auto")]
        if changes:
            tonight.notes.append(
                f"The job changed since this night was scanned ({changes[0]}); the next night uses "
                "the new values."
            )
        logger.info("%s is finished; it is shown, not scanned again", tonight.name)
        return
    try:
        scan(config, "resume")
    except ChangedError as error:
        if tonight.date != parse_date(None) or is_finished(directory):
            raise  # an old or a finished night is not replaced by what the job is now
        logger.warning("%s is started again from nothing: %s", tonight.name, error)
        tonight.notes.append(
            f"An unfinished run of this night was deleted and started again from nothing: {error}."
        )
        scan(config, "overwrite")


def _write(tonight: _Tonight, comparison: Comparison | None) -> Night:
    """``drift.json``, ``drift.md`` and the history's row."""
    directory = tonight.directory
    quarantined = RunState.open(directory).record.quarantined
    status = "quarantined" if quarantined else "done"
    verdict = "baseline" if comparison is None else comparison.verdict
    needs_a_look = verdict == "drift" or bool(quarantined)
    exit_code = EXIT_NEEDS_A_LOOK if needs_a_look else EXIT_DONE
    tonight.notes.extend(
        f"Shard {entry['shard']} was left out in the stage {entry['stage']}: {entry['reason']}. "
        "Started again today, the job tries it once more."
        for entry in quarantined
    )
    facts = run_facts(directory) if comparison is None else comparison.after
    subject = f"{tonight.job.name}, {tonight.date}"
    if comparison is None:
        text = render_baseline(facts, tonight.notes, subject)
    else:
        text = render_drift(comparison, tonight.notes, f"{subject} against {tonight.baseline}")
    document = {
        "job": tonight.job.name,
        "run": tonight.name,
        "date": tonight.date,
        "status": status,
        "verdict": verdict,
        "baseline": tonight.baseline,
        "exit_code": exit_code,
        "notes": tonight.notes,
        "comparison": None if comparison is None else comparison.to_json(),
    }
    with brief_lease(directory), directory.together():
        directory.write_json(DRIFT_JSON, document)
        path = directory.write_text(DRIFT_MARKDOWN, text)
    row = _row(tonight, status, exit_code) | {"verdict": verdict, "baseline": tonight.baseline}
    row |= _numbers(facts, comparison)
    put_row(tonight.folder, row)
    log_night(directory, RunState.open(directory).record, row)
    return Night(exit_code=exit_code, document=document, lines=[text.rstrip(), "", path])


def _numbers(facts: dict[str, Any], comparison: Comparison | None) -> dict[str, Any]:
    """The history's columns that come from the run and the comparison."""
    numbers = {
        "predicted_kl_nats": facts["predicted_kl_nats"],
        "effective_bits": facts["effective_bits"],
        "weight_bytes": round(facts["weight_bytes"]),
        "num_shards": facts["num_shards"],
    }
    if comparison is not None:
        correlations = [value for value in comparison.spearman.values() if value is not None]
        numbers |= {
            "num_changed": len(comparison.format_changes),
            "num_moved": len(comparison.moved),
            "min_spearman": min(correlations, default=None),
        }
    return numbers


def _row(
    tonight: _Tonight, status: str, exit_code: int, error: str | None = None
) -> dict[str, Any]:
    """A row of the history without numbers; a night that is only shown keeps its end."""
    run_id, seconds, started, finished = "", None, tonight.started, _utc_now()
    with suppress(StoreError):  # without a run, or with a damaged one, the night still has its row
        record = RunState.open(tonight.directory).record
        run_id, started = record.run_id, record.created or started
        seconds = sum(stage.get("seconds", 0) for stage in record.stages.values())
    if tonight.is_shown:
        rows = [row for row in read_history(tonight.folder) if row["run"] == tonight.name]
        finished = rows[0]["finished"] if rows else finished
    return {
        "job": tonight.job.name,
        "run": tonight.name,
        "run_id": run_id,
        "date": tonight.date,
        "started": started,
        "finished": finished,
        "status": status,
        "seconds": seconds,
        "exit_code": exit_code,
        "error": error,
    }


@contextmanager
def _failures_noted(tonight: _Tonight) -> Iterator[None]:
    """Give a failed night its row. One that is interrupted, or that another has taken, has none."""
    try:
        yield
    except HeldError:
        raise
    except Exception as error:
        is_ours = isinstance(error, AutoQuantError)
        exit_code = error.exit_code if isinstance(error, AutoQuantError) else EXIT_FAILED
        status = "infeasible" if isinstance(error, InfeasibleBudgetError) else "failed"
        text = one_line(error) if is_ours else f"{type(error).__name__}: {one_line(error)}"
        put_row(tonight.folder, _row(tonight, status, exit_code, text))
        raise


def _note_unfinished(tonight: _Tonight) -> None:
    """Say which earlier nights never ended, and give them a row if they have none."""
    in_history = {row["run"] for row in read_history(tonight.folder)}
    for name in tonight.nights.before(tonight.date):
        directory = run_folder(tonight.folder, name)
        if is_finished(directory):
            continue
        date = tonight.nights.date(name)
        tonight.notes.append(f"{name} never finished; go on with it with --date {date}.")
        if name not in in_history:
            earlier = _Tonight(
                job=tonight.job, date=date, folder=tonight.folder, nights=tonight.nights
            )
            put_row(tonight.folder, _row(earlier, "failed", EXIT_FAILED, "never finished"))


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
