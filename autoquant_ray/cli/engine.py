"""The options of ``solve`` that say where the plan will be served, and which experts are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from autoquant_ray.config.expert_groups import parse_expert_groups
from autoquant_ray.config.scan import ScanConfig

_NAMES = ("engine", "gpu")


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--engine`` and ``--gpu``, described as a scan's own."""
    for name in reversed(_NAMES):
        text = ScanConfig.model_fields[name].description
        command = click.option(f"--{name}", metavar=name.upper(), help=text)(command)
    return command


def experts_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--expert-groups`` of ``solve``."""
    return click.option(
        "--expert-groups",
        metavar="GROUPS",
        callback=_expert_groups,
        help="Of a run scanned with --expert-groups expert or K: layer, expert, or another K. "
        "[default: as scanned]",
    )(command)


def _expert_groups(_: click.Context, __: click.Parameter, value: str | None) -> Any:
    try:
        return None if value is None else parse_expert_groups(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
