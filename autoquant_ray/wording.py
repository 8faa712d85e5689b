"""Small pieces of the sentences that people read."""

from __future__ import annotations

from collections.abc import Sequence


def few(texts: Sequence[str], most: int) -> str:
    """The first texts separated by commas, and how many more there are."""
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")
