"""The options of ``solve``, built from the fields of a budget, each of which is described once."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import click
from pydantic.fields import FieldInfo

from autoquant_ray.allocate.load import Latency, latency_of
from autoquant_ray.allocate.options import SolveOptions, Written, written_options
from autoquant_ray.cli.options import mapping_option
from autoquant_ray.errors import ConfigError


def budget_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option per field of :class:`SolveOptions`; one that is not given is the default."""
    for name, written in reversed(written_options().items()):
        if name == "latency":
            command = latency_options(command)
        else:
            field = SolveOptions.model_fields[name]
            command = _option(name, field, written)(command)
    return command


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--engine`` and ``--gpu`` alone."""
    for name in ("gpu", "engine"):
        field, written = SolveOptions.model_fields[name], written_options()[name]
        command = _option(name, field, written)(command)
    return command


def take_budget(flags: dict[str, Any]) -> SolveOptions:
    """The budget of a command's flags.

    Raises:
        ConfigError: A value that its field cannot take.
    """
    latency = take_latency(flags)
    allow = {pattern: tuple(names.split(",")) for pattern, names in flags.pop("allow").items()}
    return SolveOptions(latency=latency, allow=allow, pins=flags.pop("pin"), **flags)


def _option(name: str, field: FieldInfo, written: Written) -> Callable[..., Any]:
    flag = written.flag_of(name)
    text = field.description or ""
    if field.annotation is bool:
        return click.option(flag, name, is_flag=True, help=text)
    if written.read is not None:
        parse = _parser(flag, written.read)
        return click.option(flag, name, metavar=written.metavar, callback=parse, help=text)
    if isinstance(field.default, dict):
        return mapping_option(flag, written.metavar or "", text)
    return click.option(
        flag,
        name,
        type=_click_type(field, written),
        metavar=written.metavar,
        default=field.default,
        show_default=field.default is not None,
        help=text,
    )


def _parser(flag: str, parse: Callable[[str], Any]) -> Callable[..., Any]:
    def read(_: click.Context, parameter: click.Parameter, value: str | None) -> Any:
        if value is None:
            return SolveOptions.model_fields[parameter.name or ""].default
        try:
            return parse(value)
        except ValueError as error:
            raise ConfigError(f"{flag}: {error}") from None

    return read


def _click_type(field: FieldInfo, written: Written) -> Any:
    if typing.get_origin(field.annotation) is Literal:
        return click.Choice(typing.get_args(field.annotation))
    if written.least is not None:
        return click.IntRange(min=written.least)
    kinds = [k for k in typing.get_args(field.annotation) if k is not types.NoneType]
    return kinds[0] if kinds else field.annotation


_LATENCY_FIELDS = ("batch", "context", "tokens_per_second", "ms_per_token")
_OPTIONS = (
    click.option(
        "--latency",
        metavar=written_options()["latency"].metavar,
        help=SolveOptions.model_fields["latency"].description,
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
