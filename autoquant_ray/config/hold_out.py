"""How much of data that a scan would use up is kept for measurements.

What a scan calibrates on cannot say what its allocation loses. Where a source has more samples than
the scan takes, the rest is unseen; where the scan would take all of it, its last samples are kept.
They are chosen by position, so that a scan that goes on and a measurement know the same ones.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from autoquant_ray.config.values import parse_share

HoldOut: TypeAlias = int | float | Literal["auto"]
"""A number of samples, a share of them below 1, or ``auto``."""

_AUTO_SHARE, _AUTO_FEWEST, _AUTO_FROM = 10, 2, 20


def num_held_out(hold_out: HoldOut, num_samples: int) -> int:
    """How many of the samples of a source are kept: ``auto`` a tenth, 2 at least, none below 20.

    Args:
        hold_out: What was asked for; a share keeps 1 at least.
        num_samples: Of the source.
    """
    if hold_out == "auto":
        is_enough = num_samples >= _AUTO_FROM
        return max(_AUTO_FEWEST, num_samples // _AUTO_SHARE) if is_enough else 0
    return max(1, round(hold_out * num_samples)) if isinstance(hold_out, float) else hold_out


def parse_hold_out(value: float | str) -> HoldOut:
    """Parse ``auto``, a number of samples such as ``8``, or a share such as ``0.2`` or ``20%``.

    Raises:
        ValueError: None of these, or a share that is not between 0 and 1.
    """
    text = str(value).strip()
    if text == "auto":
        return "auto"
    if text.isdecimal():
        return int(text)
    try:
        return parse_share(text)
    except ValueError:
        raise ValueError(
            f"{value!r} is neither a number of samples nor a share; write for example 8 or 10%"
        ) from None
