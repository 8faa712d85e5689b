"""Format names -> ModelOpt quantizer attributes and stored bits.

A format is a pair of quantizers, one for a module's weight and one for its input, described by
ModelOpt's own ``QuantizerAttributeConfig`` fields, so that what is scored is what
``mtq.quantize`` will do. Names: the pairs ``w{fp4,fp8,int4,int8}_a{fp16,fp8,int8,int4}``, integers
of 3 to 6 bits in blocks of 128, 64 or 32 (``wint5_afp16``, ``wint5_g64_afp16``), types of GGUF
files (``q4_k``), ``kv_fp8`` and ``kv_nvfp4``, ModelOpt's presets by their own name, and custom
entries of the config.
Behind a name may stand how weights are rounded, as in ``wint4_afp16:max``
(:data:`~autoquant_ray.formats.algorithms.METHODS`); the stored bytes are the same. Without it, the
names of :data:`WEIGHTED_BY_DEFAULT` are rounded by ``weighted``, presets by their own algorithm,
and all others by ``max``.

A preset is applied to a module as ``mtq.auto_quantize`` applies it: only entries that match the
bare quantizer name (``*weight_quantizer``) count; entries scoped to paths (``*lm_head*``) do not.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoquant_ray.errors import FormatError, one_line
from autoquant_ray.formats.algorithms import MAX, METHODS, WEIGHTED, checked_algorithm
from autoquant_ray.formats.checks import check_quantizers
from autoquant_ray.formats.format import (
    Attributes,
    Format,
    attributes_from_json,
    attributes_to_json,
)
from autoquant_ray.formats.gguf_types import GGUF_WEIGHTS
from autoquant_ray.formats.kv_cache import KV_FORMATS, KV_PRESETS, KV_VALUES
from autoquant_ray.formats.numbers import blocks_of, is_scaled_by_block, is_static_nvfp4
from autoquant_ray.formats.preset_names import preset_names
from autoquant_ray.wording import shown

_WEIGHTS: dict[str, Attributes] = {
    "fp4": {
        "num_bits": (2, 1),
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
        "effective_bits": 4.5,
    },
    "fp8": {"num_bits": (4, 3), "axis": None},
    "int4": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    "int8": {"num_bits": 8, "axis": 0},
}
_INPUTS: dict[str, Attributes | None] = {
    "fp16": None,
    "fp8": {"num_bits": (4, 3), "axis": None},
    "int8": {"num_bits": 8, "axis": None},
    "int4": {"num_bits": 4, "axis": None},
}
PAIRS: dict[str, tuple[Attributes, Attributes | None]] = {
    f"w{weight}_a{input_}": (_WEIGHTS[weight], _INPUTS[input_])
    for weight in _WEIGHTS
    for input_ in _INPUTS
}
"""The 16 weight/activation pairs."""

_WIDTHS, _BLOCKS = (3, 4, 5, 6), (128, 64, 32)
BLOCK_INTEGERS: dict[str, tuple[Attributes, Attributes | None]] = {
    f"wint{bits}_{'' if block == max(_BLOCKS) else f'g{block}_'}afp16": (
        {"num_bits": bits, "block_sizes": {-1: block, "type": "static"}},
        None,
    )
    for bits in _WIDTHS
    for block in _BLOCKS
    if (bits, block) != (4, 128)  # one of the pairs
}
"""Weights as integers of other widths and in other blocks, inputs in 16 bits."""

OURS: Mapping[str, tuple[Attributes, Attributes | None]] = {
    **PAIRS,
    **BLOCK_INTEGERS,
    **{name: (weight, None) for name, weight in GGUF_WEIGHTS.items()},
}
"""All formats of weights that have a name here: attributes of weights and inputs."""

WEIGHTED_BY_DEFAULT = frozenset(
    [*BLOCK_INTEGERS, *(f"w{weight}_a{input_}" for weight in ("fp4", "int4") for input_ in _INPUTS)]
)
"""Names that mean ``NAME:weighted``: with so few bits, scales by the maximum lose about twice as
much."""


SHARES_SCALE = "shares_scale"
CUSTOM_KEYS = {
    "weight": "a mapping",
    "input": "a mapping or null",
    "algorithm": "a method or a mapping",
    SHARES_SCALE: "true or false",
}
"""What a custom format may have -> what that must be."""
CUSTOM_KEYS_PROBLEM = (
    "unknown key; a custom format has 'weight' and may have 'input', 'algorithm' and 'shares_scale'"
)
Custom = Mapping[str, Mapping[str, Any]]
"""Custom formats of a config."""


def resolve_formats(
    names: tuple[str, ...],
    *,
    device: str,
    custom: Custom | None = None,
) -> list[Format]:
    """Turn format names into :class:`Format` objects, in the order given.

    Args:
        names: Names of the menu.
        device: ``cpu`` or ``cuda``; formats that cannot run there are refused.
        custom: Formats of the config file: name -> :data:`CUSTOM_KEYS` and their values.

    Raises:
        FormatError: Unknown name (with the closest ones), or a format that cannot be scanned.
    """
    resolved = [_resolve(name, custom or {}) for name in names]
    check_device(resolved, device)
    for format_ in resolved:
        check_quantizers(format_)
    return resolved


def require_names(names: Iterable[str], custom: Custom | None = None) -> None:
    """Check names of formats and of methods, without ModelOpt.

    Args:
        names: Names of the menu.
        custom: Formats of the config file.

    Raises:
        FormatError: Unknown ones, all of them.
    """
    presets, ours = preset_names(), [*(custom or {}), *OURS, *KV_FORMATS]
    problems = []
    for name in names:
        plain = name
        while plain not in ours and ":" in plain:
            plain, _, method = plain.rpartition(":")
            if method not in METHODS:
                problems.append(_no_method(name, method))
        if plain not in ours and presets and plain not in presets:
            problems.append(_unknown(plain, [*ours, *sorted(presets)]))
    if problems:
        raise FormatError("; ".join(problems))


def _unknown(name: str, names: list[str]) -> str:
    hint = ", ".join(closest_formats(name, names) or names[:4])
    return f"unknown format {name!r}; closest: {hint}"


def _no_method(name: str, method: str) -> str:
    return (
        f"format {name}: {method!r} is no method of rounding; after the colon may stand "
        f"{', '.join(METHODS)}"
    )


def known_formats() -> list[str]:
    """All names that can be asked for, pairs first, ModelOpt's presets last."""
    from autoquant_ray.modelopt_api import mtq

    return [*OURS, *KV_FORMATS, *sorted(mtq.config.choices)]


