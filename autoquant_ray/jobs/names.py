"""Checks of names that jobs use: run ids, dates."""

from __future__ import annotations

import datetime
import re
import time

from autoquant_ray.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_id(text: str) -> str:
    """The run id, unchanged, if it is valid.

    Raises:
        ConfigError: It could name a path, or has characters that a run id may not have.
    """
    if not _RUN_ID.fullmatch(text) or ".." in text:
        raise ConfigError(
            f"{text!r} is not a run id: letters, digits, '-', '_' and single dots, 100 at most"
        )
    return text


def parse_date(date: str | None) -> str:
    """A day of a nightly job as ``YYYY-MM-DD``; None gives today's UTC date.

    Raises:
        ConfigError: Not a day of this form.
    """
    if date is None:
        return time.strftime("%Y-%m-%d", time.gmtime())
    try:
        day = datetime.datetime.strptime(date, "%Y-%m-%d").strftime("%Y-%m-%d")
    except ValueError:
        day = None
    if day != date:
        raise ConfigError(f"`date` {date!r} is not a day of the form YYYY-MM-DD")
    return date
