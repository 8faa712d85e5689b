"""The options of ``solve`` that say how the domains of the calibration data count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from autoquant_ray.allocate.load import Latency, latency_of
from autoquant_ray.config.domain_weights import parse_weights
from autoquant_ray.config.expert_groups import parse_expert_groups
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ConfigError


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


_TARGET_FIELDS = ("engine", "gpu")


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--engine`` and ``--gpu``, described as a scan's own."""
    for name in reversed(_TARGET_FIELDS):
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


_LATENCY_FIELDS = ("batch", "context", "tokens_per_second", "ms_per_token")
_OPTIONS = (
    click.option(
        "--latency",
        metavar="HARDWARE",
        help="Predict the speed of decoding on a card (a100, b200, h100, h200, rtx4090, or a "
        "YAML file of yours, with the keys of autoquant_ray/allocate/hardware/h100.yaml): a "
        "roofline bound, not a measurement.",
    ),
    click.option(
        "--batch", type=click.IntRange(min=1), help="Sequences decoded at once.  [default: 1]"
    ),
    click.option(
        "--context",
        type=click.IntRange(min=1),
        help="Tokens of each sequence that are cached, and length of the prefill.  [default: 1024]",
    ),
    click.option(
        "--tokens-per-second", type=float, help="Budget: least throughput, the batch together."
    ),
    click.option(
        "--ms-per-token", type=float, help="Budget: longest decode step, a token per sequence."
    ),
)


def latency_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_latency(options: dict[str, Any]) -> Latency | None:
    """Take these options out of a command's others.

    Raises:
        ConfigError: An unknown card, a wrong file or value, or a speed without a card.
    """
    card = options.pop("latency")
    given = {name: options.pop(name) for name in _LATENCY_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if card is not None:
        return latency_of(card, **given)
    for name in given:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} needs a card; give --latency HARDWARE, such as h100")
    return None
