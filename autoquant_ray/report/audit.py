"""The part of a report that holds single scores against measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import AUDIT_FILE

HEADS = ("Group", "Format", "Predicted KL", "Measured KL", "Measured / predicted")
_NUM_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class AuditData:
    """What an audit of a solution found.

    Attributes:
        title: What was measured.
        verdict: How far predictions and measurements are apart, and what it changed.
        rows: Cells under ``HEADS``, the pairs that the prediction misjudges most.
    """

    title: str
    verdict: str
    rows: list[tuple[str, ...]]


def audit_section(pairs: Sequence[AuditedPair], summary: Mapping[str, Any]) -> AuditData:
    """Lay out an audit.

    Args:
        pairs: What was measured.
        summary: The ``audit`` object of ``manifest.json``.
    """
    shown = most_wrong(pairs, summary["median_ratio"])[:_NUM_SHOWN]
    most = f"; shown are the {len(shown)} misjudged most" if len(shown) < len(pairs) else ""
    return AuditData(
        title=f"{len(pairs)} pairs of group and format, each quantized alone, on "
        f"{summary['num_samples']} samples that the scan has not seen{most}",
        verdict=audit_verdict(summary),
        rows=[_cells(pair) for pair in shown],
    )


def audit_verdict(summary: Mapping[str, Any]) -> str:
    """How far predictions and measurements are apart, and what it changed.

    Args:
        summary: The ``audit`` object of ``manifest.json``.
    """
    worst, factor = summary["worst"], summary["median_ratio"]
    if factor is None:
        apart = "No pair has lost anything that can be held against its prediction."
    else:
        ratio = "infinite" if worst["ratio"] is None else f"{worst['ratio']:.2f}"
        apart = (
            f"Measured is {factor:.2f} of the predicted in the median; furthest from that is "
            f"{worst['group']} in {worst['format']}: {ratio}."
        )
    changed = summary["num_changed"]
    if not changed:
        return f"{apart} The plan stays as it is."
    return f"{apart} {changed} group{'s' if changed > 1 else ''} changed format."


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
    """One group quantized in one format, everything else in 16 bits.

    Attributes:
        group: Name of the group.
        format: Name of the format.
        predicted: Its score in nats per token, from the calibration data.
        predicted_stderr: Standard error of the score; None for a single shard.
        measured: Mean KL(P || Q) in nats per token, on other data; may be infinite.
        measured_stderr: Its standard error over samples; None for one sample, or if infinite.
        num_samples: Samples that it was measured on.
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
        """Measured over predicted; None where one of them is 0, or the measured one infinite."""
        if not (self.predicted > 0 and 0 < self.measured < math.inf):
            return None
        return self.measured / self.predicted


def most_wrong(pairs: Sequence[AuditedPair], factor: float | None) -> list[AuditedPair]:
    """The pairs that the prediction misjudges most, given the common factor; worst first.

    A pair whose measurement is infinite comes before all others, one without any ratio last.
    """

    def error(pair: AuditedPair) -> float:
        if pair.measured == math.inf:
            return math.inf
        return 0.0 if pair.ratio is None else abs(math.log(pair.ratio / (factor or 1.0)))

    return sorted(pairs, key=error, reverse=True)


def read_pairs(directory: RunDirectory, solution: str) -> list[AuditedPair]:
    """An audited solution's rows of ``audit.parquet``, in their order."""
    rows = directory.read_table(AUDIT_FILE).to_pylist()
    names = [field.name for field in fields(AuditedPair)]
    return [
        AuditedPair(**{name: row[name] for name in names})
        for row in rows
        if row["solution"] == solution
    ]
