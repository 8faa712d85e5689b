"""The part of a report that holds predictions against measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HEADS = (
    "Allocation",
    "Bits",
    "Predicted KL",
    "Measured KL",
    "Above the solution",
    "95% of tokens",
    "99% of tokens",
    "Perplexity",
    "Same top token",
)
IN_RANGE = 1.5
"""Predicted and measured KL within this factor: the budget is in the range of the prediction."""


@dataclass(frozen=True, kw_only=True)
class MeasuredData:
    """A solution and its rivals on one data set.

    Attributes:
        title: What they were measured on.
        verdict: What it means, in a sentence.
        rows: Cells under ``HEADS``.
    """

    title: str
    verdict: str
    rows: list[tuple[str, ...]]


def measured_sections(
    rows: Sequence[dict[str, Any]], solution: str, allocation: str, is_by_domain: bool = False
) -> list[MeasuredData]:
    """Lay out a solution's rows of ``evaluation.parquet``, one section per data set.

    Args:
        rows: All rows of the file.
        solution: Name of the solution; '' for the run's own.
        allocation: Digest of its formats now; measurements of what it was before are not shown.
        is_by_domain: It was made for domains rather than for all tokens alike.
    """
    return [_section(shown, is_by_domain) for shown in measured_rows(rows, solution, allocation)]


def measured_rows(
    rows: Sequence[dict[str, Any]], solution: str, allocation: str
) -> list[list[dict[str, Any]]]:
    """A solution's row and its rivals' per data set, shuffled scores merged into one row; last.

    Args:
        rows: All rows of ``evaluation.parquet``.
        solution: Name of the solution; '' for the run's own.
        allocation: Digest of its formats now.
    """
    by_data: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["solution"] == solution:
            by_data.setdefault(row["data_key"], []).append(row)
    return [
        merge_random(of_data)
        for of_data in by_data.values()
        if of_data[0]["allocation"] == allocation
    ]


def _section(shown: list[dict[str, Any]], is_by_domain: bool) -> MeasuredData:
    own = shown[0]
    perplexity = f"{own['reference_perplexity']:.4g}"
    return MeasuredData(
        title=f"{own['num_tokens']:,} tokens of {own['num_samples']} samples of {own['dataset']}; "
        f"perplexity of the model itself {perplexity}",
        verdict=verdict(shown, is_by_domain),
        rows=[cells(row) for row in shown],
    )


def merge_random(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the mean of the allocations from shuffled scores in their place; last."""
    random = [row for row in rows if row["name"].startswith("random ")]
    others = [row for row in rows if not row["name"].startswith("random ")]
    if not random:
        return others
    merged: dict[str, Any] = {
        key: sum(row[key] for row in random) / len(random)  # infinite ones may give NaN
        for key, value in random[0].items()
        if isinstance(value, float)
    }
    kls = [row["kl_mean"] for row in random]
    spread = sum((kl - merged["kl_mean"]) ** 2 for kl in kls)
    merged["kl_stderr"] = (
        math.sqrt(spread / (len(kls) - 1) / len(kls)) if len(kls) > 1 else random[0]["kl_stderr"]
    )
    merged["kl_above_solution_stderr"] = None
    name = f"shuffled scores, mean of {len(random)}"
    return [*others, random[0] | merged | {"name": name}]


def verdict(rows: Sequence[dict[str, Any]], is_by_domain: bool = False) -> str:
    """How the solution fares: against its prediction, and against its rivals.

    Args:
        rows: The solution's and its rivals'.
        is_by_domain: The solution was made for domains; rivals that are not say nothing of it.
    """
    own = rows[0]
    texts = [_prediction(own)]
    if is_by_domain:
        texts.append("All tokens count alike here, which is not what the plan was made for.")
        return " ".join(texts)
    for row in rows[1:]:
        if row["name"].startswith("uniform") and row["kl_mean"] < own["kl_mean"]:
            texts.append(f"{row['name']} loses less at no more bytes: do not use this plan.")
    if rows[-1]["name"].startswith("shuffled") and rows[-1]["kl_mean"] <= own["kl_mean"]:
        texts.append("It is no better than shuffled scores: the scan told nothing here.")
    return " ".join(texts)


def _prediction(own: dict[str, Any]) -> str:
    if not own["kl_mean"] > 0 or not own["predicted_kl"] > 0:
        return "Nothing was lost."
    ratio = own["predicted_kl"] / own["kl_mean"]
    if 1 / IN_RANGE <= ratio <= IN_RANGE:
        return f"The prediction holds: {ratio:.2f} of what was measured."
    kind = "less" if ratio < 1 else "more"
    return (
        f"The prediction does not hold at this budget: {ratio:.2f} of what was measured, "
        f"{kind} than a factor of {IN_RANGE} allows. Trust the measured number."
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row under ``HEADS``."""
    return (
        row["name"],
        f"{row['effective_bits']:.3f}",
        f"{row['predicted_kl']:.4g}",
        with_error(row["kl_mean"], row["kl_stderr"]),
        ""
        if row["name"] == "solution"
        else with_error(row["kl_above_solution"], row["kl_above_solution_stderr"], signed=True),
        f"{row['kl_p95']:.3g}",
        f"{row['kl_p99']:.3g}",
        f"{row['perplexity']:.4g}",
        f"{row['top1_agreement']:.2%}",
    )


def with_error(value: float, error: float | None, *, signed: bool = False) -> str:
    """A number with its standard error where it has one."""
    text = f"{value:+.3g}" if signed else f"{value:.4g}"
    return text if error is None else f"{text} ± {error:.1g}"
