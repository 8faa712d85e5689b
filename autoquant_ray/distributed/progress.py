"""Progress of the driver: one bar on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)

_PLAIN_STEPS = 10


class Advance(Protocol):
    """Called after each finished unit."""

    def __call__(self, note: str = "") -> None:
        """Move on by one; ``note`` is shown beside the bar."""


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show progress of ``total`` units, ``done`` of them finished before.

    Yields:
        A function to call after each unit.
    """
    if sys.stderr.isatty():
        with _bar(title, total, done) as advance:
            yield advance
    else:
        yield _lines(title, total, done)


@contextmanager
def _bar(title: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=note)

        yield advance


def _lines(title: str, total: int, done: int) -> Advance:
    count = done

    def advance(note: str = "") -> None:
        nonlocal count
        count += 1
        step = max(1, total // _PLAIN_STEPS)
        if count % step == 0 or count == total:
            logger.info("%s: %d of %d shards%s", title, count, total, f" {note}" if note else "")

    return advance
