"""Packed weights -> matrices, by the rules of the layouts alone.

Numbers times scales in float32; the type that a model is loaded in rounds them afterwards, once.
Scales of inputs and of caches are left alone: what is loaded is the model with 16-bit inputs.

Shape letters: O out features, I in features; leading axes are experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ModelError
from autoquant_ray.models.packed_weight import (
    FP4,
    INT4_ROWS,
    INT32,
    MXFP4,
    PackedWeight,
    scale_grid,
)
from autoquant_ray.models.stored_tensors import TensorHeader

if TYPE_CHECKING:
    import torch

Read = Callable[[str], "torch.Tensor"]
"""Name of a stored tensor -> the tensor."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127
_OF_INPUTS = frozenset(
    f"{what}_{kind}"
    for what in ("input", "output", "activation", "q", "k", "v", "prob")
    for kind in ("scale", "zero_point", "global_scale")
)
"""Last parts of names of what belongs to inputs and caches, for which a model has no place."""


class LazyWeight:
    """Stands for a weight in a state dict: read and dequantized when it is indexed.

    Args:
        packed: The weight.
        read: Gives stored tensors.
    """

    def __init__(self, packed: PackedWeight, read: Read) -> None:
        self._packed, self._read = packed, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        return dequantize(self._packed, self._read)[index]


@contextmanager
def opened(
    headers: Mapping[str, TensorHeader], weights: Mapping[str, PackedWeight]
) -> Iterator[dict[str, Any]]:
    """A state dict as of a checkpoint in 16 bits; nothing is read before it is indexed.

    What belongs to inputs and caches is left out: transformers would warn of each.

    Args:
        headers: All tensors of the files.
        weights: Name of a parameter -> its parts among them.
    """
    with _files(headers) as files:
        read = _reading(headers, files)
        packed_parts = {part for packed in weights.values() for part in packed.parts}
        state: dict[str, Any] = {
            name: files[header.file].get_slice(name)
            for name, header in headers.items()
            if name not in packed_parts and name.rpartition(".")[2] not in _OF_INPUTS
        }
        yield state | {name: LazyWeight(packed, read) for name, packed in weights.items()}


@contextmanager
def reader(
    headers: Mapping[str, TensorHeader], weights: Mapping[str, PackedWeight]
) -> Iterator[Read]:
    """A function that gives a parameter as a checkpoint in 16 bits would hold it, by its name.

    Args:
        headers: All tensors of the files.
        weights: Name of a parameter -> its parts among them.
    """
    with _files(headers) as files:
        read = _reading(headers, files)
        yield lambda name: dequantize(weights[name], read) if name in weights else read(name)


@contextmanager
def _files(headers: Mapping[str, TensorHeader]) -> Iterator[dict[Path, Any]]:
    from safetensors import safe_open

    with ExitStack() as stack:
        yield {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in {header.file for header in headers.values()}
        }


def _reading(headers: Mapping[str, TensorHeader], files: Mapping[Path, Any]) -> Read:
    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = files[headers[name].file].get_tensor(name)
        return tensor

    return read


def dequantize(packed: PackedWeight, read: Read) -> torch.Tensor:
    """A weight in float32, but where it takes the type of its scales; GPT-OSS's as the model has it
    in memory, ``(experts, in, out)``.

    Args:
        packed: The weight.
        read: Gives stored tensors.

    Raises:
        ModelError: The shape that the files state for it does not fit its numbers.
    """
    scales = read(packed.scale)
    numbers = _numbers(packed, read)
    if packed.zero_point is not None:
        numbers = numbers - _expand(_zero_points(packed, read, numbers), packed.block, numbers)
    grid = _scale_values(scales)
    if packed.global_scale is not None:
        factor = read(packed.global_scale).float()
        grid = grid / factor if packed.divides else grid * factor
    weight = numbers * _expand(grid, packed.block, numbers)
    if packed.takes_type and scales.dtype.itemsize > 1:
        weight = weight.to(scales.dtype)
    return weight.mT.contiguous() if packed.kind == MXFP4 else weight


def _numbers(packed: PackedWeight, read: Read) -> torch.Tensor:
    """The numbers as float32, ``(..., O, I)``."""
    stored = read(packed.numbers)
    if packed.kind == INT32:
        rows, columns = _stated_shape(packed, read, stored)
        return _from_int32(stored, packed.num_bits)[:rows, :columns]
    if packed.kind == INT4_ROWS:
        return _from_row_pairs(stored)
    if packed.kind == FP4:
        return _from_fp4(stored)
    if packed.kind == MXFP4:
        return _from_fp4(stored).flatten(-2)
    return stored.float()


def _stated_shape(packed: PackedWeight, read: Read, stored: torch.Tensor) -> tuple[int, int]:
    rows, columns = map(int, read(str(packed.stored_shape)).tolist())
    width = -(-columns * packed.num_bits // 32)
    if (rows, width) != tuple(stored.shape):
        raise ModelError(
            f"{packed.numbers} has shape {list(stored.shape)}, which cannot hold the "
            f"{rows} x {columns} numbers of {packed.num_bits} bits that the files state"
        )
    return rows, columns


def _from_int32(stored_OP: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Numbers from -2^(bits-1) on, the first of a row in the lowest bits of its first int32."""
    import torch

    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
    fields = (stored_OP.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    return fields.flatten(-2).float() - 2 ** (num_bits - 1)


def _from_row_pairs(stored: torch.Tensor) -> torch.Tensor:
    """Integers of two rows in a byte, the first in the low half."""
    import torch

    pairs = stored.view(torch.uint8).to(torch.int16)
    halves = torch.stack([pairs & 15, pairs >> 4], dim=-2).flatten(-3, -2)
    return torch.where(halves > 7, halves - 16, halves).float()


def _from_fp4(stored: torch.Tensor) -> torch.Tensor:
    """E2M1 numbers, two in a byte, the first in the low half."""
    import torch

    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    pairs = stored.view(torch.uint8)
    return values[torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).long()]


def _zero_points(packed: PackedWeight, read: Read, numbers_OI: torch.Tensor) -> torch.Tensor:
    zero_points = read(str(packed.zero_point))
    if packed.kind != INT32:
        return zero_points.float()
    # Packed down the columns of its grid: unpacked as the rows of the transposed one.
    return _from_int32(zero_points.mT.contiguous(), packed.num_bits).mT[: len(numbers_OI)]


def _scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents."""
    import torch

    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - _EXPONENT_BIAS)
    return scales.float()


def _expand(grid: torch.Tensor, block: tuple[int, int], weight: torch.Tensor) -> torch.Tensor:
    """Values of a grid, each over its block, in a shape that broadcasts with the weight."""
    *lead, rows, columns = weight.shape
    if grid.numel() == 1:
        return grid.reshape([1] * weight.dim())
    grid = grid.reshape(*lead, *scale_grid((rows, columns), block))
    for axis, (size, length) in enumerate(zip(block, (rows, columns), strict=True), start=-2):
        if size > 1:
            grid = grid.repeat_interleave(size, dim=axis).narrow(axis, 0, length)
    return grid
