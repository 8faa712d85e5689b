"""The section of a report that compares single scores with measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from autoquant_ray.report.charts.scatter import Pair, Scatter, scatter
from autoquant_ray.report.measured import IN_RANGE
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import AUDIT_FILE

HEADS = ("Group", "Format", "Predicted KL", "Measured KL", "Measured / predicted")
_NUM_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class AuditData:
    """The audit section of a report.

    Attributes:
        title: What was measured.
        verdict: How far predictions and measurements differ, and what changed.
        rows: Cells under ``HEADS``, for the pairs with the largest prediction errors.
        chart: All pairs as a drawing; None where no loss is above 0.
    """

    title: str
    verdict: str
    rows: list[tuple[str, ...]]
    chart: Scatter | None


def audit_section(pairs: Sequence[AuditedPair], summary: Mapping[str, Any]) -> AuditData:
    """Lay out an audit.

    Args:
        pairs: The measured pairs.
        summary: The ``audit`` object of ``manifest.json``.
    """
    shown = most_wrong(pairs, summary["median_ratio"])[:_NUM_SHOWN]
    is_cut = len(shown) < len(pairs)
    note = f"; the {len(shown)} with the largest prediction errors are shown" if is_cut else ""
    return AuditData(
        title=f"{len(pairs)} pairs of group and format, each quantized alone, on "
        f"{summary['num_samples']} samples that the scan has not seen{note}",
        verdict=audit_verdict(summary),
        rows=[_cells(pair) for pair in shown],
        chart=scatter([_place(pair) for pair in pairs], near=IN_RANGE),
    )


def _place(pair: AuditedPair) -> Pair:
    measured = _with_error(pair.measured, pair.measured_stderr)
    return Pair(
        kind="rival",
        title=f"{pair.group} in {pair.format}: predicted {pair.predicted:.3e}, measured {measured}",
        predicted=pair.predicted,
        measured=pair.measured,
    )


def audit_verdict(summary: Mapping[str, Any]) -> str:
    """How far predictions and measurements differ, and what changed.

    Args:
        summary: The ``audit`` object of ``manifest.json``.
    """
    worst, factor = summary["worst"], summary["median_ratio"]
    if factor is None:
        comparison = "No pair has a loss that can be compared with its prediction."
    else:
        ratio = "infinite" if worst["ratio"] is None else f"{worst['ratio']:.2f}"
        comparison = (
            f"The median ratio of measured to predicted loss is {factor:.2f}; furthest from it is "
            f"{worst['group']} in {worst['format']}: {ratio}."
        )
    changed = summary["num_changed"]
    if not changed:
        return f"{comparison} The allocation is unchanged."
    return f"{comparison} {changed} group{'s' if changed > 1 else ''} changed format."


def _cells(pair: AuditedPair) -> tuple[str, ...]:
    return (
        pair.group,
        pair.format,
        _with_error(pair.predicted, pair.predicted_stderr),
        _with_error(pair.measured, pair.measured_stderr),
        "-" if pair.ratio is None else f"{pair.ratio:.2f}",
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3e}" if error is None else f"{value:.3e} ± {error:.1e}"


@dataclass(frozen=True, kw_only=True)
class AuditedPair:
    """Loss of a group quantized in a format, everything else in 16 bits.

    Attributes:
        group: Name of the group.
        format: Name of the format.
        predicted: The score in nats per token, from the calibration data.
        predicted_stderr: Standard error of the score; None for a single shard.
        measured: Mean KL(P || Q) in nats per token, on other data; may be infinite.
        measured_stderr: Standard error of ``measured`` over samples; None for a single sample, or
            where ``measured`` is infinite.
        num_samples: Samples of the measurement.
    """

    group: str
    format: str
    predicted: float
    predicted_stderr: float | None
    measured: float
    measured_stderr: float | None
    num_samples: int

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where either is 0, or ``measured`` is infinite."""
        if not (self.predicted > 0 and 0 < self.measured < math.inf):
            return None
        return self.measured / self.predicted


def most_wrong(pairs: Sequence[AuditedPair], factor: float | None) -> list[AuditedPair]:
    """Pairs in order of their prediction error after correction by the common factor, worst first.

    A pair with an infinite measurement comes first, a pair without a ratio last.
    """

    def error(pair: AuditedPair) -> float:
        if pair.measured == math.inf:
            return math.inf
        return 0.0 if pair.ratio is None else abs(math.log(pair.ratio / (factor or 1.0)))

    return sorted(pairs, key=error, reverse=True)


def read_pairs(directory: RunDirectory, solution: str) -> list[AuditedPair]:
    """An audited solution's rows of ``audit.parquet``, in the order of the file."""
    rows = directory.read_table(AUDIT_FILE).to_pylist()
    names = [field.name for field in fields(AuditedPair)]
    return [
        AuditedPair(**{name: row[name] for name in names})
        for row in rows
        if row["solution"] == solution
    ]
