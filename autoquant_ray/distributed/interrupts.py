"""SIGTERM and Ctrl-C while workers compute: the first asks to stop, the second stops at once.

Only the main thread of a process receives signals; in other threads no stop can be requested.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A request to stop, and the grace period that it starts.

    Args:
        grace_s: Seconds that work in flight may still take.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._deadline_s: float | None = None

    @property
    def is_made(self) -> bool:
        """Whether a stop has been requested."""
        return self._deadline_s is not None

    def make(self) -> None:
        """Request the stop; the grace period starts."""
        self._deadline_s = time.monotonic() + self.grace_s

    def seconds_left(self) -> float:
        """What is left of the grace period, at least 0; all of it before a stop is requested."""
        if self._deadline_s is None:
            return self.grace_s
        return max(0.0, self._deadline_s - time.monotonic())


@contextmanager
def stop_on_signal(grace_s: float) -> Iterator[StopRequest]:
    """Note the first SIGTERM or Ctrl-C instead of being interrupted by it.

    The body must check the request and return. The next signal raises KeyboardInterrupt wherever
    the body is. Signals that the process ignores stay ignored.

    Args:
        grace_s: Seconds that the body may still run after the first signal.

    Yields:
        The request; ``is_made`` becomes true with the first signal.
    """
    request = StopRequest(grace_s)

    def on_signal(*_: Any) -> None:
        if request.is_made:
            raise KeyboardInterrupt
        request.make()

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS} if is_main else {}
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, on_signal)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
