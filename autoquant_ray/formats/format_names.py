"""Which format names come closest to one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest_formats(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Names to suggest for an unknown one, whatever its case.

    Names that contain it come first, ModelOpt's default presets (``..._DEFAULT_CFG``) before
    others and short ones before long ones; then names that are spelled alike.

    Args:
        name: What was asked for.
        known: All names.
        count: How many at most.
    """
    wanted = name.lower()
    by_lower = {one.lower(): one for one in known}
    containing = sorted(
        (one for one in by_lower if wanted in one),
        key=lambda one: (one != wanted, not one.endswith("default_cfg"), len(one)),
    )
    similar = difflib.get_close_matches(wanted, by_lower, n=count, cutoff=0.3)
    return [by_lower[one] for one in dict.fromkeys([*containing, *similar])][:count]
