"""Whether values from JSON are what a typed dict says, and which key is not."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from autoquant_ray.wording import shown

_MOST_PARTS = 60


def problem_of(value: Any, kind: Any, key: str) -> str | None:
    """What is wrong with a value, with its key; None where nothing is.

    Numbers that are counts are 0 or more, and no number is NaN or infinite. Keys that a typed dict
    does not name are left alone.

    Args:
        value: From JSON.
        kind: What it should be: a type, a union, ``list[...]``, ``dict[...]`` or a typed dict.
        key: Where it stands.
    """
    if kind is Any:
        return None
    if typing.is_typeddict(kind):
        return _of_typed_dict(value, kind, key)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.NotRequired, typing.Required):
        return problem_of(value, parts[0], key)
    if origin in (types.UnionType, typing.Union):
        problems = [problem_of(value, part, key) for part in parts]
        return None if None in problems else problems[0]
    if origin is list and isinstance(value, list):
        problems_in_order = (
            problem_of(part, parts[0], f"{key}[{n}]") for n, part in enumerate(value)
        )
        return next(filter(None, problems_in_order), None)
    if origin is dict and isinstance(value, Mapping):
        problems_in_order = (
            problem_of(part, parts[1], f"{key}.{str(name)[:_MOST_PARTS]}")
            for name, part in value.items()
        )
        return next(filter(None, problems_in_order), None)
    plain = kind if origin is None else origin
    if _is_plain(value, plain):
        return None
    name = "null" if plain in (None, types.NoneType) else plain.__name__
    return f"`{key}` is {shown(value)}, not {_WORDS.get(name, name)}"


_WORDS = {
    "int": "a whole number of at least 0",
    "float": "a finite number",
    "str": "a text",
    "dict": "a mapping",
    "list": "a list",
    "bool": "true or false",
}


def _is_plain(value: Any, kind: Any) -> bool:
    if kind in (None, types.NoneType):
        return value is None
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and 0 <= value < 2**63
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _of_typed_dict(value: Any, kind: Any, key: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"`{key}` is {shown(value)}, not a mapping"
    for name, part in typing.get_type_hints(kind, include_extras=True).items():
        if name in value:
            if (problem := problem_of(value[name], part, f"{key}.{name}")) is not None:
                return problem
        elif kind.__total__ and typing.get_origin(part) is not typing.NotRequired:
            return f"it lacks `{key}.{name}`"
    return None
