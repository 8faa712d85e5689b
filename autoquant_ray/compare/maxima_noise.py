"""How much the input maxima of a run owe to the samples that it happened to see."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa


def has_integer_input(format_: Mapping[str, Any]) -> bool:
    """Whether a format of ``run.json`` quantizes inputs to integers, whose step is their maximum's.

    The error of a floating-point format hardly depends on the maximum.
    """
    return isinstance((format_.get("input") or {}).get("num_bits"), int)


def log_deviations(parts: Iterable[pa.Table]) -> dict[str, float]:
    """Module -> standard deviation over shards of the logarithm of its input maximum.

    Args:
        parts: ``calibration`` parts, one per shard. A module with several maxima counts by the
            noisiest one; a shard in which a maximum is 0 (no token came by) is not counted.
    """
    logs: dict[tuple[str, str], list[float]] = {}
    for part in parts:
        columns = (part.column(name).to_pylist() for name in ("module", "statistic", "value"))
        for module, statistic, value in zip(*columns, strict=True):
            if value > 0:
                logs.setdefault((module, statistic), []).append(math.log(value))
    deviations: dict[str, float] = {}
    for (module, _), values in logs.items():
        if len(values) > 1:
            deviations[module] = max(deviations.get(module, 0.0), statistics.stdev(values))
    return deviations
