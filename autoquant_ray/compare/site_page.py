"""The history page: the runs of all jobs, their trends, and what needs a look."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from autoquant_ray.compare.site import Job, RunRow, collect_jobs
from autoquant_ray.compare.site_charts import Chart, Point, make_chart
from autoquant_ray.errors import StoreError
from autoquant_ray.report.charts.frontier_chart import size_unit
from autoquant_ray.report.page import render_page
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import last_part

PAGE = "index.html"
_MARKER = '<meta name="generator" content="autoquant-ray site">'
_WIDTHS = {"wide": 560, "narrow": 340}
"""Pixels of a chart on a screen and on a phone; text has the same size in both."""

_NO_VALUE = "\N{EN DASH}"
_STATUS_TEXT = {
    "done": "Done",
    "quarantined": "Quarantined",
    "failed": "Failed",
    "infeasible": "Infeasible",
    "unfinished": "Unfinished",
    "damaged": "Damaged",
}


def write_site(folder: RunDirectory, out: str | None = None) -> str:
    """Write the page of all runs below a folder; returns its path.

    Args:
        folder: Where the runs are.
        out: Path or URI of the page; default ``index.html`` in the folder.

    Raises:
        StoreError: There is no run, or another program's file is in the page's place.
    """
    jobs = collect_jobs(folder)
    place, name = folder, PAGE
    if out is not None:
        head, mark, options = out.partition("?") if "://" in out else (out, "", "")
        parent, _, name = head.rpartition("/")
        place = RunDirectory(f"{parent or ('/' if out.startswith('/') else '.')}{mark}{options}")
    if not name or (place.exists(name) and _MARKER.encode() not in place.read_bytes(name)):
        raise StoreError(f"{place.path(name)} is not a page of ours; give another `out`")
    title = last_part(folder.uri) or folder.uri
    return place.write_text(name, render_site(jobs, title, _linker(folder, place)))


def render_site(jobs: list[Job], title: str, link: Callable[[str], str | None]) -> str:
    """Lay the jobs out.

    Args:
        jobs: Runs by job.
        title: Name of the folder of runs.
        link: From a report's name below that folder to where the page finds it, or None.
    """
    names = short_names([job.name for job in jobs])
    return render_page(
        "site.html.j2",
        ["shared.css", "site.css"],
        ["sort.js"],
        title=title,
        marker=_MARKER,
        jobs=[_job(job, number, names[job.name], link) for number, job in enumerate(jobs, start=1)],
        looks=[
            (names[job.name], number, row)
            for number, job in enumerate(jobs, start=1)
            for row in _looks(job)
        ],
        num_runs=sum(len(job.rows) for job in jobs),
        status_text=_STATUS_TEXT,
        day=_day,
    )


def _linker(folder: RunDirectory, place: RunDirectory) -> Callable[[str], str | None]:
    """Relative links, which work from disk, from a web server and after both are moved."""
    if place.path("") == folder.path(""):
        return quote
    if "://" in place.path("") or "://" in folder.path(""):
        return lambda _: None
    return lambda name: quote(os.path.relpath(folder.path(name), place.path("")))


def _looks(job: Job) -> list[RunRow]:
    """Runs of a job that need a look: those since its last good one, newest first."""
    recent = []
    for row in reversed(job.rows):
        if not row.needs_a_look:
            break
        recent.append(row)
    return recent


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> the end of its path that tells it from the others; an id of a hub stays whole.

    Args:
        names: Of jobs and models, each of them different.
    """
    parts = {name: _parts(name) for name in names}
    for number in range(1, 1 + max(map(len, parts.values()), default=0)):
        short = {name: "/".join(of[-number:]) for name, of in parts.items()}
        counts = Counter(short.values())
        if all(count == 1 for count in counts.values()):
            return short
    return {name: name for name in names}


def _parts(name: str) -> list[str]:
    """Folders of a path; a name that is none is a single part."""
    is_path = name.startswith(("/", "./", "../", "~")) or re.match(r"[a-z0-9]+://", name)
    return [part for part in name.split("/") if part] if is_path else [name]


