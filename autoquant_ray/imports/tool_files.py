"""Allocations of other tools, read as formats of a run: AutoRound's, mlx-lm's, llm-compressor's.

Known are AutoRound's ``layer_config`` and ``quantization_config.json`` (what its AutoScheme chose
is in both), the ``quantization`` object of an MLX model's ``config.json``, the sensitivities that
``mlx_lm.dynamic_quant`` writes, and the groups of compressed-tensors, which llm-compressor's
``get_higgs_config`` gives; each of them also inside of a model's ``config.json``. Bits and kinds
are compared, not scales: what is measured is the tool's choice of bits per layer with ModelOpt's
quantizers.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoquant_ray.config.patterns import matching_names
from autoquant_ray.errors import DataError, one_line
from autoquant_ray.export.tool_formats import auto_round_config, compressed_config, mlx_config
from autoquant_ray.formats.algorithms import MAX
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.smoothed import method_of, takes_factors
from autoquant_ray.imports.compressed_groups import compressed_entries
from autoquant_ray.wording import few, shown

logger = logging.getLogger(__name__)

Groups = Mapping[str, Sequence[str]]
"""Searched group -> its modules."""
NO_NAMES: Mapping[str, str] = {}

Counterpart = Callable[[Format], dict[str, Any] | None]
"""What a tool says of a format; None where it has none like it."""

_MAX_NAMED = 3
_NOT_CONVERTED = "modules_to_not_convert"
_SCHEMES: dict[str, dict[str, Any]] = {
    f"W{bits}A16": {"bits": bits, "group_size": 128, "data_type": "int", "act_bits": 16}
    for bits in (2, 3, 4, 8)
} | {"BF16": {"bits": 16}, "FP8_STATIC": {"bits": 8, "data_type": "fp", "act_bits": 8}}


def read_json(path: str) -> Any:
    """The content of a tool's file.

    Raises:
        DataError: Missing, or not JSON, or a layer is there twice.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once_each)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON: {one_line(error)}") from None


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose names JSON lets stand twice."""
    names = Counter(name for name, _ in pairs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{few(twice, _MAX_NAMED)} is there twice; keep one")
    return dict(pairs)


def sensitivities(
    path: str,
    content: Any,
    groups: Groups,
    others: Collection[str] = (),
    in_mlx: Mapping[str, str] = NO_NAMES,
) -> dict[str, float] | None:
    """Group -> mlx-lm's sensitivity, if it is a file of those; None otherwise.

    A sensitivity is the gain of more bits per million weights; a group gets the mean of its layers.
    ``others`` are layers of the model that are not searched; what is said of them is left out.
    ``in_mlx`` has the modules by their names there.

    Raises:
        DataError: An entry is wrong, or a layer or a group is unknown to the other side.
    """
    if not isinstance(content, list):
        return None
    sensitivities: dict[str, list[float]] = {}
    group_of = {name: group for group, modules in groups.items() for name in modules}
    for entry in content:
        is_pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
        is_number = is_pair and isinstance(entry[1], int | float) and not isinstance(entry[1], bool)
        if not is_number or not math.isfinite(entry[1]):
            raise DataError(f"{path}: {shown(entry)} is not a layer's name and its sensitivity")
        module = _ours(entry[0], in_mlx)
        if module is not None and module in group_of:
            sensitivities.setdefault(group_of[module], []).append(float(entry[1]))
        elif module is not None and module not in others:
            raise DataError(f"{path} names {entry[0]!r}, which is no layer of this run")
    missing = [group for group in groups if group not in sensitivities]
    if missing:
        raise DataError(f"{path} has no sensitivity of {few(missing, _MAX_NAMED)}")
    return {group: sum(values) / len(values) for group, values in sensitivities.items()}


def read_allocation(
    path: str,
    content: Any,
    groups: Groups,
    formats: Sequence[Format],
    others: Collection[str] = (),
    in_mlx: Mapping[str, str] = NO_NAMES,
) -> dict[str, str]:
    """Group -> format of the run, from a file that names bits per layer.

    Layers that AutoRound's ``layer_config`` does not name stay in 16 bits; those that an MLX
    dictionary does not name take its defaults. Where layers of a group differ, the widest counts,
    since a group has one format.

    Args:
        path: For messages.
        content: From :func:`read_json`.
        groups: Searched groups.
        formats: The run's menu.
        others: Layers that are not searched, which stay in 16 bits whatever the file says.
        in_mlx: Name of a layer in MLX -> module.

    Raises:
        DataError: Not such a file, an unknown layer, or bits without a counterpart in the menu.
    """
    if isinstance(content, dict) and isinstance(content.get("quantization"), dict):
        content = content["quantization"]
    elif isinstance(content, dict) and isinstance(content.get("quantization_config"), dict):
        content = content["quantization_config"]
    if not isinstance(content, dict) or not content:
        raise DataError(
            f"{path} is neither AutoRound's layer_config nor mlx-lm's quantization or "
            "sensitivities nor a config of compressed-tensors"
        )
    is_mlx = "bits" in content and "quant_method" not in content
    modules = [name for names in groups.values() for name in names]
    layers = [*modules, *others]
    counterpart: Counterpart = mlx_config if is_mlx else auto_round_config
    if "config_groups" in content:
        entries, counterpart = compressed_entries(path, content, layers), compressed_config
    elif is_mlx:
        entries = _mlx_entries(path, content, layers, in_mlx)
    else:
        entries = _auto_round(path, content, layers)
    chosen = {
        module: NONE if entry is None else _format_of(path, module, entry, formats, counterpart)
        for module, entry in entries.items()
        if module not in others
    }
    _list_mappings(path, entries, chosen)
    return _by_group(path, chosen, groups, formats)


def _list_mappings(
    path: str, entries: Mapping[str, Mapping[str, Any] | None], chosen: Mapping[str, str]
) -> None:
    """Log which of the tool's formats became which of the run's, and for how many layers."""
    pairs = Counter((_described(entries[module]), name) for module, name in chosen.items())
    for (theirs, ours), count in pairs.items():
        logger.info("%s: %s is %s here, %d layers", path, theirs, ours, count)


def _described(entry: Mapping[str, Any] | None) -> str:
    """A tool's entry in short, such as ``int4 in groups of 128, inputs int8 (dynamic)``."""
    if entry is None:
        return "16 bits"
    kind = entry.get("data_type", entry.get("mode", "int"))
    text, group = f"{kind}{entry.get('bits')}", entry.get("group_size")
    text += {None: "", -1: " per channel", 0: " per tensor"}.get(group, f" in groups of {group}")
    if (entry.get("act_bits") or 16) < 16:
        text += f", inputs {entry.get('act_data_type') or kind}{entry['act_bits']}"
        text += " (dynamic)" if entry.get("act_dynamic") else ""
    return text


