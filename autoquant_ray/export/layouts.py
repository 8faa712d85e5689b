"""Which formats a checkpoint can hold, and under which name.

A format is known by both of its quantizers; what no name says all of is refused, because an engine
would compute something else than what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoquant_ray.formats.format import Attributes, Format
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.serving.layer_formats import layer_algo

MODELOPT, COMPRESSED_TENSORS = "modelopt", "compressed-tensors"
LAYOUTS = (MODELOPT, COMPRESSED_TENSORS)
"""How a checkpoint is written."""

NO_ZERO = 2.0**-40
"""Stands for the largest value of a tensor that is all zeros: a scale of 0 would make NaN of it,
and a larger one could spoil what engines take for several layers, the largest of their scales."""

SIXTEEN_BITS = "16 bits"
"""Kind of a quantizer that is not there."""
_PACKED_BY_MODELOPT = frozenset(
    {
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "W8A16",
        "W8A8_SQ_PER_CHANNEL",
        "W4A16_AWQ",
        "NVFP4",
        "W4A16_NVFP4",
        "MXFP8",
    }
)
"""Algorithms whose tensors, as ModelOpt 0.47 packs them, hold all of a format
(``modelopt/torch/export/quant_utils.py``)."""
_COMPRESSED: Mapping[tuple[str, str], str] = {
    ("fp8 tensor", "fp8 tensor"): "float-quantized",
    ("fp8 tensor", SIXTEEN_BITS): "naive-quantized",
    ("fp8 channel", "fp8 token"): "float-quantized",
    ("int8 channel", SIXTEEN_BITS): "pack-quantized",
    ("int8 channel", "int8 tensor"): "int-quantized",
    ("int4 block", SIXTEEN_BITS): "pack-quantized",
}
"""(weight, input) -> format of a group in compressed-tensors 0.20 (``compressors/format.py``)."""
_NO_MATTER = frozenset({"effective_bits", "trt_high_precision_dtype", "calibrator", "enable"})


def stored_as(format_: Format, layout: str) -> str | None:
    """What a layer of this format is called in a checkpoint; None where it cannot be held.

    Args:
        format_: The format.
        layout: ``modelopt`` (a name of ModelOpt's algorithms) or ``compressed-tensors`` (one of
            its formats).
    """
    if is_smoothed(format_):
        return None
    if layout == COMPRESSED_TENSORS:
        return _COMPRESSED.get(grids(format_))
    algo = layer_algo(format_)
    return algo.algo if algo is not None and algo.algo in _PACKED_BY_MODELOPT else None


def grids(format_: Format) -> tuple[str, str]:
    """The kinds of a format's quantizers, weight and input, such as ``("fp8 tensor", "16 bits")``:
    the numbers, and what shares a scale."""
    return _grid(format_.weight), _grid(format_.input)


def block_size(format_: Format) -> int:
    """Weights of one row that share a scale; 0 where a whole row or matrix does."""
    return int((format_.weight.get("block_sizes") or {}).get(-1) or 0)


def shape_problem(format_: Format, shape: Sequence[int]) -> str | None:
    """Why a weight cannot be packed in this format, in words; None where it can.

    Args:
        format_: A format that :func:`stored_as` knows.
        shape: ``(..., out, in)``.
    """
    block = block_size(format_)
    if block and shape[-1] % block:
        return f"rows of {shape[-1]} weights are no whole number of blocks of {block}"
    if format_.weight.get("num_bits") == 4 and shape[-2] % 2:
        return f"{shape[-2]} rows are odd, and two are packed into one"
    return None


def _grid(attributes: Attributes | None) -> str:
    """The kind of a quantizer; unknown ones give their attributes."""
    if attributes is None:
        return SIXTEEN_BITS
    rest = {key: value for key, value in attributes.items() if key not in _NO_MATTER and value}
    bits, blocks = rest.pop("num_bits", 8), dict(rest.pop("block_sizes", None) or {})
    axis, kind = attributes.get("axis"), rest.pop("type", "static")
    rest.pop("axis", None)
    number = {8: "int8", 4: "int4", (4, 3): "fp8"}.get(bits, str(bits))
    scales = {key: blocks.pop(key) for key in ("type", "scale_bits") if key in blocks}
    if rest:
        return str(attributes)
    if not any(blocks.values()):
        if kind == "dynamic":
            return f"{number} token" if -1 in blocks else str(attributes)
        return f"{number} {'tensor' if axis is None else 'channel' if axis == 0 else axis}"
    is_plain = set(blocks) == {-1} and axis is None and not scales.get("scale_bits")
    is_static = scales.get("type", "static") == "static"
    return f"{number} block" if is_plain and is_static else str(attributes)
