"""Names in and around job files: of runs made from paths, of environment variables, run ids."""

from __future__ import annotations

import re

from autoquant_ray.errors import ConfigError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def slug(text: str) -> str:
    """The last part of a path or id in lower case letters, digits and hyphens, 40 at most."""
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower()
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40].strip("-") or "run"


def is_variable(text: str) -> bool:
    """Whether a text can be the name of an environment variable."""
    return bool(_VARIABLE.fullmatch(text))


def check_run_id(text: str) -> str:
    """A run id as it was given.

    Raises:
        ConfigError: It could name a path, or has other characters than run ids have.
    """
    if not _RUN_ID.fullmatch(text) or ".." in text:
        raise ConfigError(
            f"{text!r} is not a run id: letters, digits, '-', '_' and single dots, 100 at most"
        )
    return text
