"""Types of what calibration hands to quantizers."""

from __future__ import annotations

from typing import Any

Statistics = dict[tuple[str, str], Any]
"""(module name, statistic name) -> value: the rows of ``calibration.parquet`` (numbers), and those
of ``channels.parquet`` (:class:`~autoquant_ray.calibrate.channels.Channels`)."""

CHANNELS = "channels"
"""Name of this statistic of a module."""

Maxima = dict[str, dict[str, Any]]
"""Module name -> statistic (``input_amax``, ...) -> value, from calibration."""
