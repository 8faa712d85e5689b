"""The part of a report that holds single scores against measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.audit_pairs import AuditedPair, most_wrong

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
