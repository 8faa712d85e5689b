"""How many bits a quantized weight takes on disk, scales included."""

from __future__ import annotations

import math

from autoquant_ray.formats.format import Attributes, Format
from autoquant_ray.formats.gguf_types import GGUF_TYPES, fitting_type, gguf_type_of
from autoquant_ray.formats.smoothed import smoothing_bits


def stored_bits(attributes: Attributes, shape: tuple[int, ...]) -> int:
    """Bits that a quantized weight takes on disk, scales included.

    Elements take the format's width. Scales: one float32 per tensor or per output channel;
    block formats one scale per block of the input dimension, a partial block counted whole as
    ModelOpt pads it: 8 bits where the format fixes them (NVFP4, MX), else 16. NVFP4 adds its
    float32 scale per tensor. A type of GGUF files takes what it takes there, or what the type does
    that its rows get in place of it.

    Args:
        attributes: Weight quantizer attributes.
        shape: ``(out, in)``, or ``(experts, out, in)`` for fused experts.
    """
    if (name := gguf_type_of(attributes)) is not None:
        return _gguf_bits(name, shape)
    num_bits = attributes.get("num_bits", 8)
    width = num_bits if isinstance(num_bits, int) else sum(num_bits) + 1
    matrices = math.prod(shape[:-2])
    rows, columns = shape[-2], shape[-1]
    payload = matrices * rows * columns * width
    blocks = {k: v for k, v in (attributes.get("block_sizes") or {}).items() if isinstance(k, int)}
    if not any(blocks.values()):
        scales = rows if attributes.get("axis") is not None or -1 in blocks else 1
        return payload + matrices * scales * 32
    scale_bits = attributes["block_sizes"].get("scale_bits")
    columns_of_blocks = math.ceil(columns / (blocks.get(-1) or columns))
    rows_of_blocks = math.ceil(rows / (blocks.get(-2) or 1))
    scale_width = 16 if scale_bits is None else sum(scale_bits) + (0 if scale_bits[0] == 8 else 1)
    second_scale = 32 if scale_bits == (4, 3) else 0
    return payload + matrices * (columns_of_blocks * rows_of_blocks * scale_width + second_scale)


def _gguf_bits(name: str, shape: tuple[int, ...]) -> int:
    """Bits of a tensor of a GGUF file; of one that fits no type, those that it keeps."""
    fitting = fitting_type(name, shape[-1])
    if fitting is None:
        return math.prod(shape) * 16
    type_ = GGUF_TYPES[fitting]
    return math.prod(shape) // type_.block * type_.num_bytes * 8


def format_bits(format_: Format, shape: tuple[int, ...], *, is_linear: bool = True) -> int:
    """Bits that a weight takes on disk under a format, with the factors of its input channels.

    Args:
        format_: The format.
        shape: As in :func:`stored_bits`.
        is_linear: Whether it is a linear's weight: experts have no such factors.
    """
    factor_bits = smoothing_bits(format_, shape) if is_linear else 0
    return stored_bits(format_.weight, shape) + factor_bits
