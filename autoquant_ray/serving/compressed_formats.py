"""Formats as checkpoints of compressed-tensors describe them: quantizer attributes -> a scheme.

A group of such a checkpoint states numbers, strategies and whether inputs are scaled while the
model runs. Here each combination that says all of a format has a short name, which is that of
vLLM's schemes. The names of NVFP4 and MX formats are ModelOpt's, because they are the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoquant_ray.formats.format import Attributes, Format
from autoquant_ray.formats.menu import BLOCK_INTEGERS
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.serving.layer_formats import LayerAlgo, layer_algo

SIXTEEN_BITS = "16 bits"
"""Kind of a quantizer that is not there."""
SCHEMES: Mapping[tuple[str, str], str] = {
    ("int4 block", SIXTEEN_BITS): "W4A16",
    ("int8 channel", SIXTEEN_BITS): "W8A16",
    ("int8 channel", "int8 tensor"): "W8A8_INT8",
    ("int8 channel", "int8 token"): "W8A8_INT8_PER_TOKEN",
    ("fp8 tensor", "fp8 tensor"): "W8A8_FP8",
    ("fp8 channel", "fp8 token"): "W8A8_FP8_PER_CHANNEL_PER_TOKEN",
    ("fp8 tensor", SIXTEEN_BITS): "W8A16_FP8",
    ("int4 block", "fp8 token"): "W4A8_FP8",
    ("int4 block", "int8 token"): "W4A8_INT8",
}
"""Kinds of weights and inputs, see :func:`grids` -> scheme."""
BLOCKS = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32, "MXFP4": 32}
"""Formats whose name is ModelOpt's -> the one size of block that there is."""
_NO_MATTER = frozenset({"effective_bits", "trt_high_precision_dtype", "calibrator", "enable"})


def compressed_scheme(format_: Format) -> LayerAlgo | None:
    """The scheme of a format; None where none says all of it."""
    if is_smoothed(format_):
        return None
    algo = layer_algo(format_)
    if algo is not None and BLOCKS.get(algo.algo) == algo.group_size:
        return algo
    scheme = SCHEMES.get(grids(format_))
    return None if scheme is None else LayerAlgo(scheme, block_size(format_))


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
        format_: A format that a layout has a name for.
        shape: ``(..., out, in)``.
    """
    block = block_size(format_)
    if block and shape[-1] % block:
        return f"rows of {shape[-1]} weights are no whole number of blocks of {block}"
    if format_.weight.get("num_bits") == 4 and shape[-2] % 2:
        return f"{shape[-2]} rows are odd, and two are packed into one"
    return None


def fitting_format(format_: Format, shapes: Sequence[Sequence[int]]) -> str | None:
    """The format of the same integers in the largest smaller blocks that are whole in all rows.

    Args:
        format_: A format that does not fit.
        shapes: Of weights, each ``(..., out, in)``.

    Returns:
        Its name; None where there is none.
    """
    bits, block = format_.weight.get("num_bits"), block_size(format_)
    fitting = {
        size: name
        for name, (weight, input_) in BLOCK_INTEGERS.items()
        if weight["num_bits"] == bits
        and input_ is format_.input
        and (size := weight["block_sizes"][-1]) < block
        and all(shape[-1] % size == 0 for shape in shapes)
    }
    return fitting[max(fitting)] if fitting else None


def experts_problem(shapes: Sequence[Sequence[int]]) -> str | None:
    """Why vLLM does not find quantized experts in this layout, in words; None where it does.

    It looks for three linears of the first expert (``CompressedTensorsMoEMethod.get_moe_method`` of
    0.32.0), of which experts without a gate have two.

    Args:
        shapes: Of a module's weights; other modules than experts have no problem.
    """
    if len(shapes) == 2 and shapes[0][-2] != 2 * shapes[1][-1]:
        return "vLLM finds no experts without a gate"
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
