"""The section of a report on benchmark tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.allocate.candidate import SOLUTION, UNQUANTIZED
from autoquant_ray.wording import few, with_error

TASK_HEADS = ("Task", "Metric", "Allocation", "Bits", "Value", "Against 16 bits", "Samples")
NOISE = 2.0
"""Standard errors within which a difference says nothing."""
_MOST_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Scores of tasks.

    Attributes:
        verdict: Which differences are more than noise, in a sentence or two.
        rows: Cells under ``TASK_HEADS``.
    """

    verdict: str
    rows: list[tuple[str, ...]]


def solution_tasks(
    rows: Sequence[Mapping[str, Any]], solution: str, allocation: str
) -> list[Mapping[str, Any]]:
    """A solution's rows of ``tasks.parquet``, of tasks that it answered with these formats.

    Args:
        rows: All rows of the file.
        solution: Name of the solution; '' for the scan's.
        allocation: Current digest of its formats.
    """
    current = {
        row["task"]
        for row in rows
        if (row["solution"], row["name"], row["allocation"]) == (solution, SOLUTION, allocation)
    }
    return [row for row in rows if row["solution"] == solution and row["task"] in current]


def task_section(rows: Sequence[Mapping[str, Any]]) -> TaskData | None:
    """Lay out :func:`solution_tasks`; None where no task was asked."""
    if not rows:
        return None
    order = dict.fromkeys((row["task"], row["metric"], row["filter"]) for row in rows)
    cells = [
        _cells(row)
        for key in order
        for row in rows
        if (row["task"], row["metric"], row["filter"]) == key
    ]
    return TaskData(verdict=task_verdict(rows), rows=cells)


def task_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the solution's scores compare with those of the model in 16 bits."""
    differences = [row for row in rows if row["name"] == SOLUTION]
    clear = [
        f"{metric_name(row)} {row['difference']:+.3g}" for row in differences if not is_noise(row)
    ]
    noise = (
        f"Standard errors follow the sign ±; a difference of at most {NOISE:g} of them is within "
        "noise"
    )
    if not clear:
        return f"{noise}, and so are all of the solution's. More samples would tell more."
    return f"{noise}. More than that are {len(clear)} of {len(differences)}: " + (
        f"{few(clear, _MOST_NAMES)}."
    )


def is_noise(row: Mapping[str, Any]) -> bool:
    """Whether a difference may be chance; one without an error counts if it is not 0."""
    return float(abs(row["difference"])) <= NOISE * (row["difference_stderr"] or 0.0)


def metric_name(row: Mapping[str, Any]) -> str:
    """Task, metric and filter, such as ``gsm8k exact_match (strict-match)``."""
    filter_ = "" if row["filter"] == "none" else f" ({row['filter']})"
    return f"{row['task']} {row['metric']}{filter_}"


def difference_text(row: Mapping[str, Any]) -> str:
    """A difference with its standard error, and whether it is within noise."""
    text = with_error(row["difference"], row["difference_stderr"], signed=True)
    return f"{text}, within noise" if is_noise(row) else text


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    better = {True: " (higher is better)", False: " (lower is better)"}
    return (
        row["task"],
        metric_name(row).removeprefix(f"{row['task']} ") + better.get(row["higher_is_better"], ""),
        row["name"],
        f"{row['effective_bits']:.3f}",
        with_error(row["value"], row["stderr"]),
        "" if row["name"] == UNQUANTIZED else difference_text(row),
        f"{row['num_samples']:,}",
    )
