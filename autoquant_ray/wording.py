"""Small pieces of the sentences that people read.

A message of the library names an option as Python knows it, between back quotes: ```bits` must be
above 0``. The command line writes it as its flag, ``--bits``.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Sequence
from typing import Any


def few(texts: Sequence[str], most: int) -> str:
    """The first texts separated by commas, and how many more there are."""
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")


def shown(value: Any, limit: int = 80) -> str:
    """A value as Python writes it, cut in the middle of its parts and at the end.

    Takes no more time for a value of millions of parts than for one of ten.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def fitted(text: str, longest: int) -> str:
    """A message with its remedy, what comes last, whole; its middle is left out where it is long.

    Args:
        text: What failed; after the last semicolon, what to do.
        longest: Characters that there is room for.
    """
    if len(text) <= longest:
        return text
    _, mark, remedy = text.rpartition("; ")
    end = mark + remedy if 0 < len(mark + remedy) <= longest * 2 // 3 else text[-longest // 2 :]
    start = text[: longest - len(end) - len("...)")]
    is_open = start.count("(") > start.count(")") and end.count("(") == end.count(")")
    return f"{start}...{')' if is_open else ''}{end}"


def with_error(value: float, error: float | None, *, signed: bool = False) -> str:
    """A number with its standard error, if it has one."""
    text = f"{value:+.3g}" if signed else f"{value:.4g}"
    return text if error is None else f"{text} ± {error:.1g}"


def printable(text: str) -> str:
    """A text whose control characters a terminal would show, not obey; line ends and tabs stay."""
    return "".join(
        c if c.isprintable() or c in "\n\t " else c.encode("unicode_escape").decode() for c in text
    )


def as_flags(text: str, names: Collection[str]) -> str:
    """A message of the library in the words of the command line.

    Args:
        text: Names options between back quotes.
        names: Options that the command line has, such as ``max_formats``; others stay as they are.
    """

    def flag(match: re.Match[str]) -> str:
        name = _FLAGS.get(match[1], match[1])
        return f"--{name.replace('_', '-')}" if name in names else match[0]

    return re.sub(r"`([a-z][a-z0-9_]*)`", flag, text)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 70
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 6, 6, 4

_FLAGS = {"pins": "pin", "read_as": "as"}
"""Options whose flag has another name."""
