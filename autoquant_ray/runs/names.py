"""Names of the files and folders of a run directory.

Every other module takes them from here; the columns of a Parquet file are found by its name
(:mod:`autoquant_ray.runs.schemas`).
"""

from __future__ import annotations

import re

from autoquant_ray.errors import StoreError

RUN_FILE, EVENTS_FILE = "run.json", "events.jsonl"
"""The record of the run, and one line per state change."""
PLAN_FILE = "plan.parquet"
"""Groups, their formats and what these cost."""
SENSITIVITY_FILE, RESAMPLING_FILE = "sensitivity.parquet", "resampling.parquet"
"""Scores of (group, format), and the sums behind them that can be resampled."""
MANIFEST_TABLE, MANIFEST_JSON = "manifest.parquet", "manifest.json"
REPORT_MARKDOWN, REPORT_HTML = "report.md", "report.html"
"""Of a solution, next to each other: in the run's folder, or in the solution's."""
SOLUTIONS = "solutions"
SAMPLES, CALIBRATION, SCORES = "samples", "calibration", "scores"
CHANNELS, SEARCH = "channels", "search"
"""Folders that hold one part per shard."""
ROUNDING = "rounding"
"""Folder that holds one part per decoder layer, and one for what is outside of them."""
CALIBRATION_FILE, CHANNELS_FILE = "calibration.parquet", "channels.parquet"
"""Merged statistics of inputs: numbers, and values per input channel where formats need them."""
SEARCH_FILE = "search.parquet"
"""Merged losses of AWQ's candidates."""
ROUNDING_FILE = "rounding.parquet"
"""Fitted scales of weights, of all layers."""
EVALUATION = "evaluation"
"""Folder of what was measured: per data set, per allocation, one part per shard."""
FLIPS = "flips"
"""Below the folder of a data set: per allocation, what single changes of it are predicted to do."""
EVALUATION_FILE, AUDIT_FILE = "evaluation.parquet", "audit.parquet"
"""Measured losses of solutions and their rivals; of single (group, format) pairs."""
ANSWERS = "answers"
"""Below a folder of requests: per allocation, what the model answered."""
SHAPLEY = "shapley"
"""Below a folder of a scan's scores: those of ModelOpt's path integrals, a single part."""
TASKS_FILE = "tasks.parquet"
"""Results of benchmark tasks."""
FRONTIER_FILE = "frontier.parquet"
"""Sizes and losses along the frontier."""
DOMAINS_FILE = "domains.parquet"
"""Of a run with several domains: the domain of each shard."""
DOMAIN_SCORES_FILE = "domain_sensitivity.parquet"
DOMAIN_RESAMPLING_FILE = "domain_resampling.parquet"
"""The same as without ``domain_``, for each domain."""
LOCK = ".lock"
"""Folder of the claims of whoever works on the run; it is not part of the run."""
DRIFT_JSON, DRIFT_MARKDOWN = "drift.json", "drift.md"
"""How a nightly run differs from its baseline."""
HISTORY_FILE = "history.parquet"
"""Of a folder of runs, beside them: one row per run."""

RUN_FOLDERS = {SAMPLES, CALIBRATION, CHANNELS, SEARCH, ROUNDING, SCORES, SOLUTIONS, EVALUATION}
RUN_FILES = {
    RUN_FILE,
    PLAN_FILE,
    CALIBRATION_FILE,
    CHANNELS_FILE,
    SEARCH_FILE,
    ROUNDING_FILE,
    DOMAINS_FILE,
    DOMAIN_SCORES_FILE,
    DOMAIN_RESAMPLING_FILE,
    SENSITIVITY_FILE,
    RESAMPLING_FILE,
    EVALUATION_FILE,
    AUDIT_FILE,
    TASKS_FILE,
    FRONTIER_FILE,
    MANIFEST_TABLE,
    MANIFEST_JSON,
    REPORT_MARKDOWN,
    REPORT_HTML,
    EVENTS_FILE,
    DRIFT_JSON,
    DRIFT_MARKDOWN,
}


_PART = re.compile(r"(shard|layer)-\d{6,}\.parquet")


def part_name(folder: str, number: int) -> str:
    """Name of the part of a shard or a layer, for example ``scores/shard-000012.parquet``."""
    return f"{folder}/{'layer' if folder == ROUNDING else 'shard'}-{number:06d}.parquet"


def is_part(name: str) -> bool:
    """Whether a file is the part of a shard or a layer, by its name."""
    return _PART.fullmatch(name.rpartition("/")[2]) is not None


def last_part(uri: str) -> str:
    """Last part of a folder's path, without what a URI asks; empty where there is none."""
    return uri.partition("?")[0].rstrip("/").rpartition("/")[2]


def remedy_of(name: str) -> str:
    """What makes a damaged or lost file again."""
    file = name.rpartition("/")[2]
    if name.startswith(f"{EVALUATION}/") or file in (EVALUATION_FILE, AUDIT_FILE, TASKS_FILE):
        return "delete it, autoquant-ray evaluate makes it again"
    if file == FRONTIER_FILE:
        return "autoquant-ray frontier makes it again"
    if file in (MANIFEST_TABLE, MANIFEST_JSON):
        return "solve the budget again"
    if file == RUN_FILE:
        return "restore it, or scan again with --overwrite"
    if is_part(name) or file in RUN_FILES:
        return "autoquant-ray scan --resume makes it again"
    return "restore it"


def solution_folder(name: str) -> str:
    """Folder of a solution with a trailing slash; '' for the scan's own, which has no name.

    Args:
        name: Of the solution; a slash at its end, as shells complete it, does not count.

    Raises:
        StoreError: A path, which could lead elsewhere.
    """
    name = name.rstrip("/") or name
    if "/" in name or name in (".", ".."):
        raise StoreError(
            f"{name!r} is no name of a solution; give that of a folder below {SOLUTIONS}/ of the "
            "run"
        )
    return f"{SOLUTIONS}/{name}/" if name else ""


def solution_of(folder: str) -> str:
    """Name of the solution in a folder: the inverse of :func:`solution_folder`."""
    return folder.removeprefix(f"{SOLUTIONS}/").rstrip("/")


def slug(text: str) -> str:
    """The last part of a path or id in lower case letters, digits and hyphens, 40 at most."""
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower()
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40].strip("-") or "run"
