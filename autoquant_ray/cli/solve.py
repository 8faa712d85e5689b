"""The options of ``solve`` that say how the domains of the calibration data count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from autoquant_ray.allocate.domain_weights import parse_weights


def domain_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--domains`` and ``--worst-domain``."""

    def parse(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, float]:
        return {} if text is None else parse_weights(text)

    command = click.option(
        "--worst-domain",
        is_flag=True,
        help="Least loss of the domain that loses most, with a proven gap.",
    )(command)
    return click.option(
        "--domains",
        metavar="NAME=WEIGHT,...",
        callback=parse,
        help="Least weighted loss of the domains, such as code=0.7,chat=0.3; one that is not named "
        "counts nothing. Without it all tokens count alike.",
    )(command)
