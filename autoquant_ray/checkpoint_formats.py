"""Which formats a checkpoint can hold, and under which name.

ModelOpt's exporter takes a layer's algorithm from the weight quantizer and little else: a layer
with 4-bit weights and 4-bit inputs comes out as ``W4A16_AWQ``, and nothing says that its inputs
should be quantized. So a format is looked up here by both of its quantizers, and what is not in
the table is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoquant_ray.formats import Attributes, Format

MODELOPT, COMPRESSED_TENSORS = "modelopt", "compressed-tensors"
LAYOUTS = (MODELOPT, COMPRESSED_TENSORS)
"""How a checkpoint is written."""

SIXTEEN_BITS = "16 bits"
"""Kind of a quantizer that is not there."""
_ALGORITHMS: dict[tuple[str, str], str] = {
    ("fp8 tensor", "fp8 tensor"): "FP8",
    ("fp8 channel", "fp8 token"): "FP8_PER_CHANNEL_PER_TOKEN",
    ("int8 channel", SIXTEEN_BITS): "W8A16",
    ("int8 channel", "int8 tensor"): "W8A8_SQ_PER_CHANNEL",
    ("int4 block", SIXTEEN_BITS): "W4A16_AWQ",
    ("nvfp4", "nvfp4"): "NVFP4",
    ("nvfp4", SIXTEEN_BITS): "W4A16_NVFP4",
    ("mxfp8", "mxfp8"): "MXFP8",
}
"""(weight, input) -> per-layer algorithm that ModelOpt 0.47 writes and whose tensors hold all of
it (``modelopt/torch/export/quant_utils.py``, ``get_quantization_format``)."""
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
    table = _ALGORITHMS if layout == MODELOPT else _COMPRESSED
    return table.get(grids(format_))


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
    if _grid(format_.weight) == "int4 block" and shape[-2] % 2:
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
    number = {8: "int8", 4: "int4", (4, 3): "fp8", (2, 1): "fp4"}.get(bits, str(bits))
    scales = {key: blocks.pop(key) for key in ("type", "scale_bits") if key in blocks}
    if rest:
        return str(attributes)
    if not any(blocks.values()):
        if kind == "dynamic":
            return f"{number} token" if -1 in blocks else str(attributes)
        return f"{number} {'tensor' if axis is None else 'channel' if axis == 0 else axis}"
    if set(blocks) != {-1} or axis is not None:
        return str(attributes)
    if scales.get("scale_bits") == (4, 3) and number == "fp4" and blocks[-1] == 16:
        return "nvfp4"
    if scales.get("scale_bits") == (8, 0) and blocks[-1] == 32:
        return f"mx{number}"
    return f"{number} block" if scales.get("type", "static") == "static" else str(attributes)
