"""Which sources the calibration data comes from: one, or several that each are a domain.

On a command line a source with a name is written ``NAME=SOURCE``. A path that exists wins over
that reading. In a config file several sources are a mapping, which leaves no doubt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

MAX_DOMAINS = 64
"""Domains of a run at most: each has scores of its own, and a table of more is not read."""

Data = str | dict[str, str]
"""A source, or name of a domain -> its source."""

FileKind = Literal["text", "json", "csv", "tsv", "parquet", "arrow"]
"""What a file of data holds; ``json`` are rows of JSON, one per line or in one list."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def parse_data(values: str | Sequence[str] | Mapping[str, str]) -> Data:
    """Read what was given as data.

    Args:
        values: One source; sources as on the command line; or name -> source.

    Raises:
        ValueError: Several sources of which one has no name, a name twice or of other characters,
            or too many.
    """
    if isinstance(values, str):
        return values
    if isinstance(values, Mapping):
        return _checked({str(name): str(source) for name, source in values.items()})
    named: dict[str, str] = {}
    for value in values:
        name, source = _split(value)
        if not name:
            if len(values) == 1:
                return value
            raise ValueError(
                f"{value!r} is one of several sources and has no name; write NAME=SOURCE, NAME "
                "of letters, digits, '_' and '-'"
            )
        if name in named:
            raise ValueError(f"two sources have the name {name!r}; give each its own")
        named[name] = source
    return _checked(named)


def _split(value: str) -> tuple[str, str]:
    """Name and source; no name where the whole is a path that exists, or has no name in front."""
    name, equals, source = value.partition("=")
    if not equals or not source or not _NAME.fullmatch(name) or Path(value).expanduser().exists():
        return "", value
    return name, source


def _checked(named: dict[str, str]) -> dict[str, str]:
    if not named:
        raise ValueError("give a source")
    for name, source in named.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name; use letters, digits, '_' and '-'")
        if not source:
            raise ValueError(f"{name!r} has no source; write NAME=SOURCE")
    if len(named) > MAX_DOMAINS:
        raise ValueError(
            f"{len(named)} sources are more than {MAX_DOMAINS} domains; join some of them into "
            "one file"
        )
    return dict(sorted(named.items()))


def sources_of(data: Data) -> dict[str, str]:
    """Name -> source; the name of a single source is ''."""
    return {"": data} if isinstance(data, str) else dict(data)


def data_name(data: Data) -> str:
    """The data in one line, for people."""
    if isinstance(data, str):
        return data
    return ", ".join(f"{name}={source}" for name, source in data.items())


def equal_shares(total: int, count: int) -> list[int]:
    """Divide a number into equal parts; the first ones get one more where it does not divide."""
    return [total // count + (number < total % count) for number in range(count)]
