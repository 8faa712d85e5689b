"""Formats of tools that quantize by themselves: what in each comes nearest to a format of ours.

A tool quantizes anew, so a recipe says kinds and bits, not scales. Weights must have the same kind
of numbers and inputs must be the same; blocks may be finer. What has no counterpart has None.

Sources: llama.cpp, tools/quantize/README.md and ggml's types; auto-round 0.16
(``auto_round/schemes.py``); mlx-lm 0.32 (``mlx_lm/utils.py``, ``quantize_model``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.gguf_types import gguf_type_of
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.serving.layer_formats import E2M1, E4M3, E8M0, Numbers

_GGUF_BLOCK = 32
_AUTO_ROUND_BITS = (2, 3, 4, 8)
MLX_GROUPS = (32, 64, 128)
"""Weights that share a scale and an offset there."""
_MLX_BITS = (2, 3, 4, 5, 6, 8)
SIXTEEN_BITS: dict[str, Any] = {"llama.cpp": "bf16", "auto-round": {"bits": 16}, "mlx-lm": False}
"""What a tool says of a layer that stays in 16 bits."""


def gguf_type(format_: Format) -> str | None:
    """The type of a GGUF file's tensor; inputs are always in 16 bits or more there."""
    if format_.input is not None:
        return None
    if (type_ := gguf_type_of(format_.weight)) is not None:
        return type_
    weight = Numbers.of(format_.weight)
    kind = _float_kind(weight)
    if kind in ("nvfp4", "mxfp4"):
        return kind
    has_scales = weight.axis == 0 or weight.block >= _GGUF_BLOCK
    if not has_scales or not weight.is_flat or weight.scale is not None:
        return None
    # Symmetric: a 16-bit scale per 32 weights, or (k) a narrow one per 16 in blocks of 256.
    return {3: "q3_k", 4: "q4_0", 5: "q5_0", 6: "q6_k", 8: "q8_0"}.get(weight.bits)


def auto_round_config(format_: Format) -> dict[str, Any] | None:
    """An entry of AutoRound's ``layer_config``. Groups: 0 per tensor, -1 per channel."""
    weight = Numbers.of(format_.weight)
    inputs = None if format_.input is None else Numbers.of(format_.input)
    kind = _float_kind(weight)
    if kind is not None:
        return _auto_round_blocks(kind, weight, inputs)
    if not weight.is_flat or weight.scale is not None or gguf_type_of(format_.weight) is not None:
        return None
    is_float = weight.bits == E4M3
    if not is_float and weight.bits not in _AUTO_ROUND_BITS:
        return None
    group = weight.block or (-1 if weight.axis == 0 else 0)
    entry = {"bits": 8 if is_float else weight.bits, "group_size": group, "sym": True}
    entry["data_type"] = "fp" if is_float else "int"
    if inputs is None:
        return entry | {"act_bits": 16}
    if inputs.bits != weight.bits or inputs.block or entry["bits"] != 8:
        return None
    is_per_token = inputs.is_dynamic
    return entry | {
        "act_bits": 8,
        "act_group_size": -1 if is_per_token else 0,
        "act_sym": True,
        "act_data_type": entry["data_type"],
        "act_dynamic": is_per_token,
    }


def mlx_config(format_: Format) -> dict[str, Any] | None:
    """Parameters of MLX's quantized layers, which take inputs in 16 bits."""
    weight = Numbers.of(format_.weight)
    if format_.input is not None:
        return None
    kind = _float_kind(weight)
    if kind is not None:
        bits = 8 if kind == "mxfp8" else 4
        return {"group_size": weight.block, "bits": bits, "mode": kind}
    group = weight.block or (max(MLX_GROUPS) if weight.axis == 0 else 0)
    if weight.bits not in _MLX_BITS or group not in MLX_GROUPS or weight.scale is not None:
        return None
    return {"group_size": group, "bits": weight.bits, "mode": "affine"}


def compressed_config(format_: Format) -> dict[str, Any] | None:
    """What a group of compressed-tensors says of a format, in the words of AutoRound's entries."""
    weight = Numbers.of(format_.weight)
    if not weight.is_flat or format_.weight.get("backend"):
        return None
    entry: dict[str, Any] = {
        "bits": _width(weight),
        "data_type": data_type(weight),
        "group_size": weight.block or (-1 if weight.axis == 0 else 0),
        "act_bits": 16,
    }
    if format_.input is None:
        return entry
    inputs = Numbers.of(format_.input)
    return with_inputs(entry, data_type(inputs)) | {
        "act_bits": _width(inputs),
        "act_dynamic": inputs.is_dynamic and inputs.scale != E4M3,
    }


def _width(numbers: Numbers) -> Any:
    """Bits of a number."""
    return {E2M1: 4, E4M3: 8}.get(numbers.bits, numbers.bits)


def with_inputs(entry: Mapping[str, Any], data_type: str) -> dict[str, Any]:
    """An entry whose inputs have a type of numbers too; both count where formats are compared."""
    kinds = dict.fromkeys((entry["data_type"], data_type))
    return {**entry, "data_type": " by ".join(kinds), "act_data_type": data_type}


def data_type(numbers: Numbers) -> str:
    """``int``, ``fp``, or ``nv_fp`` and ``mx_fp`` where blocks have small scales."""
    if isinstance(numbers.bits, int):
        return "int"
    return {E4M3: "nv_fp", E8M0: "mx_fp"}.get(numbers.scale, "fp")


COUNTERPARTS: dict[str, Callable[[Format], Any]] = {
    "llama.cpp": gguf_type,
    "auto-round": auto_round_config,
    "mlx-lm": mlx_config,
}
"""Tool -> what it calls a format; None where it has no counterpart."""


def counterpart(format_: Format, tool: str) -> Any:
    """What a tool calls a format; None where it has no counterpart.

    No recipe can say how input channels are scaled, so such a format has none. Factors that can be
    folded are in the model that the tool starts from.
    """
    return None if is_smoothed(format_) else COUNTERPARTS[tool](format_)


def _auto_round_blocks(kind: str, weight: Numbers, inputs: Numbers | None) -> dict[str, Any] | None:
    """AutoRound's own NVFP4, MXFP4 and MXFP8: inputs as weights, scaled while the model runs."""
    if inputs is None or (inputs.bits, inputs.block) != (weight.bits, weight.block):
        return None
    bits = 8 if kind == "mxfp8" else 4
    data_type = "nv_fp" if kind == "nvfp4" else "mx_fp"
    return {
        "bits": bits,
        "group_size": weight.block,
        "data_type": data_type,
        "act_bits": bits,
        "act_group_size": weight.block,
        "act_sym": True,
        "act_data_type": "nv_fp4_with_static_gs" if kind == "nvfp4" else data_type,
        "act_dynamic": True,
    }


def _float_kind(weight: Numbers) -> str | None:
    """``nvfp4``, ``mxfp4`` or ``mxfp8`` with their own blocks."""
    kinds = {
        (E2M1, E4M3, 16): "nvfp4",
        (E2M1, E8M0, 32): "mxfp4",
        (E4M3, E8M0, 32): "mxfp8",
    }
    return kinds.get((weight.bits, weight.scale, weight.block))
