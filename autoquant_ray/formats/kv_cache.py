"""Formats of the KV cache: their names, what they store, and which menus may hold them.

A cache format quantizes the keys and values of an attention as ModelOpt's presets ``FP8_KV_CFG``
and ``NVFP4_KV_CFG`` do, or the keys by the one and the values by the other, as ModelOpt 0.48 does
too: after the rotary embedding, where attention reads them. It has no part in weights, so it is a
choice of cache groups alone, and weight formats are none there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KV_FORMATS: dict[str, dict[str, Any]] = {
    "kv_fp8": {"num_bits": (4, 3), "axis": None},
    "kv_nvfp4": {
        "num_bits": (2, 1),
        "effective_bits": 4.5,
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    },
}
"""Name -> attributes of both quantizers, those of ModelOpt's presets."""
_KEYS_AND_VALUES = "kv_fp8_nvfp4"
KV_VALUES = {_KEYS_AND_VALUES: KV_FORMATS["kv_nvfp4"]}
"""Name -> attributes of the values' quantizer, where it is another than that of the keys."""
KV_FORMATS[_KEYS_AND_VALUES] = KV_FORMATS["kv_fp8"]
KV_PRESETS = {"FP8_KV_CFG": "kv_fp8", "NVFP4_KV_CFG": "kv_nvfp4"}
"""ModelOpt's preset -> the format of the same quantizers."""
KV_BYTES = "kv_bytes_per_token"
"""Name of the cost: bytes that a token of context takes in the cache. A column of ``plan.parquet``,
0 for weights."""
KV_OPTION = "`kv_bytes_per_token`"

_SIXTEEN = 16


def cache_bytes(
    attributes: Mapping[str, Any] | None,
    shapes: Iterable[tuple[int, int]],
    values: Mapping[str, Any] | None = None,
) -> float:
    """Bytes of a token's keys and values in one layer.

    Elements take the format's width; NVFP4 adds 8 bits per block of a head, a partial block counted
    whole. The scale per tensor is a constant of the layer, not of a token.

    Args:
        attributes: Of the quantizers; None: 16 bits.
        shapes: ``(heads, width of a head)`` of the keys and of the values.
        values: Of the values' quantizer, where it is another.
    """
    if attributes is None:
        return sum(heads * width for heads, width in shapes) * _SIXTEEN / 8
    total = 0
    for (heads, width), part in zip(shapes, (attributes, values or attributes), strict=True):
        bits = part["num_bits"]
        block = (part.get("block_sizes") or {}).get(-1)
        element_bits = 1 + sum(bits) if isinstance(bits, tuple) else bits
        scales = 8 * math.ceil(width / block) if block else 0
        total += heads * (width * element_bits + scales)
    return total / 8


def is_described(entry: Mapping[str, Any]) -> bool:
    """Whether a format of ``run.json`` says what it is; imported ones are names only."""
    return bool(entry.get("weight") or entry.get("kv"))


def kv_names(formats: Sequence[str]) -> list[str]:
    """Those of a menu's names that are formats of the KV cache."""
    return [name for name in formats if name in KV_FORMATS]


def menu_problem(formats: Sequence[str], custom: Iterable[str]) -> str | None:
    """What is wrong with the cache formats of a menu; None if nothing is.

    Args:
        formats: Names of the menu.
        custom: Names of custom formats.
    """
    taken = kv_names(list(custom))
    if taken:
        return f"custom format {taken[0]!r} has the name of a KV-cache format; choose another name"
    if formats and len(kv_names(formats)) == len(formats):
        return (
            f"{', '.join(formats)} quantize{'s' if len(formats) == 1 else ''} the KV cache alone; "
            "name a format of weights too, such as wfp8_afp8 (bits: 16 may leave all weights as "
            "they are)"
        )
    return None


def positive_problem(limit: float | None) -> str | None:
    """What is wrong with the number that a limit is; None if nothing is."""
    if limit is None or 0 < limit < math.inf:
        return None
    return f"{KV_OPTION} {limit:g} must be a number above 0"


def limit_problem(has_caches: bool, limit: float | None) -> str | None:
    """What is wrong with a limit on the cache; None if nothing is.

    Args:
        has_caches: Whether formats of the KV cache are to choose from.
        limit: Bytes per token of context, or None.
    """
    if (problem := positive_problem(limit)) is not None:
        return problem
    if has_caches and limit is None:
        return (
            "formats of the KV cache need a limit of their own, else every cache stays in 16 bits: "
            f"give {KV_OPTION} N"
        )
    if limit is not None and not has_caches:
        return (
            f"{KV_OPTION} needs formats of the KV cache to choose from: scan with `formats` "
            f"{','.join(KV_FORMATS)} beside those of weights"
        )
    return None


def reachable_cache(low: float, high: float) -> str:
    """A reachable range in words."""
    return f"{math.ceil(low - 1e-9):,} to {math.ceil(high - 1e-9):,} bytes per token of context"
