"""The groups of a compressed-tensors config -> what each layer is in, in AutoRound's words.

llm-compressor's ``get_higgs_config`` returns such a config (``config.model_dump_json()`` writes
it), and every checkpoint that it makes has one in its ``config.json``. A layer that no group
targets, or that ``ignore`` names, stays in 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from autoquant_ray.errors import DataError, one_line
from autoquant_ray.export.tool_formats import with_inputs
from autoquant_ray.wording import shown

_LINEAR = "Linear"
_PATTERN = "re:"
_GROUPS = {"tensor": 0, "channel": -1}
_NVFP4_GROUP, _NVFP4_STRATEGY = 16, "tensor_group"
_MX_SCALES = "uint8"
_KINDS = ("int", "float")
"""Numbers of a group."""


def compressed_entries(
    path: str, content: Mapping[str, Any], layers: Sequence[str]
) -> dict[str, Mapping[str, Any] | None]:
    """Layer -> its entry; None in 16 bits.

    Args:
        path: For messages.
        content: A config with ``config_groups``.
        layers: All layers of the run.

    Raises:
        DataError: A group is not as compressed-tensors writes it, names no layer of the run, or
            the config quantizes the KV cache or rotates weights.
    """
    for key in ("kv_cache_scheme", "transform_config"):
        if content.get(key):
            raise DataError(
                f"{path}: {key} {shown(content[key])} has no counterpart here; take it out to "
                "compare the layers' weights and inputs alone"
            )
    groups = content["config_groups"]
    if not isinstance(groups, dict) or not groups:
        raise DataError(f"{path}: config_groups {shown(groups)} has no groups")
    entries: dict[str, Mapping[str, Any] | None] = dict.fromkeys(layers)
    for name, group in sorted(groups.items()):
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise DataError(f"{path}: config_groups {shown(name)} has no list of targets")
        entry = _entry(path, name, group)
        for target in group["targets"]:
            entries |= dict.fromkeys(_matching(path, target, layers), entry)
    ignored = content.get("ignore") or []
    if not isinstance(ignored, list):
        raise DataError(f"{path}: ignore {shown(ignored)} is no list; make it one")
    for target in ignored:
        entries |= dict.fromkeys(_matching(path, target, layers, is_needed=False))
    return entries


def _matching(
    path: str, target: Any, layers: Sequence[str], *, is_needed: bool = True
) -> list[str]:
    """Layers that a target means: a name, a pattern from the start of a name, or all linears."""
    if target == _LINEAR:
        return list(layers)
    text = str(target)
    if text.startswith(_PATTERN):
        try:
            pattern = re.compile(text.removeprefix(_PATTERN))
        except re.error as error:
            raise DataError(
                f"{path}: {shown(target)} is no regular expression: {one_line(error, limit=100)}"
            ) from None
        matches = [name for name in layers if pattern.match(name)]
        # Experts one by one in the tool, one module here.
        matches = matches or [name for name in layers if _is_of_experts(pattern, name)]
    else:
        matches = [name for name in layers if name == text or text.startswith(f"{name}.")]
    if is_needed and not matches:
        raise DataError(f"{path}: target {shown(target)} fits no layer of this run")
    return matches


def _is_of_experts(pattern: re.Pattern[str], name: str) -> bool:
    """Whether a pattern of single experts' linears means those of a module of fused experts."""
    linears = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    return any(pattern.match(f"{name}.0.{linear}") for linear in linears)


def _entry(path: str, name: str, group: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A group's numbers in AutoRound's words."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        return None
    place = f"{path}: config_groups {shown(name)}"
    entry = {
        "bits": _bits(place, "weights", weights),
        "data_type": _data_type(place, weights),
        "group_size": _group_size(weights),
        "act_bits": 16,
    }
    if inputs is None:
        return entry
    act_bits = _bits(place, "input_activations", inputs)
    return with_inputs(entry, _data_type(place, inputs)) | {
        "act_bits": act_bits,
        "act_dynamic": inputs.get("dynamic") is True,
    }


def _bits(place: str, part: str, numbers: Any) -> int:
    bits = numbers.get("num_bits") if isinstance(numbers, dict) else None
    if type(bits) is not int:
        raise DataError(f"{place}: {part} {shown(numbers)} have no num_bits")
    if numbers.get("symmetric") is False:
        raise DataError(
            f"{place}: {part} are asymmetric, and formats here are symmetric; scan with the same "
            "bits and write symmetric: true to compare the bits alone"
        )
    return bits


def _data_type(place: str, numbers: Mapping[str, Any]) -> str:
    kind = numbers.get("type", "int")
    if kind not in _KINDS:
        raise DataError(f"{place}: type {shown(kind)} is unknown; known: {', '.join(_KINDS)}")
    if kind == "int":
        return "int"
    if numbers.get("strategy") == _NVFP4_STRATEGY or numbers.get("group_size") == _NVFP4_GROUP:
        return "nv_fp"
    return "mx_fp" if _MX_SCALES in str(numbers.get("scale_dtype")) else "fp"


def _group_size(numbers: Mapping[str, Any]) -> int:
    strategy = numbers.get("strategy")
    size = numbers.get("group_size")
    return size if isinstance(size, int) else _GROUPS.get(str(strategy), 0)
