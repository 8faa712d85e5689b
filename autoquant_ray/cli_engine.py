"""The options of ``solve`` that say where the plan will be served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from autoquant_ray.config import ScanConfig

_NAMES = ("engine", "gpu")


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--engine`` and ``--gpu``, described as a scan's own."""
    for name in reversed(_NAMES):
        text = ScanConfig.model_fields[name].description
        command = click.option(f"--{name}", metavar=name.upper(), help=text)(command)
    return command
