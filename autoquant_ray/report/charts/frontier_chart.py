"""Data of a report's frontier chart: predicted loss (log scale) against size.

Prepares the points, the limits of the axes, and each number as text; a script of the page draws
them with BokehJS (``bokeh_js.py``, ``assets/frontier.js``). Each point is also a row of a table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MAX_DECADES = 5
_MARGIN = 0.06
"""Margin beyond the outermost points, as a share of an axis' length."""
BITS_LABEL = "stored bits per searched weight"
LEGEND = {
    "curve": "best allocation of its size",
    "knee": "knee: diminishing returns beyond",
    "solution": "this solution",
    "uniform": "one format everywhere",
    "measured": "measured",
}
"""Kinds of points -> text of the legend; all but the measured ones are predictions."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point of the chart.

    Attributes:
        kind: A key of ``LEGEND``.
        name: Name of the allocation.
        bits: Average stored bits over the searched groups.
        num_bytes: Size of the whole model.
        loss: Nats per token (imported: no unit).
        stderr: Standard error of ``loss``; None where unknown.
    """

    kind: str
    name: str
    bits: float
    num_bytes: float
    loss: float
    stderr: float | None = None

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Name, bits, size of the model, and loss with its standard error, formatted."""
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return (
            self.name,
            f"{self.bits:.3f}",
            size_text(self.num_bytes),
            f"{self.loss:#.4g}{error}",
        )


def size_text(num_bytes: float) -> str:
    """A number of bytes in MiB, or GiB from 1 GiB on."""
    unit, name = size_unit(num_bytes)
    return f"{num_bytes / unit:,.2f} {name}"


def size_unit(num_bytes: float) -> tuple[int, str]:
    """The unit for a number of bytes, and its name: GiB from 1 GiB on, else MiB."""
    return (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")


def chart_data(dots: Sequence[Dot]) -> dict[str, Any] | None:
    """Prepare the points for the page's script.

    Args:
        dots: Points in any order; those that are not ``visible`` are left out.

    Returns:
        JSON values: ``points`` (columns of equal length, in order of bits; ``x`` is the place on
        the horizontal axis), ``legend`` (pairs of kind and text), ``label`` of that axis,
        ``across`` and ``loss`` (limits of the axes) and ``bits_at`` (sizes and bits along the
        curve). The horizontal axis is the size of the whole model in GiB, or in MiB where all are
        smaller than 1 GiB. Where bytes do not grow with bits, as with a head tied to the embedding,
        it is the bits, and ``bits_at`` is None. None where fewer than two points of the curve are
        visible.
    """
    shown = sorted(visible(dots), key=lambda dot: dot.bits)
    curve = [dot for dot in shown if dot.kind in ("curve", "knee")]
    if len(curve) < 2:
        return None
    ends = [_error_bar(dot) for dot in shown]
    is_growing = all(a.num_bytes < b.num_bytes for a, b in itertools.pairwise(curve))
    unit, unit_name = size_unit(max(dot.num_bytes for dot in shown))
    across = [dot.num_bytes / unit if is_growing else dot.bits for dot in shown]
    names, bits, sizes, losses = zip(*(dot.texts for dot in shown), strict=True)
    kinds = {dot.kind for dot in shown}
    return {
        "points": {
            "kind": [dot.kind for dot in shown],
            "x": across,
            "bits": [dot.bits for dot in shown],
            "loss": [dot.loss for dot in shown],
            "low": [low for low, _ in ends],
            "high": [high for _, high in ends],
            "name": names,
            "bits_text": bits,
            "size_text": sizes,
            "loss_text": losses,
        },
        "legend": [(kind, text) for kind, text in LEGEND.items() if kind in kinds],
        "label": f"size of the whole model, {unit_name}" if is_growing else BITS_LABEL,
        "across": _linear_ends(across),
        "loss": _log_ends(shown),
        "bits_at": {
            "x": [dot.num_bytes / unit for dot in curve],
            "bits": [dot.bits for dot in curve],
            "label": BITS_LABEL,
        }
        if is_growing
        else None,
    }


def visible(dots: Sequence[Dot]) -> list[Dot]:
    """Points that fit on the log axis.

    Leaves out points without a loss, with less than a hundred-thousandth of the largest loss, and
    with an infinite loss.
    """
    losing = [dot for dot in dots if 0 < dot.loss < math.inf]
    most = max((dot.loss for dot in losing), default=0.0)
    return [dot for dot in losing if dot.loss >= most * 10.0**-_MAX_DECADES]


def _error_bar(dot: Dot) -> tuple[float, float]:
    """A standard error below and above the loss; the lower end stays above 0 on the log axis."""
    error = dot.stderr or 0.0
    low = dot.loss - error
    return (low if low > 0 else dot.loss * 10.0**-_MAX_DECADES), dot.loss + error


def _linear_ends(places: Sequence[float]) -> tuple[float, float]:
    low, high = min(places), max(places)
    margin = _MARGIN * (high - low) or 0.5
    return low - margin, high + margin


def _log_ends(dots: Sequence[Dot]) -> tuple[float, float]:
    """Limits that include all points and the upper ends of their error bars."""
    low = math.log10(min(dot.loss for dot in dots))
    high = math.log10(max(_error_bar(dot)[1] for dot in dots))
    margin = _MARGIN * (high - low) or 0.5
    return 10 ** (low - margin), 10 ** (high + margin)
