"""A weight as a quantized checkpoint stores it: numbers, scales, and what a scale belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant_ray.models.stored_tensors import TensorHeader

TENSOR, CHANNEL = (0, 0), (1, 0)
"""Blocks of a scale for a whole matrix, and for a row of it; 0 stands for all rows or columns."""

ELEMENTS, INT32, FP4, INT4_ROWS, MXFP4 = "elements", "int32", "fp4", "int4 rows", "mxfp4"
"""How numbers lie in a tensor: each as it is; several in an int32; two of a row, or two rows of a
column, in a byte; two in a byte of blocks that make the columns of the transposed matrix."""


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """Where a weight's parts are in the files, by the names of tensors.

    Attributes:
        numbers: The quantized numbers.
        scale: What they are multiplied by; bytes are exponents of 2, less 127.
        block: Rows and columns that share a scale.
        kind: How the numbers lie in their tensor.
        num_bits: Of a number in an int32.
        zero_point: Subtracted from numbers before they are scaled; packed like them, down a column.
        global_scale: Of the scales.
        divides: Whether the scales are divided by the global one instead of multiplied.
        stored_shape: Tensor that holds the shape of the weight, ``(out, in)``.
        takes_type: Whether the weight is rounded to the type of its scales, as the library does
            that wrote them.
    """

    numbers: str
    scale: str
    block: tuple[int, int] = TENSOR
    kind: str = ELEMENTS
    num_bits: int = 8
    zero_point: str | None = None
    global_scale: str | None = None
    divides: bool = False
    stored_shape: str | None = None
    takes_type: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """All tensors that it is made of."""
        names = (self.numbers, self.scale, self.zero_point, self.global_scale, self.stored_shape)
        return tuple(name for name in names if name is not None)


def missing_part(packed: PackedWeight, headers: Mapping[str, TensorHeader]) -> str | None:
    """What the files lack of a weight; None where all is there.

    Args:
        packed: The weight.
        headers: Of the checkpoint.
    """
    return next((part for part in packed.parts if part not in headers), None)


def scale_problem(packed: PackedWeight, headers: Mapping[str, TensorHeader]) -> str | None:
    """Why a weight's scales do not fit its numbers, in words; None where they do.

    Args:
        packed: The weight, whose parts are all there.
        headers: Of the checkpoint.
    """
    numbers, scales = headers[packed.numbers].shape, headers[packed.scale].shape
    *lead, rows, columns = logical_shape(packed, numbers)
    grid = scale_grid((rows, columns), packed.block)
    expected = (*lead, *grid)
    sizes = {math.prod(expected)} | ({1} if packed.block == TENSOR else set())
    # Ones are left out of shapes in some files: (out,) for (out, 1), () for (1, 1).
    is_fitting = math.prod(scales) in sizes and (1 in grid or scales[-2:] == grid)
    if packed.kind == INT32 and grid[1] > 1:  # rows may end inside of an int32
        width = math.ceil(scales[-1] * packed.block[1] * packed.num_bits / 32)
        is_fitting = (*scales[:-1], width) == numbers
    return None if is_fitting else f"scales {list(scales)} do not fit numbers {list(numbers)}"


def scale_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the scales of a matrix.

    Args:
        shape: Of the matrix, ``(out, in)``.
        block: Rows and columns that share a scale; 0: all.
    """
    rows, columns = (math.ceil(n / b) if b else 1 for n, b in zip(shape, block, strict=True))
    return rows, columns


def logical_shape(packed: PackedWeight, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the matrix, ``(..., out, in)``, as far as the numbers' tensor tells it.

    Args:
        packed: The weight.
        numbers: Shape of the tensor that holds its numbers.
    """
    if packed.kind == MXFP4:
        return (*numbers[:-2], numbers[-2] * numbers[-1] * 2)
    *lead, rows, columns = numbers
    if packed.kind == INT32:
        columns = columns * 32 // packed.num_bits
    elif packed.kind == FP4:
        columns *= 2
    elif packed.kind == INT4_ROWS:
        rows *= 2
    return (*lead, rows, columns)
