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
from autoquant_ray.wording import printable

logger = logging.getLogger(__name__)

_PLAIN_STEPS = 10
_REFRESH_S = 0.2
_QUIET_S, _LATER_QUIET_S = 8.0, 60.0
"""Seconds without a line until it is said what is waited for: at first, and after a minute."""


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


class Waiting:
    """Says what is waited for while nothing else is said: every 8 s, after a minute every 60 s.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begin anew: something was said."""
        self._start_s = self._said_s = self._clock()

    def note(self, text: str) -> None:
        """Say ``text`` with the seconds since the start, if it has been quiet for long."""
        now_s = self._clock()
        is_early = now_s - self._start_s < _LATER_QUIET_S
        if now_s - self._said_s >= (_QUIET_S if is_early else _LATER_QUIET_S):
            self._said_s = now_s
            logger.info("%s: %.0f s", text, now_s - self._start_s)


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
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    stderr = sys.stderr
    with Progress(*columns, console=Console(stderr=True)) as bar, _logging_moved(stderr):
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=printable(note))

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
    count, start_s = done, time.monotonic()

    def advance(note: str = "") -> None:
        nonlocal count
        count += 1
        step = max(1, total // _PLAIN_STEPS)
        if count % step == 0 or count == total:
            spent_s = time.monotonic() - start_s
            left_s = spent_s / (count - done) * (total - count)
            left = f", about {left_s:,.0f} s left" if left_s >= 1 else ""
            notes = f"{f', {note}' if note else ''}{left}"
            logger.info("%s: %d of %d %s%s", title, count, total, unit, notes)

    return advance
