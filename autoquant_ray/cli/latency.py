"""Options of ``solve`` that limit or predict the speed of decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from autoquant_ray.allocate.load import Latency, latency_of
from autoquant_ray.errors import ConfigError

_NAMES = ("batch", "context", "tokens_per_second", "ms_per_token")
_OPTIONS = (
    click.option(
        "--latency",
        metavar="HARDWARE",
        help="Predict the speed of decoding on a card (a100, b200, h100, h200, rtx4090, or a "
        "YAML file of one's own, with the keys of autoquant_ray/hardware/h100.yaml): a roofline "
        "bound, not a measurement.",
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
    given = {name: options.pop(name) for name in _NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    if card is not None:
        return latency_of(card, **given)
    for name in given:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} needs a card; give --latency HARDWARE, such as h100")
    return None