def _job(job: Job, number: int, name: str, link: Callable[[str], str | None]) -> dict[str, Any]:
    """What the template shows of a job."""
    rows = job.rows
    with_result = [row for row in rows if row.predicted_kl_nats is not None]
    models = sorted({row.model for row in rows if row.model is not None})
    if not job.is_nightly:  # of a single one, its whole path, unless that is the job's name
        models = [] if models == [name] else models
    has_measured = any(row.measured_kl_nats is not None for row in rows)
    return {
        "id": f"job-{number}",
        "name": name,
        "has_measured": has_measured,
        "kind": "Nightly job" if job.is_nightly else "Runs of one model",
        "models": models,
        "last": rows[-1],
        "last_result": with_result[-1] if with_result else None,
        "change": _change(with_result),
        "num_bad": sum(row.status != "done" for row in rows),
        "num_drift": sum(row.verdict == "drift" for row in rows),
        "rows": [_row(row, link) for row in reversed(rows)],
        "charts": [
            {
                "id": f"job-{number}-kl",
                "title": "Predicted KL",
                "unit": f"nats per token, lower is better{'; hollow: measured' * has_measured}",
                "summary": _summary([row.predicted_kl_nats for row in rows], "{:#.4g} nats"),
                "sizes": _sizes(rows, _kl_point, is_share=False),
            },
            {
                "id": f"job-{number}-churn",
                "title": "Allocation churn",
                "unit": "share of groups whose format changed",
                "summary": _summary([row.churn for row in rows], "{:.1%}"),
                "sizes": _sizes(rows, _churn_point, is_share=True),
            },
        ],
    }


def _row(row: RunRow, link: Callable[[str], str | None]) -> dict[str, Any]:
    """A run's cells: what is shown, and what it is sorted by."""
    return {
        "run": row,
        "link": None if row.report is None else link(row.report),
        "started": row.started.replace("T", " ")[:16] or "unknown",
        "kl": _shown(row.predicted_kl_nats, "{:#.4g}"),
        "measured": _shown(row.measured_kl_nats, "{:#.4g}"),
        "churn": _shown_churn(row),
        "bits": _shown(row.effective_bits, "{:.3f}"),
        "bytes": _NO_VALUE if row.weight_bytes is None else _size(row.weight_bytes),
        "seconds": _NO_VALUE if row.seconds is None else _duration(row.seconds),
    }


def _sizes(
    rows: list[RunRow], point: Callable[[RunRow], Point], *, is_share: bool
) -> dict[str, Chart]:
    points = [point(row) for row in rows]
    return {
        name: make_chart(points, width=width, is_share=is_share) for name, width in _WIDTHS.items()
    }


def _kl_point(row: RunRow) -> Point:
    value = row.predicted_kl_nats
    shown = _STATUS_TEXT[row.status].lower() if value is None else f"{value:#.4g} nats"
    return Point(
        label=_day(row),
        value=value,
        shown=shown,
        mark=_mark(row),
        measured=row.measured_kl_nats,
    )


def _churn_point(row: RunRow) -> Point:
    value = row.churn
    if value is None and row.status in ("done", "quarantined"):
        return Point(label=_day(row), value=None, shown="not compared", mark="none")
    shown = _STATUS_TEXT[row.status].lower() if value is None else f"{value:.1%}"
    return Point(label=_day(row), value=value, shown=shown, mark=_mark(row))


def _mark(row: RunRow) -> str:
    if row.status in ("done", "quarantined"):
        return "look" if row.needs_a_look else "good"
    return "bad"


def _change(rows: list[RunRow]) -> str | None:
    """Relative change of the predicted KL between the last two results."""
    if len(rows) < 2:
        return None
    before, now = rows[-2].predicted_kl_nats, rows[-1].predicted_kl_nats
    if not before or now is None:
        return None
    return f"{now / before - 1:+.1%}"


def _summary(values: list[float | None], form: str) -> str:
    """A chart in one sentence, for those who do not see it."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "No run has this number yet."
    if len(values) == 1:
        return f"One run: {form.format(numbers[0])}."
    ends = f"from {form.format(numbers[0])} to {form.format(numbers[-1])}"
    span = f"lowest {form.format(min(numbers))}, highest {form.format(max(numbers))}"
    return (
        f"{len(numbers)} of {len(values)} runs: {ends}; {span}. The table below has every number."
    )


def _shown(value: float | None, form: str) -> str:
    return _NO_VALUE if value is None else form.format(value)


def _shown_churn(row: RunRow) -> str:
    if row.num_changed is None:
        return _NO_VALUE
    if row.churn is None:
        return f"{row.num_changed} groups"
    return f"{row.churn:.1%} ({row.num_changed} of {row.num_groups})"


def _size(num_bytes: int) -> str:
    unit, name = size_unit(num_bytes)
    return f"{num_bytes / unit:,.1f} {name}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _day(row: RunRow) -> str:
    return row.day or "unknown"
