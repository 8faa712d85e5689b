"""What calibration found, between memory and the files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoquant_ray.calibrate.channels import Channels
from autoquant_ray.calibrate.maxima import to_maxima
from autoquant_ray.errors import StoreError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_smoothed, needs_calibration, needs_search
from autoquant_ray.quantize.awq import losses_of
from autoquant_ray.quantize.smoothing import with_alphas
from autoquant_ray.quantize.statistics import CHANNELS, Maxima, Statistics
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    CALIBRATION_FILE,
    CHANNELS_FILE,
    SEARCH_FILE,
)
from autoquant_ray.runs.state import RunState


def maxima_of(state: RunState) -> Maxima:
    """Merged calibration of a scanned run: everything that its formats need.

    Raises:
        StoreError: A file is missing, or damaged.
    """
    directory = state.directory
    formats = [Format.from_json(entry) for entry in state.values["plan"]["formats"]]
    for name in _missing(directory, formats):
        raise StoreError(
            f"{directory.path(name)} does not exist, and formats of the run need it; scan with "
            "--resume, which makes it again"
        )
    return read_maxima(directory) if needs_calibration(formats) else {}


def _missing(directory: RunDirectory, formats: Sequence[Format]) -> list[str]:
    needed = {
        CALIBRATION_FILE: needs_calibration(formats),
        CHANNELS_FILE: any(map(is_smoothed, formats)),
        SEARCH_FILE: any(map(needs_search, formats)),
    }
    return [name for name, is_needed in needed.items() if is_needed and not directory.exists(name)]


def read_maxima(directory: RunDirectory) -> Maxima:
    """Merged calibration of a run: maxima, channels, and the best of AWQ's candidates.

    Raises:
        StoreError: ``calibration.parquet`` is missing, or a file is damaged.
    """
    merged = _scalars(directory.read_table(CALIBRATION_FILE))
    if directory.exists(CHANNELS_FILE):
        merged |= _channels(directory.read_table(CHANNELS_FILE))
    maxima = to_maxima(merged)
    if directory.exists(SEARCH_FILE):
        maxima = with_alphas(maxima, losses_of(directory.read_table(SEARCH_FILE)))
    return maxima


def _scalar_rows(statistics: Statistics) -> list[dict[str, Any]]:
    return [
        {"module": module, "statistic": statistic, "value": value}
        for (module, statistic), value in statistics.items()
        if statistic != CHANNELS
    ]


def _channel_rows(statistics: Statistics) -> list[dict[str, Any]]:
    return [
        value.row(module)
        for (module, statistic), value in sorted(statistics.items())
        if statistic == CHANNELS
    ]


def _scalars(table: Any) -> Statistics:
    modules, names, values = (table.column(name).to_pylist() for name in table.column_names)
    return dict(zip(zip(modules, names, strict=True), values, strict=True))


def _channels(table: Any) -> Statistics:
    columns = (table.column(name) for name in ("module", "largest", "sum", "num_tokens"))
    return {
        (module.as_py(), CHANNELS): Channels.of_row(largest, sum_, num_tokens.as_py())
        for module, largest, sum_, num_tokens in zip(*columns, strict=True)
    }
