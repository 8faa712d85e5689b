"""Reads and writes the calibration of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from autoquant_ray.calibrate.stored_rounding import stored_rounding
from autoquant_ray.errors import StoreError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import (
    is_fitted,
    needs_calibration,
    needs_channels,
    needs_search,
    takes_factors,
)
from autoquant_ray.plan.fold import Fold, folds_of_summary
from autoquant_ray.quantize.awq import best_alphas, losses_of, shared_losses
from autoquant_ray.quantize.calibration import (
    Calibration,
    Channels,
    Fit,
    FittedWeights,
    calibration_of_channels,
    calibration_of_maxima,
    merge_calibrations,
)
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    CALIBRATION_FILE,
    CHANNELS_FILE,
    ROUNDING_FILE,
    SEARCH_FILE,
)
from autoquant_ray.runs.rounding import is_rounding_dropped, require_rounding
from autoquant_ray.runs.state import RunState


def calibration_of(state: RunState, used: Iterable[str] | None = None) -> Calibration:
    """Merged calibration of a scanned run: everything that its formats need.

    Args:
        state: The run.
        used: Formats in use, which must not be among those whose fitted weights were dropped;
            None: the whole menu.

    Raises:
        StoreError: A file is missing, or damaged.
    """
    directory = state.directory
    formats = [Format.from_json(entry) for entry in state.plan["formats"]]
    require_rounding(state, [f.name for f in formats] if used is None else used)
    for name in missing_files(directory, formats, has_rounding=not is_rounding_dropped(state)):
        raise StoreError(
            f"{directory.path(name)} is lost or damaged, and formats of the run need it; scan with "
            "`resume`, which makes it again"
        )
    if not needs_calibration(formats):
        return Calibration()
    return read_calibration(directory, formats, folds_of_summary(state.plan))


def missing_files(
    directory: RunDirectory, formats: Sequence[Format], *, has_rounding: bool = True
) -> list[str]:
    """The merged files that the formats of a run need and that are not there, or damaged.

    Args:
        directory: The run.
        formats: Its menu.
        has_rounding: Whether it is to have what was fitted to weights.
    """
    needed = {
        CALIBRATION_FILE: needs_calibration(formats),
        CHANNELS_FILE: any(map(needs_channels, formats)),
        SEARCH_FILE: any(map(needs_search, formats)),
        ROUNDING_FILE: has_rounding and any(map(is_fitted, formats)),
    }
    return [n for n, is_needed in needed.items() if is_needed and not directory.is_intact(n)]


def read_calibration(
    directory: RunDirectory,
    formats: Sequence[Format] = (),
    folds: Mapping[str, Fold] | None = None,
) -> Calibration:
    """Merged calibration of a run: maxima, channels, the best of AWQ's candidates, fitted weights.

    What is not there yet, or cut, is left out: a later stage makes it. :func:`missing_files` says
    what lacks.

    Args:
        directory: The run.
        formats: Its menu, to which weights were fitted.
        folds: Linear -> fold of its input, where the menu has factors to fold.

    Raises:
        StoreError: ``calibration.parquet`` is missing, or the inside of a file is damaged.
    """
    calibration = maxima_of_table(directory.read_table(CALIBRATION_FILE))
    if directory.is_intact(CHANNELS_FILE):
        channels = channels_of_table(directory.read_table(CHANNELS_FILE))
        calibration = merge_calibrations([calibration, channels])
    if folds:
        calibration = replace(calibration, folds=folds)
    if directory.is_intact(SEARCH_FILE):
        losses = losses_of(directory.read_table(SEARCH_FILE))
        shared = {format_.name for format_ in formats if takes_factors(format_)}
        losses = shared_losses(losses, folds or {}, shared)
        calibration = calibration.with_alphas(best_alphas(losses))
    if directory.is_intact(ROUNDING_FILE):
        calibration = replace(calibration, rounding=stored_rounding(directory, formats))
    return calibration


def maxima_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """Rows of ``calibration.parquet``; :func:`maxima_of_table` is the inverse."""
    return [
        {"module": module, "statistic": name, "value": value}
        for (module, name), value in calibration.maxima().items()
    ]


def maxima_of_table(table: Any) -> Calibration:
    """The maxima in a table with the columns of ``calibration.parquet``."""
    modules, names, values = (table.column(name).to_pylist() for name in table.column_names)
    return calibration_of_maxima(dict(zip(zip(modules, names, strict=True), values, strict=True)))


def channel_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """Rows of ``channels.parquet``, sorted; :func:`channels_of_table` is the inverse."""
    return [
        {
            "module": module,
            "largest": channels.largest_I,
            "sum": channels.sum_I,
            "num_tokens": channels.num_tokens,
            "square_sum": channels.square_sum_I,
            "part": part,
        }
        for (module, part), channels in sorted(calibration.channels().items())
    ]


def channels_of_table(table: Any) -> Calibration:
    """The channels in a table with the columns of ``channels.parquet``."""
    columns = ("module", "part", "largest", "sum", "square_sum", "num_tokens")
    return calibration_of_channels(
        {
            (module.as_py(), part.as_py() or ""): Channels(
                largest_I=_floats(largest, np.float32),
                sum_I=_floats(sum_, np.float64),
                square_sum_I=_floats(square_sum, np.float64),
                num_tokens=num_tokens.as_py(),
            )
            for module, part, largest, sum_, square_sum, num_tokens in zip(
                *(table.column(name) for name in columns), strict=True
            )
        }
    )


def rounding_rows(rounding: FittedWeights, formats: Sequence[Format]) -> list[dict[str, Any]]:
    """Rows of ``rounding.parquet``, which
    :func:`~autoquant_ray.calibrate.stored_rounding.stored_rounding` reads.

    Of formats that round a weight alike, the first of the menu is named.
    """
    names = {format_.weight_key: format_.name for format_ in reversed(formats)}
    return [
        {"module": module, "part": part, "format": names[key]} | _fitted_columns(fitted)
        for (module, part, key), fitted in rounding.items()
    ]


def _fitted_columns(fitted: Fit) -> dict[str, Any]:
    codes = fitted.codes
    return {
        "multipliers": None if fitted.multipliers is None else fitted.multipliers.tobytes(),
        "damping": None if codes is None else codes.damping,
        "codes": None if codes is None else codes.whole.tobytes(),
        "codes_by_unseen_half": None if codes is None else [c.tobytes() for c in codes.without],
    }


def _floats(values: Any, dtype: Any) -> Any:
    """An Arrow list as an array; None where it is null."""
    return None if not values.is_valid else values.values.to_numpy().astype(dtype)
