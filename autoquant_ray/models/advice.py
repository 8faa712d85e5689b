"""What to do about a model that transformers does not know, within this package's bounds.

transformers advises to upgrade it, or to install it from source. Both may leave the releases that
ModelOpt works with, so the advice here names the newest that this package's requirements allow.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

from autoquant_ray.errors import one_line

_BOUND = re.compile(r"^transformers\b[^;]*?<\s*(\d+)\.(\d+)")


def why_unreadable(error: Exception, config: Mapping[str, Any]) -> str:
    """Why a config could not be read, in a line, and what helps.

    Args:
        error: What transformers raised.
        config: Content of the config, as far as it could be read.
    """
    import transformers

    types = _types_in(config)
    unknown = next((t for t in types if t not in transformers.CONFIG_MAPPING), None)
    is_about_it = isinstance(error, KeyError) or f"`{unknown}`" in str(error)
    if unknown is None or not is_about_it:
        return one_line(error)
    installed = transformers.__version__
    return (
        f"transformers {installed} does not know the type {unknown!r}"
        f"{upgrade_advice(installed, _requirements())}"
    )


def _types_in(config: Mapping[str, Any]) -> list[str]:
    """The model's type and those of its parts."""
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    stated = config.get("model_type")
    return [
        *([stated] if isinstance(stated, str) else []),
        *(t for p in parts for t in _types_in(p)),
    ]


def upgrade_advice(installed: str, requirements: Sequence[str]) -> str:
    """What follows on "transformers does not know it".

    Args:
        installed: Version of transformers.
        requirements: Of this package, as its metadata states them.
    """
    bounds = [match for line in requirements if (match := _BOUND.match(line))]
    if not bounds:
        return "; if it is newer than that, install a newer transformers that ModelOpt allows"
    major, minor = (int(part) for part in bounds[0].groups())
    release = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if release < (major, minor - 1):
        return (
            "; if it is newer than that: pip install --upgrade "
            f"'transformers<{major}.{minor}', the newest that ModelOpt allows"
        )
    return (
        f", and ModelOpt allows none from {major}.{minor} on; if the type is newer, its own code "
        "can be run with `trust_remote_code`, where the checkpoint brings it"
    )


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("autoquant-ray") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder
        return []
