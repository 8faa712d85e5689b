"""What was fitted to weights, as files of a run: kept, or dropped for the allocation alone.

A dropped run says so in its stage ``fit``, so that later commands can tell it from one that lost
the files. A scan that is resumed with ``keep_rounded`` fits again: the same bytes, and no new
scores.
"""

from __future__ import annotations

from collections.abc import Iterable

from autoquant_ray.errors import StoreError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_fitted
from autoquant_ray.runs.names import ROUNDING, ROUNDING_FILE, part_name
from autoquant_ray.runs.state import DROPPED, RunState


def drop_rounding(state: RunState) -> None:
    """Delete what was fitted to weights; a killed call is finished by the next."""
    directory, entry = state.directory, state.record.stages.get("fit")
    if entry is None:
        return
    state.require_lease()
    if not state.has_dropped_rounding:
        entry["state"] = DROPPED
        state.save()
    for layer in directory.list_parts(ROUNDING):
        directory.delete(part_name(ROUNDING, layer))
    directory.delete_if_empty(ROUNDING)
    directory.delete(ROUNDING_FILE)


def is_rounding_dropped(state: RunState) -> bool:
    """Whether what was fitted to weights was deleted on purpose."""
    return state.has_dropped_rounding and not state.directory.exists(ROUNDING_FILE)


def dropped_formats(state: RunState) -> list[str]:
    """Formats that cannot be used because what was fitted to their weights was dropped."""
    if not is_rounding_dropped(state):
        return []
    return [f.name for f in map(Format.from_json, state.plan["formats"]) if is_fitted(f)]


def require_rounding(state: RunState, used: Iterable[str]) -> None:
    """Check that the fitted weights of formats were not dropped.

    Args:
        state: The run.
        used: Names of formats.

    Raises:
        StoreError: Those of one were.
    """
    dropped = dropped_formats(state)
    name = next((name for name in used if name in dropped), None)
    if name is not None:
        raise StoreError(
            f"{state.directory.uri} was scanned with `keep_rounded` no, which dropped what was "
            f"fitted to the weights in {name}; scan again with `resume` and `keep_rounded` yes, "
            "which fits it again without scoring"
        )
