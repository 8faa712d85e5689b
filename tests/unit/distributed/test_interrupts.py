"""Signals while workers compute, without workers: real signals to this process."""

from __future__ import annotations

import signal
import threading

import pytest

from autoquant_ray.distributed.interrupts import StopRequest, stop_on_signal

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_first_signal_is_noted_and_the_second_interrupts(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signal(5) as stop:
        assert not stop.is_made
        signal.raise_signal(number)
        assert stop.is_made
        assert 0 < stop.seconds_left() <= 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(number) is before


@BOTH
def test_handlers_are_put_back_however_the_body_ends(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signal(5):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
    with pytest.raises(ZeroDivisionError), stop_on_signal(5):
        raise ZeroDivisionError
    assert signal.getsignal(number) is before


def test_signal_that_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal(5) as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_made
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_take_no_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body() -> None:
        with stop_on_signal(5) as stop:
            seen.append((stop.is_made, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_grace_period_counts_from_the_request() -> None:
    stop = StopRequest(0.0)
    assert not stop.is_made
    stop.make()
    assert stop.seconds_left() == 0.0