def _auto_round(
    path: str, content: Mapping[str, Any], modules: Sequence[str]
) -> dict[str, Mapping[str, Any] | None]:
    """Module -> its entry; None in 16 bits."""
    default, layers = _default_and_layers(path, content)
    in_blocks = [name for name in modules if re.search(r"\.\d+\.", name)]
    entries: dict[str, Mapping[str, Any] | None] = dict.fromkeys(modules)
    entries |= {name: default for name in in_blocks if default}
    for key, value in layers.items():
        entry = _SCHEMES.get(value.upper()) if isinstance(value, str) else value
        if isinstance(entry, dict) and isinstance(entry.get("scheme"), str):
            entry = _SCHEMES.get(entry["scheme"].upper(), {}) | entry
        if not isinstance(entry, dict) or not {"bits", *default} & set(entry):
            raise DataError(f"{path}: {shown(key)}: {shown(value)} says no bits")
        _require_whole_bits(path, f"{shown(key)}: {shown(value)}", default | entry)
        for name in _matching(path, key, modules):
            entries[name] = default | entry
    for part in _not_converted(path, content):
        entries |= {name: None for name in modules if f".{part}." in f".{name}."}
    entries = {
        name: None if entry is None or entry.get("bits", 16) >= 16 else entry
        for name, entry in entries.items()
    }
    for name, entry in entries.items():
        if entry and (entry.get("sym") is False or entry.get("zero_point") is True):
            raise DataError(
                f"{path}: the weights of {name} are asymmetric, and formats here are symmetric; "
                "write sym: true, or zero_point: false, to compare the bits alone"
            )
    return entries


