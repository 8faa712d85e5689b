"""Regular expressions that other people's files hold, matched in linear time.

Python's ``re`` goes back and tries again: a pattern of twenty characters can take hours on the name
of a layer. RE2, which pyarrow brings, cannot; it lacks lookarounds and back references.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute

LONGEST_PATTERN = 1000
"""Characters."""


def matching_names(pattern: str, names: Sequence[str], *, from_start: bool = False) -> list[str]:
    """Names in which a regular expression fits somewhere.

    Args:
        pattern: In the syntax of RE2.
        names: Names of layers.
        from_start: Only where it fits from the first character on, as ``re.match``.

    Raises:
        ValueError: RE2 cannot read it; or it is too long.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"a regular expression of {len(pattern)} characters is too long")
    whole = f"^(?:{pattern})" if from_start else pattern
    try:
        fits = pa.compute.match_substring_regex(pa.array(names, pa.string()), pattern=whole)
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return [name for name, is_fit in zip(names, fits.to_pylist(), strict=True) if is_fit]
