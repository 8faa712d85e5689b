"""Command-line options built from the config's own fields: a field is described once."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from autoquant_ray.config.sources import Data
from autoquant_ray.config.values import flag_of

_SECTIONS = {
    "Search": (
        *("formats", "disable", "coverage", "expert_groups", "search_routers"),
        *("device", "trust_remote_code"),
    ),
    "Data": (
        *("data", "domain_field", "read_as", "text_field", "split", "pack", "samples"),
        *("hold_out", "data_seed", "seq_len", "loss_on", "skip_bad_samples"),
    ),
    "Budget": (
        *("bits", "bytes", "kv_bytes_per_token", "bits_over", "cost", "max_formats"),
        *("engine", "gpu"),
    ),
    "Scores": (
        *("estimator", "labels", "label_draws", "sample_rows", "min_expert_tokens", "seed"),
        *("dtype", "difference_dtype", "stop_when_stable", "keep_rounded"),
    ),
    "Workers": (
        *("workers", "gpus_per_worker", "cpus_per_worker", "placement", "weight_cache_gib"),
        *(
            "activation_cache_gib",
            "keep_graphs",
            "step_tokens",
            "shard_samples",
            "grace_s",
            "address",
        ),
        *("wait_for_workers", "accelerator", "node_labels"),
    ),
}
"""Heading of the help -> fields below it; all others stand below ``Run``."""


class SectionedCommand(click.Command):
    """A command of many options, whose help lists them under headings."""

    def sections(self, context: click.Context) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Headings with their options, each as flags and text, in the order of the fields."""
        section_of = {name: title for title, names in _SECTIONS.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in (*_SECTIONS, "Run")}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                sections[section_of.get(parameter.name or "", "Run")].append(record)
        return ((title, records) for title, records in sections.items() if records)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """A section per heading."""
        for title, records in self.sections(context):
            with formatter.section(title):
                formatter.write_dl(records)


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def config_options(model: type[BaseModel], exclude: Sequence[str] = ()) -> Decorator:
    """Add one option per field; an option that is not given is None (or empty)."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(model.model_fields.items()):
            if name not in exclude:
                command = _option(name, field)(command)
        return command

    return decorate


def given_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """Only the options that were on the command line."""
    return {name: value for name, value in flags.items() if value is not None and value != ()}


def mapping_option(flag: str, metavar: str, text: str) -> Decorator:
    """A repeatable ``KEY=VALUE`` option that gives a dict."""

    def parse(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
        parsed = {}
        for value in values:
            key, equals, rest = value.rpartition("=")
            if not (key and equals and rest):
                raise click.BadParameter(f"{value!r} is not of the form {metavar}")
            if key in parsed:
                raise click.BadParameter(f"{key!r} is given twice")
            parsed[key] = rest
        return parsed

    return click.option(flag, multiple=True, metavar=metavar, callback=parse, help=text)


def _option(name: str, field: FieldInfo) -> Decorator:
    flag = flag_of(name, field)
    text = field.description or ""
    has_default = not field.is_required() and field.default not in (None, (), "")
    is_switch = field.annotation is bool
    if has_default and (not is_switch or field.default):
        default = "yes" if is_switch else field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text += f"  [default: {shown}]"
    if is_switch and field.default:
        return click.option(flag, name, type=click.Choice(("yes", "no")), default=None, help=text)
    if is_switch:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    if name == "disable":
        return click.option(flag, name, multiple=True, metavar="PATTERN", help=text)
    if name == "node_labels":
        return click.option(flag, name, multiple=True, metavar="KEY=VALUE", help=text)
    if name == "wait_for_workers":
        return click.option(flag, name, metavar="TIME", default=None, help=text)
    if field.annotation == Data:
        return click.option(flag, name, multiple=True, metavar="[NAME=]SOURCE", help=text)
    if name == "bytes":
        return click.option(flag, name, metavar="BYTES", default=None, help=text)
    if name == "stop_when_stable":
        return click.option(flag, name, metavar="SHARE", default=None, help=text)
    return click.option(flag, name, type=_click_type(field), default=None, help=text)


def _click_type(field: FieldInfo) -> Any:
    kinds = typing.get_args(field.annotation)
    if typing.get_origin(field.annotation) is Literal:
        return click.Choice(kinds)
    members = [k for k in kinds if k is not types.NoneType] if kinds else [field.annotation]
    if len(members) == 1 and typing.get_origin(members[0]) is Literal:
        return click.Choice(typing.get_args(members[0]))
    return members[0] if members in ([int], [float]) else str