def _default_and_layers(
    path: str, content: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What counts for layers of decoder blocks that are not named, and what the named ones have."""
    if "quant_method" not in content and "extra_config" not in content:
        return {}, content
    default = {k: v for k, v in content.items() if not isinstance(v, dict | list)}
    layers = _gptq_layers(path, content) | _mapping(path, content, "extra_config")
    if not layers and "bits" not in default:
        raise DataError(
            f"{path}: a config of {shown(content.get('quant_method'))} says no bits of layers; "
            "give a file of AutoRound, mlx-lm or llm-compressor"
        )
    _require_whole_bits(path, f"bits {shown(default.get('bits'))}", default)
    return default, layers


def _require_whole_bits(path: str, what: str, entry: Mapping[str, Any]) -> None:
    if type(entry.get("bits", 16)) is not int:
        raise DataError(f"{path}: {what}: bits must be a whole number")


def _not_converted(path: str, content: Mapping[str, Any]) -> list[Any]:
    """Parts of names of layers that a config of AWQ leaves in 16 bits."""
    parts = content.get(_NOT_CONVERTED) if "quant_method" in content else None
    if parts is not None and not isinstance(parts, list):
        raise DataError(f"{path}: {_NOT_CONVERTED} {shown(parts)} is no list; make it one")
    return parts or []


def _gptq_layers(path: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of GPTQ says of single layers, as AutoRound's ``extra_config`` says it."""
    layers = {}
    for key, value in _mapping(path, content, "dynamic").items():
        is_kept = key.startswith("-:")
        layers[key.removeprefix("-:").removeprefix("+:")] = {"bits": 16} if is_kept else value
    return layers


def _mapping(path: str, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of a config that says something of each layer; empty where there is none."""
    part = content.get(key) or {}
    if not isinstance(part, dict):
        raise DataError(f"{path}: {key} {shown(part)} is no mapping of layers; take the tool's own")
    return part


def _matching(path: str, key: str, modules: Sequence[str]) -> list[str]:
    """Modules that a key means: a whole name, else AutoRound's fragment or regular expression."""
    if key in modules:
        return [key]
    try:
        matches = matching_names(key, modules)
    except ValueError as error:
        raise DataError(
            f"{path} names {shown(key)}, which is neither a layer of this run nor a regular "
            f"expression that is read here: {one_line(error, limit=100)}"
        ) from None
    # Experts one by one in the tool, one module here.
    matches = matches or [name for name in modules if re.match(rf"{re.escape(name)}\.\d+\.", key)]
    if not matches:
        raise DataError(f"{path} names {shown(key)}, which fits no layer of this run")
    return matches


def _mlx_entries(
    path: str, content: Mapping[str, Any], modules: Sequence[str], in_mlx: Mapping[str, str]
) -> dict[str, Mapping[str, Any] | None]:
    default = {"group_size": 64, "mode": "affine"}
    default |= {k: content[k] for k in ("group_size", "bits", "mode") if k in content}
    entries: dict[str, Mapping[str, Any] | None] = dict.fromkeys(modules, default)
    for key, value in content.items():
        if key in default:
            continue
        module = _ours(key, in_mlx)
        if module is None:
            continue
        if module not in entries:
            raise DataError(f"{path} names {shown(key)}, which is no layer of this run")
        if not isinstance(value, bool | dict):
            raise DataError(
                f"{path}: {shown(key)}: {shown(value)} is neither true, false nor parameters"
            )
        entries[module] = None if value is False else default | (value if value is not True else {})
    return entries


def _ours(name: str, in_mlx: Mapping[str, str]) -> str | None:
    """A layer of MLX by the checkpoint's name; None for embeddings, which are not searched here."""
    if (module := in_mlx.get(name)) is not None:
        return module
    if name.endswith("embed_tokens"):
        return None
    if name.startswith("language_model.model."):
        name = "model.language_model." + name.removeprefix("language_model.model.")
    return re.sub(r"\.switch_mlp\.\w+$", ".experts", name)


def _format_of(
    path: str,
    module: str,
    entry: Mapping[str, Any],
    formats: Iterable[Format],
    counterpart: Counterpart,
) -> str:
    """The format of the menu with the same bits and kinds; with the same groups if there is one."""

    def kind(config: Mapping[str, Any]) -> tuple[Any, ...]:
        data_type = config.get("data_type", config.get("mode", "int"))
        return config.get("bits"), config.get("act_bits") or 16, data_type

    # The tool starts from the model's own weights, without factors.
    without = [format_ for format_ in formats if not takes_factors(format_)]
    configs = {f.name: config for f in without if (config := counterpart(f)) is not None}
    same = [name for name, config in configs.items() if kind(config) == kind(entry)]
    if not same:
        shown = {k: v for k, v in entry.items() if k in ("bits", "act_bits", "data_type", "mode")}
        raise DataError(
            f"{path}: {module} has {shown}, and no format of the run has that (it could take "
            f"{', '.join(configs) or 'none of its formats'}); scan with such a format too"
        )
    # It rounds by itself: of formats with the same scales, plain rounding comes nearest.
    methods = {format_.name: method_of(format_) for format_ in without}

    def distance(name: str) -> tuple[bool, ...]:
        scales = [configs[name].get(k) != entry.get(k) for k in ("group_size", "act_dynamic")]
        return (*scales, methods[name] != MAX)

    return min(same, key=distance)


def _by_group(
    path: str, chosen: Mapping[str, str], groups: Groups, formats: Sequence[Format]
) -> dict[str, str]:
    widths = {format_.name: format_.modelopt_compression for format_ in formats} | {NONE: 1.0}
    widest = {
        g: max((chosen[name] for name in modules), key=widths.__getitem__)
        for g, modules in groups.items()
    }
    uneven = [g for g, modules in groups.items() if len({chosen[name] for name in modules}) > 1]
    if uneven:
        logger.warning(
            "%s gives layers of %d group(s) different bits, such as %s; here they share the widest",
            path,
            len(uneven),
            uneven[0],
        )
    return widest