def _resolve(name: str, custom: Custom, *, by_default: bool = True) -> Format:
    """A format with the method behind its name, else with its default method if that is wanted."""
    plain, colon, method = name.rpartition(":")
    if colon and name not in custom:
        return _with_method(_resolve(plain, custom, by_default=False), name, method)
    format_ = _without_method(name, custom)
    if by_default and name not in custom and name in WEIGHTED_BY_DEFAULT:
        return _with_method(format_, name, WEIGHTED)
    return format_


def _without_method(name: str, custom: Custom) -> Format:
    algorithm: Attributes | None = None
    shares_scale = custom.get(name, {}).get(SHARES_SCALE, True)
    if name in custom:
        weight, input_ = _custom_attributes(name, custom[name])
        algorithm = checked_algorithm(f"custom format {name!r}", custom[name].get("algorithm"))
    elif (kv := KV_FORMATS.get(name)) is not None:
        return Format(
            name=name,
            weight={},
            input=None,
            modelopt_compression=1.0,
            kv=kv,
            kv_values=KV_VALUES.get(name),
        )
    elif (pair := OURS.get(name)) is not None:
        weight, input_ = pair
    else:
        weight, input_, algorithm = _preset_attributes(name, [*custom, *known_formats()])
    return Format(
        name=name,
        weight=weight,
        input=input_,
        modelopt_compression=(
            _modelopt_compression(name, weight, input_)
            if name in custom or name not in OURS
            else min(_compression(part) for part in (weight, input_) if part is not None)
        ),
        algorithm=algorithm,
        shares_scale=shares_scale,
    )


def _with_method(format_: Format, name: str, method: str) -> Format:
    """A format whose weight scales are found by a method.

    NVFP4 weights, which ModelOpt scales at each use, get stored scales of the same size.
    """
    if method not in METHODS:
        raise FormatError(_no_method(name, method))
    if format_.kv is not None:
        raise FormatError(
            f"format {name}: a KV cache has no stored scales to choose; leave ':' out"
        )
    if format_.algorithm is not None:
        raise FormatError(
            f"format {name}: {format_.name} has the algorithm {format_.algorithm['method']} "
            "already; leave ':' out, or give its quantizers as a custom format"
        )
    weight = format_.weight
    blocks = weight.get("block_sizes") or {}
    if method != MAX and is_static_nvfp4(weight | {"block_sizes": {**blocks, "type": "static"}}):
        weight = weight | {"block_sizes": {**blocks, "type": "static"}}
    algorithm = checked_algorithm(f"format {name}", method)
    return replace(format_, name=name, weight=weight, algorithm=algorithm)


_MOST_BITS = 16
_UNQUANTIZED_BITS = 16


