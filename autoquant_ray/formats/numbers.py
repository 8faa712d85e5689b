"""What quantizer attributes say about numbers, blocks and scales: as facts, and in words.

Blocks whose scale is computed from the values themselves (``type: dynamic``, with ``scale_bits``)
are NVFP4 and the MX formats; NVFP4 weights may also have calibrated scales (``type: static``).
ModelOpt quantizes them by CUDA kernels; :mod:`autoquant_ray.quantize.backends.block_formats` does
it on CPU, for the formats that are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.formats.gguf_types import GGUF_TYPES, gguf_type_of

E4M3_SCALE, E8M0_SCALE = (4, 3), (8, 0)
BLOCK_SIZES = (8, 16, 32)
"""Those that ModelOpt's CUDA kernel for blocks takes."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A small number format: sign, exponent, mantissa; rounded to nearest even, saturating.

    Attributes:
        name: As in the OCP Microscaling specification 1.0.
        mantissa_bits: Without the leading one.
        smallest_exponent: Of a normal number; numbers below it are as far apart as those above.
        largest: Largest finite value.
    """

    name: str
    mantissa_bits: int
    smallest_exponent: int
    largest: float


E4M3 = Number(name="e4m3", mantissa_bits=3, smallest_exponent=-6, largest=448.0)
E2M1 = Number(name="e2m1", mantissa_bits=1, smallest_exponent=0, largest=6.0)
NUMBERS: dict[Any, Number] = {
    (2, 1): E2M1,
    (2, 3): Number(name="e2m3", mantissa_bits=3, smallest_exponent=0, largest=7.5),
    (3, 2): Number(name="e3m2", mantissa_bits=2, smallest_exponent=-2, largest=28.0),
    (4, 3): E4M3,
    (5, 2): Number(name="e5m2", mantissa_bits=2, smallest_exponent=-14, largest=57344.0),
    # Whole numbers: the exponent never leaves its smallest value, so all steps are 1.
    8: Number(name="int8", mantissa_bits=7, smallest_exponent=7, largest=127.0),
}
"""ModelOpt's ``num_bits`` -> number; ModelOpt's int8 leaves -128 out."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of consecutive values of a row, each with a scale made from its own maximum.

    Attributes:
        number: Of the elements.
        size: Values per block.
        has_second_scale: Scales are e4m3 under one float32 scale per tensor (NVFP4); else they
            are powers of two (e8m0, the MX formats).
    """

    number: Number
    size: int
    has_second_scale: bool


def is_scaled_by_block(attributes: Mapping[str, Any]) -> bool:
    """Whether ModelOpt runs its CUDA kernels for NVFP4 and MX under these attributes."""
    sizes = attributes.get("block_sizes") or {}
    dynamic = sizes.get("type") == "dynamic" and sizes.get("scale_bits") is not None
    return attributes.get("num_bits") == (2, 1) or dynamic


def is_static_nvfp4(attributes: Mapping[str, Any]) -> bool:
    """Whether these are NVFP4 blocks with calibrated e4m3 scales, for weights."""
    sizes = attributes.get("block_sizes") or {}
    axes = [key for key in sizes if isinstance(key, int)]
    is_static = sizes.get("type", "static") == "static" and sizes.get("scale_bits") == E4M3_SCALE
    is_along_rows = axes == [-1] and sizes[-1] in BLOCK_SIZES
    return attributes.get("num_bits") == (2, 1) and is_static and is_along_rows


def has_tensor_scale(attributes: Mapping[str, Any]) -> bool:
    """Whether a weight has a stored scale for the whole of it: its only one, or NVFP4's second."""
    sizes = attributes.get("block_sizes") or {}
    if attributes.get("num_bits") == (2, 1) and sizes.get("scale_bits") == E4M3_SCALE:
        return True
    is_static = "dynamic" not in (attributes.get("type"), sizes.get("type"))
    return is_static and not sizes and attributes.get("axis") is None


def has_calibrated_maximum(attributes: Mapping[str, Any]) -> bool:
    """Whether ModelOpt calibrates a quantizer's maximum ahead of use.

    Not where each token or block is scaled by its own, nor where the maximum is a constant; NVFP4's
    second scale is calibrated.
    """
    if attributes.get("use_constant_amax") or attributes.get("constant_amax") is not None:
        return False
    sizes = attributes.get("block_sizes") or {}
    is_mx = sizes.get("type") == "dynamic" and sizes.get("scale_bits") == E8M0_SCALE
    return attributes.get("type") != "dynamic" and not is_mx


def blocks_of(attributes: Mapping[str, Any]) -> Blocks:
    """The blocks that attributes ask for, of those that can be computed on CPU.

    Args:
        attributes: For which :func:`is_scaled_by_block` holds.

    Raises:
        ValueError: They cannot; the text says what is different and what there is.
    """
    sizes = attributes.get("block_sizes") or {}
    scale, size = sizes.get("scale_bits"), sizes.get(-1)
    num_bits = attributes.get("num_bits", 8)
    if sizes.get("type") != "dynamic":
        raise ValueError("fp4 needs block_sizes with 'type: dynamic' there")
    if scale not in (E4M3_SCALE, E8M0_SCALE):
        raise ValueError(f"scale_bits {scale} is not known there, only (4, 3) and (8, 0)")
    if num_bits not in NUMBERS or (scale == E4M3_SCALE and num_bits != (2, 1)):
        numbers = [(2, 1)] if scale == E4M3_SCALE else list(NUMBERS)
        names = ", ".join(str(number) for number in numbers)
        raise ValueError(
            f"num_bits {num_bits} with scale_bits {scale}: only {names} is known there"
        )
    axes = [key for key in sizes if isinstance(key, int)]
    if axes != [-1] or size not in BLOCK_SIZES:
        shown = {key: sizes[key] for key in axes}
        raise ValueError(f"blocks must be 8, 16 or 32 values of the last axis (-1), not {shown}")
    return Blocks(number=NUMBERS[num_bits], size=size, has_second_scale=scale == E4M3_SCALE)


def describe(attributes: Mapping[str, Any] | None) -> str:
    """One quantizer in words, for tables: ``e2m1, blocks of 16, e4m3 scales``."""
    if attributes is None:
        return "16 bits"
    if (gguf_type := gguf_type_of(attributes)) is not None:
        return f"ggml's {gguf_type}, blocks of {GGUF_TYPES[gguf_type].block}"
    num_bits = attributes.get("num_bits", 8)
    name = f"int{num_bits}" if isinstance(num_bits, int) else f"e{num_bits[0]}m{num_bits[1]}"
    sizes = attributes.get("block_sizes") or {}
    lengths = [sizes[axis] for axis in sorted(key for key in sizes if isinstance(key, int))]
    if not any(lengths):
        per_token = bool(lengths)
        if attributes.get("axis") is not None:
            return f"{name}, a scale per output channel"
        return f"{name}, a scale per {'token' if per_token else 'tensor'}"
    shown = " x ".join(str(length) for length in lengths)
    scale = sizes.get("scale_bits")
    return f"{name}, blocks of {shown}" + (f", e{scale[0]}m{scale[1]} scales" if scale else "")
