"""The section of a report that compares predictions with measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.report.charts.scatter import Pair
from autoquant_ray.report.task_scores.section import NOISE
from autoquant_ray.wording import with_error

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
_ROUNDING = 1e-6
"""Nats per token."""
IN_RANGE = 1.5
"""Factor between predicted and measured KL within which the prediction is said to hold."""


@dataclass(frozen=True, kw_only=True)
class MeasuredData:
    """A solution and its rivals on one data set.

    Attributes:
        title: The data.
        verdict: What the numbers mean, in a sentence or two.
        rows: Cells under ``HEADS``.
    """

    title: str
    verdict: str
    rows: list[tuple[str, ...]]


def measured_sections(
    rows: Sequence[dict[str, Any]], solution: str, allocation: str, is_by_domain: bool = False
) -> list[MeasuredData]:
    """Lay out a solution's rows of ``evaluation.parquet``, a section per data set.

    Args:
        rows: All rows of the file.
        solution: Name of the solution; '' for the scan's.
        allocation: Current digest of its formats; measurements of earlier formats are not shown.
        is_by_domain: Whether it was made for domains rather than for all tokens equally.
    """
    return [_section(shown, is_by_domain) for shown in measured_rows(rows, solution, allocation)]


def measured_rows(
    rows: Sequence[dict[str, Any]], solution: str, allocation: str
) -> list[list[dict[str, Any]]]:
    """Per data set: a solution's row, its rivals' rows, and a mean row for shuffled scores.

    Args:
        rows: All rows of ``evaluation.parquet``.
        solution: Name of the solution; '' for the scan's.
        allocation: Current digest of its formats.
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
    solution = shown[0]
    return MeasuredData(
        title=f"{solution['num_tokens']:,} tokens in {solution['num_samples']} samples of "
        f"{solution['dataset']}; perplexity of the unquantized model "
        f"{solution['reference_perplexity']:.4g}",
        verdict=verdict(shown, is_by_domain),
        rows=[cells(row) for row in shown],
    )


def merge_random(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the rows of allocations from shuffled scores by their mean, as the last row."""
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
    squares = sum((kl - merged["kl_mean"]) ** 2 for kl in kls)
    merged["kl_stderr"] = (
        math.sqrt(squares / (len(kls) - 1) / len(kls)) if len(kls) > 1 else random[0]["kl_stderr"]
    )
    merged["kl_above_solution_stderr"] = None
    name = f"shuffled scores, mean of {len(random)}"
    return [*others, random[0] | merged | {"name": name}]


def verdict(rows: Sequence[dict[str, Any]], is_by_domain: bool = False) -> str:
    """How the solution compares with its prediction and with its rivals.

    Args:
        rows: Rows of the solution and of its rivals.
        is_by_domain: Whether the solution was made for domains; rivals that weigh all tokens
            equally then do not compare with it.
    """
    solution = rows[0]
    texts = [_prediction(solution)]
    if is_by_domain:
        texts.append("All tokens count equally here, but the solution was made for domains.")
        return " ".join(texts)
    for row in rows[1:]:
        if row["name"].startswith("uniform") and row["kl_mean"] < solution["kl_mean"]:
            texts.append(f"{row['name']} loses less at no more bytes: do not use this solution.")
    texts += [_equal(row) for row in rows[1:] if row.get("kl_above_equal") is not None]
    if rows[-1]["name"].startswith("shuffled") and rows[-1]["kl_mean"] <= solution["kl_mean"]:
        texts.append("It is no better than shuffled scores: the scores carry no information here.")
    return " ".join(texts)


def _equal(row: dict[str, Any]) -> str:
    """How a rival compares with what the run chooses at the same bytes."""
    difference, error = row["kl_above_equal"], row["kl_above_equal_stderr"]
    size = f"{row['weight_bytes']:,.0f} bytes"
    if difference == 0:
        return f"{row['name']} loses exactly what this run's choice at its {size} loses."
    is_clear = abs(difference) > NOISE * (error or 0.0)
    word = "more" if difference > 0 else "less"
    text = f"{row['name']} loses {with_error(abs(difference), error)} nats per token {word} than "
    return f"{text}what this run chooses at its {size}{'' if is_clear else ', within noise'}."


def is_nothing(row: Mapping[str, Any]) -> bool:
    """Whether an allocation lost nothing, but for rounding where no loss was predicted."""
    return not row["kl_mean"] > (0 if row["predicted_kl"] > 0 else _ROUNDING)


def _prediction(solution: dict[str, Any]) -> str:
    if is_nothing(solution):
        return "Nothing was lost."
    if not solution["predicted_kl"] > 0:
        return (
            "The prediction does not hold: no loss was predicted, and "
            f"{solution['kl_mean']:.4g} nats per token were measured."
        )
    ratio = solution["predicted_kl"] / solution["kl_mean"]
    if 1 / IN_RANGE <= ratio <= IN_RANGE:
        return f"The prediction holds: {ratio:.2f} times the measured loss."
    return (
        f"The prediction does not hold at this budget: it is {ratio:.2f} times the measured loss, "
        f"and a factor of {IN_RANGE} is normal. Trust the measured number."
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a row under ``HEADS``."""
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


def measured_pairs(rows: Sequence[dict[str, Any]], solution: str, allocation: str) -> list[Pair]:
    """Predicted and measured losses of all measured allocations.

    Args:
        rows: All rows of ``evaluation.parquet``.
        solution: Name of the solution that is marked; '' for the scan's.
        allocation: Current digest of its formats.
    """
    this = ("solution", solution, allocation)
    return [
        Pair(
            kind="solution"
            if (row["name"], row["solution"], row["allocation"]) == this
            else "rival",
            title=f"{row['name']} on {row['dataset']}: predicted {row['predicted_kl']:.4g}, "
            f"measured {with_error(row['kl_mean'], row['kl_stderr'])}",
            predicted=row["predicted_kl"],
            measured=row["kl_mean"],
        )
        for row in rows
    ]
