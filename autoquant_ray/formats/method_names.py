"""Which formats of a menu are the same format rounded by different methods, as their names say.

``wint4_afp16:max`` and ``wint4_afp16:awq`` are the same bytes rounded by different methods, and so
is ``wint4_afp16``, whose method is not in its name: ``weighted``, or ``max`` in runs of earlier
versions. The run's record of a format says it. Plain rounding, by the maximum, is what every method
is compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.formats.algorithms import FITTED, MAX, METHODS
from autoquant_ray.formats.kv_cache import is_described


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a format of a menu rounds weights.

    Attributes:
        method: What its name says, or else ModelOpt's algorithm.
        plain: Name of the same format rounded plainly, itself where it is; None where the menu has
            none.
    """

    method: str
    plain: str | None


def without_method(name: str) -> str:
    """The name of a format without the method behind it."""
    return _parts(name)[0]


def same_or_plain(name: str, available: Collection[str]) -> str | None:
    """A format, or the same one by another method, plainly if possible; None where there is none.

    Args:
        name: The format.
        available: Formats that can be taken, in the order of the menu.
    """
    base = without_method(name)
    siblings = (other for other in available if without_method(other) == base)
    first = (other for other in (name, f"{base}:{MAX}", base) if other in available)
    return next(first, next(siblings, None))


def names_methods(names: Iterable[str]) -> bool:
    """Whether a method stands behind any of the names."""
    return any(_parts(name)[1] is not None for name in names)


def has_methods(formats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether formats differ in how they round: their names say so, or some are fitted to inputs.

    Args:
        formats: The menu as ``run.json`` has it.
    """
    fitted = (f for f in formats if (f.get("algorithm") or {}).get("method") in FITTED)
    return names_methods(f["name"] for f in formats) or any(fitted)


def roundings(formats: Sequence[Mapping[str, Any]]) -> dict[str, Rounding]:
    """Format -> how it rounds weights; formats of the KV cache and imported ones have no entry.

    Args:
        formats: The menu as ``run.json`` has it.
    """
    weights = {f["name"]: f for f in formats if is_described(f) and not f.get("kv")}
    plain = {
        name
        for name, entry in weights.items()
        if entry.get("algorithm") is None and _parts(name)[1] in (None, MAX)
    }
    rounded = {}
    for name, entry in weights.items():
        base, method = _parts(name)
        siblings = (name, f"{base}:{MAX}", base)
        rounded[name] = Rounding(
            method=method or (entry.get("algorithm") or {}).get("method", MAX),
            plain=next((sibling for sibling in siblings if sibling in plain), None),
        )
    return rounded


def _parts(name: str) -> tuple[str, str | None]:
    """A format's name without its method, and the method; None where it names none."""
    base, _, method = name.rpartition(":")
    return (base, method) if base and method in METHODS else (name, None)
