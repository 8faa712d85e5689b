"""Checkpoints that are quantized already: read as what they stand for, or refused.

A reader of numbers without their scales gives wrong scores and no error. So every tensor that is
stored in few bits, and every scale of weights, must be explained by the method that the files
state; what is not, is refused before anything is planned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.packed_weight import PackedWeight, missing_part, scale_problem
from autoquant_ray.models.quantized_config import method_name, method_of, stated_quantization
from autoquant_ray.models.quantized_layouts import LAYOUTS, LayoutError
from autoquant_ray.models.stored_tensors import FLOATS, TensorHeader, stored_tensors

_MARKS = frozenset(
    {
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_packed",
        "weight_global_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
        "weight_scales",
        "pre_quant_scale",
        "qweight",
        "qzeros",
        "SCB",
        "W_q",
        "trellis",
        "q_weight",
    }
)
"""Last parts of names that only quantized checkpoints have."""
_INSIDE_WEIGHT = re.compile(r"\.weight(:|\.(absmax|nested_|quant_|_data|_scale|_shift))")
"""Parts of a weight as bitsandbytes, quanto and torchao name them."""
_DAMAGED = (AttributeError, KeyError, TypeError, ValueError)
"""What a description raises whose parts are of other types than their method has."""
_REMEDY = "give the 16-bit model that it was made from"


@dataclass(frozen=True, kw_only=True)
class QuantizedSource:
    """A checkpoint whose weights are dequantized as they are loaded.

    Attributes:
        description: Its format, for people.
        weights: Parameter, by the name that a 16-bit checkpoint would have -> its parts.
        headers: All tensors of the files.
    """

    description: str
    weights: Mapping[str, PackedWeight]
    headers: Mapping[str, TensorHeader]


def describe_source(description: str) -> str:
    """What people are told of a quantized checkpoint.

    Args:
        description: Of :class:`QuantizedSource`.
    """
    return f"{description}, dequantized; 16 bits are those of the dequantized model"


def quantized_source(ref: ModelRef) -> QuantizedSource | None:
    """How to read a checkpoint that is quantized; None for one in 16 bits, and for GGUF.

    Of a hub id whose files are not here yet, only what ``config.json`` says is checked.

    Raises:
        ModelError: It is quantized in a way that is not read here.
    """
    config = stated_quantization(ref)
    headers = stored_tensors(ref)
    if not config:
        mark = next((name for name, h in headers.items() if _is_packed(name, h)), None)
        if mark is not None:
            raise ModelError(
                f"model {ref.name} holds {mark} ({headers[mark].dtype}): it seems to be quantized, "
                f"but its config.json does not say how; {_REMEDY}"
            )
        return None
    method = method_of(config)
    if method not in LAYOUTS:
        raise _refused(ref, config, "which is not read here")
    try:
        description, weights = LAYOUTS[method](config, headers)
        _require_whole(weights, headers)
    except LayoutError as error:
        raise _refused(ref, config, str(error)) from None
    except _DAMAGED as error:
        reason = f"but what its files say of that cannot be read ({one_line(error, 120)})"
        raise _refused(ref, config, reason) from None
    if not weights and headers:
        return None
    return QuantizedSource(description=description, weights=weights, headers=headers)


def _require_whole(
    weights: Mapping[str, PackedWeight], headers: Mapping[str, TensorHeader]
) -> None:
    """Check that all parts of the weights are there and fit, and that nothing packed is left."""
    for packed in weights.values():
        if (part := missing_part(packed, headers)) is not None:
            raise LayoutError(f"and its files lack {part}")
        if (problem := scale_problem(packed, headers)) is not None:
            raise LayoutError(f"and {packed.numbers} cannot be read: {problem}")
    used = {part for packed in weights.values() for part in packed.parts}
    left = next((n for n, h in headers.items() if n not in used and _is_packed(n, h)), None)
    if left is not None:
        raise LayoutError(f"and it is not clear what {left} ({headers[left].dtype}) stands for")


def _is_packed(name: str, header: TensorHeader) -> bool:
    """Whether a tensor has no place in a checkpoint of 16 bits.

    Masks and indices, which old checkpoints hold in integers, have: they are no weights.
    """
    last = name.rpartition(".")[2]
    if last in _MARKS or last.endswith("_scale_inv") or _INSIDE_WEIGHT.search(name):
        return True
    if header.dtype in FLOATS:
        return False
    is_float = header.dtype.startswith("F")
    if last.endswith(("_blocks", "_scales")) or last == "scales":
        return True
    is_weight = last == "weight" or ".experts." in name
    return is_float or (is_weight and len(header.shape) > 1)


def _refused(ref: ModelRef, config: Mapping[str, Any], reason: str) -> ModelError:
    method = method_of(config)
    bits = config.get("bits") or config.get("w_bit")
    algo = config.get("quant_algo")
    details = f", {bits} bits" if bits else f", {algo}" if algo else ""
    return ModelError(
        f"model {ref.name} is quantized already ({method_name(method)}{details}), {reason}; "
        f"{_REMEDY}, or see docs/sources.md"
    )
