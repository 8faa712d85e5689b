"""Progress of the driver: a bar on a terminal or in a notebook, plain lines elsewhere.

Bar and lines go to stderr. In a notebook the bar is one output of the cell, updated in place; it
needs no widgets, as rich's own bar does.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Protocol

from autoquant_ray.notebook import notebook_display

logger = logging.getLogger(__name__)

_PLAIN_STEPS = 10
_REFRESH_S = 0.2


class Throughput:
    """Units per second since it was made.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start_s = clock()
        self._num_units = 0

    def add(self, num_units: int) -> float:
        """Count units; returns the units per second so far."""
        self._num_units += num_units
        return self._num_units / max(self._clock() - self._start_s, 1e-9)


class Advance(Protocol):
    """Called after each finished unit."""

    def __call__(self, note: str = "") -> None:
        """Move on by one; ``note`` is shown beside the bar."""


@contextmanager
def progress(title: str, total: int, done: int = 0, *, unit: str = "shards") -> Iterator[Advance]:
    """Show progress of ``total`` units, ``done`` of them finished before.

    Yields:
        A function to call after each unit.
    """
    display = notebook_display()
    if display is not None:
        with _cell_output(display, title, total, done, unit) as advance:
            yield advance
    elif sys.stderr.isatty():
        with _bar(title, total, done) as advance:
            yield advance
    else:
        yield _lines(title, total, done, unit)


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
    stderr = sys.stderr
    with Progress(*columns, console=Console(stderr=True)) as bar, _logging_moved(stderr):
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=note)

        yield advance


@contextmanager
def _cell_output(display: Any, title: str, total: int, done: int, unit: str) -> Iterator[Advance]:
    count, text, next_s = done, "", 0.0

    def content() -> dict[str, str]:
        line = f"{title}: {count} of {total} {unit}{f', {text}' if text else ''}"
        bar = f'<progress value="{count}" max="{total}"></progress>'
        return {"text/plain": line, "text/html": f"{bar} {escape(line)}"}

    handle = display.display(content(), raw=True, display_id=True)

    def advance(note: str = "") -> None:
        nonlocal count, text, next_s
        count, text = count + 1, note
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + _REFRESH_S
            handle.update(content(), raw=True)

    try:
        yield advance
    finally:
        handle.update(content(), raw=True)


@contextmanager
def _logging_moved(stderr: Any) -> Iterator[None]:
    """Send log lines through rich, which prints them above the bar; else they would break it."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stderr
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(stderr)


def _lines(title: str, total: int, done: int, unit: str) -> Advance:
    count = done

    def advance(note: str = "") -> None:
        nonlocal count
        count += 1
        step = max(1, total // _PLAIN_STEPS)
        if count % step == 0 or count == total:
            logger.info("%s: %d of %d %s%s", title, count, total, unit, f", {note}" if note else "")

    return advance
