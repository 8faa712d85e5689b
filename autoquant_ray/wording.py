"""Small pieces of the sentences that people read.

A message of the library names an option as Python knows it, between back quotes: ```bits` must be
above 0``. The command line writes it as its flag, ``--bits``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


def few(texts: Sequence[str], most: int) -> str:
    """The first texts separated by commas, and how many more there are."""
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")


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


_FLAGS = {"pins": "pin", "read_as": "as"}
"""Options whose flag has another name."""