def _custom_attributes(name: str, entry: Mapping[str, Any]) -> tuple[Attributes, Attributes | None]:
    unknown = sorted(set(entry) - set(CUSTOM_KEYS))
    weight = entry.get("weight")
    for attributes in (weight, entry.get("input"), entry.get("algorithm")):
        if attributes and "enable" in attributes:
            raise FormatError(f"custom format {name!r}: 'enable' is implied; leave it out")
    if unknown or not weight:
        raise FormatError(
            f"custom format {name!r} must have 'weight' and may have 'input', 'algorithm' and "
            "'shares_scale'"
        )
    input_ = entry.get("input")
    for attributes in (weight, input_ or {}):
        num_bits = attributes.get("num_bits", 8)
        if isinstance(num_bits, int) and not 2 <= num_bits <= _MOST_BITS:
            raise FormatError(
                f"custom format {name!r}: num_bits {shown(num_bits)} is no number from 2 to "
                f"{_MOST_BITS}"
            )
    restored = attributes_from_json(attributes_to_json(weight))
    return restored, None if input_ is None else attributes_from_json(attributes_to_json(input_))


def _preset_attributes(
    name: str, names: list[str]
) -> tuple[Attributes, Attributes | None, Attributes | None]:
    """Weight, input and algorithm of a preset; None for the algorithm 'max'."""
    from autoquant_ray.modelopt_api import mtq

    if name not in mtq.config.choices:
        raise FormatError(_unknown(name, names))
    preset = getattr(mtq.config, name)
    algorithm = checked_algorithm(f"format {name}", preset.get("algorithm"))
    weight = _last_match(preset["quant_cfg"], "weight_quantizer")
    if isinstance(weight, list):
        raise FormatError(
            f"format {name} quantizes weights twice, one quantizer after the other; only formats "
            "with one weight quantizer can be scanned"
        )
    if weight is None:
        base = KV_PRESETS.get(name, "its base format, and `disable` for the other layers")
        raise FormatError(
            f"format {name} sets no weight quantizer for every layer (it is a recipe for the KV "
            f"cache or for some layers); use {base}"
        )
    return weight, _last_match(preset["quant_cfg"], "input_quantizer"), algorithm


def _last_match(entries: list[dict[str, Any]], quantizer: str) -> Any:
    """Attributes of a quantizer; a list of them where several follow each other; or None."""
    matched: Any = None
    for entry in entries:
        if entry.get("parent_class") or not fnmatch.fnmatch(quantizer, entry["quantizer_name"]):
            continue
        matched = copy.copy(entry["cfg"]) if entry.get("cfg") else None
        if entry.get("enable", True) is False:
            matched = None
    return matched


def _compression(attributes: Attributes) -> float:
    """ModelOpt's estimate for one quantizer of a name of this package, without ModelOpt."""
    num_bits = attributes["num_bits"]
    bits: float = sum(num_bits) + 1 if isinstance(num_bits, tuple) else num_bits
    return float(attributes.get("effective_bits", bits)) / _UNQUANTIZED_BITS


def _modelopt_compression(name: str, weight: Attributes, input_: Attributes | None) -> float:
    from pydantic import ValidationError

    from autoquant_ray.modelopt_api import QuantizeConfig, estimate_quant_compression

    entries = [{"quantizer_name": "*weight_quantizer", "cfg": weight}]
    if input_ is not None:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": input_})
    try:
        return float(estimate_quant_compression(QuantizeConfig(quant_cfg=entries)))
    except ValidationError as error:
        first = error.errors()[0]
        attributes = {*weight, *(input_ or {})}
        place = ".".join(str(part) for part in first["loc"] if part in attributes)
        reason = first["msg"].strip(", ")
        raise FormatError(
            f"format {name!r} is not valid for ModelOpt: {place or 'attributes'}: {reason} "
            f"(got {first['input']!r})"
        ) from None
    except ValueError as error:
        raise FormatError(f"format {name!r} is not valid for ModelOpt: {one_line(error)}") from None


def check_device(formats: Sequence[Format], device: str) -> None:
    """Refuse formats that cannot run on a device.

    Raises:
        FormatError: Names the format and the device.
    """
    for format_ in formats if device == "cpu" else ():
        for attributes in (format_.weight, format_.input, *format_.kv_parts):
            if attributes is None or not is_scaled_by_block(attributes):
                continue
            if is_static_nvfp4(attributes):
                continue
            try:
                blocks_of(attributes)
            except ValueError as error:
                raise FormatError(
                    f"format {format_.name} cannot run on cpu: {error}; scan on a GPU "
                    "(`device` cuda) or choose another format"
                ) from None


def closest_formats(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Names to suggest for an unknown one, whatever its case.

    Names that contain it come first, ModelOpt's default presets (``..._DEFAULT_CFG``) before
    others and short ones before long ones; then names that are spelled alike.

    Args:
        name: What was asked for.
        names: All names.
        count: How many at most.
    """
    wanted = name.lower()
    by_lower = {candidate.lower(): candidate for candidate in names}
    containing = sorted(
        (lower for lower in by_lower if wanted in lower),
        key=lambda lower: (lower != wanted, not lower.endswith("default_cfg"), len(lower)),
    )
    similar = difflib.get_close_matches(wanted, by_lower, n=count, cutoff=0.3)
    return [by_lower[lower] for lower in dict.fromkeys([*containing, *similar])][:count]
