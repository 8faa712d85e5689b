"""What the numbers of a quantized weight can be, and codes that stand for them.

Shape letters: I in features, O out features, K scales of a row, R rows of a weight or of an input.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from autoquant_ray.formats.numbers import E2M1, E4M3, Number
from autoquant_ray.modelopt_api import largest_of
from autoquant_ray.quantize.backends.block_formats import round_to
from autoquant_ray.quantize.calibration import Bytes

_HUGE = 1e30
_FLOATS = {(4, 3): E4M3, (2, 1): E2M1}


class Grid(NamedTuple):
    """The numbers that a weight's quantizer leaves as they are.

    Attributes:
        unit_OK: Value of the code 1 of each scale, float32; of experts that share a quantizer
            ``(E, O, K)``.
        step: Columns that share a scale; the last of a row may be shared by fewer.
        width: Columns.
        least: Smallest code.
        most: Largest code.
        number: Codes are floats of this kind, of 8 bits (e4m3) at most; None: integers.
    """

    unit_OK: torch.Tensor
    step: int
    width: int
    least: float
    most: float
    number: Number | None

    @property
    def unit_OI(self) -> torch.Tensor:
        """The unit of every weight."""
        return self.unit_OK.repeat_interleave(self.step, dim=-1)[..., : self.width]

    def of_slice(self, index: int | slice) -> Grid:
        """The grid of some rows, or of one expert where the units are those of all."""
        return self._replace(unit_OK=self.unit_OK[index])

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Codes of numbers that are given in units."""
        if self.number is not None:
            return round_to(values, self.number)
        return values.round().clamp_(self.least, self.most)


def grid_of(quantizer: Any, weight_OI: torch.Tensor) -> Grid:
    """The grid of a calibrated quantizer of ModelOpt's: static, of integers, FP8 or NVFP4.

    Args:
        quantizer: Of the weight.
        weight_OI: The weight.
    """
    width = weight_OI.shape[-1]
    step = (quantizer.block_sizes or {}).get(-1) or width
    huge_OI = torch.full(weight_OI.shape, _HUGE, device=weight_OI.device)
    largest_OK = quantizer(huge_OI)[..., ::step]
    number = _FLOATS.get(quantizer.num_bits)
    if number is not None:
        unit_OK, most = largest_OK / number.largest, number.largest
        return Grid(unit_OK, step, width, -most, most, number)
    most = 2 ** (quantizer.num_bits - 1) - 1
    unit_OK = largest_OK / most
    smallest_OK = quantizer(huge_OI.neg_())[..., ::step]
    least = round(float((smallest_OK / unit_OK).nan_to_num().amin()))
    return Grid(unit_OK, step, width, least, most, None)


class Integers(NamedTuple):
    """Values whose rows are multiples of a unit.

    Attributes:
        codes_RI: int8.
        unit_R: Value of the code 1 in each row, float32; ``(1,)`` where all rows have the same.
    """

    codes_RI: torch.Tensor
    unit_R: torch.Tensor


def integers_of(quantizer: Any, values_RI: torch.Tensor) -> Integers:
    """What a calibrated quantizer of ModelOpt's makes of values, as integers; no host waits.

    Each result is an integer divided by ModelOpt's scale, so the integer that is nearest to it in
    units is the same: nothing is rounded a second time.

    Args:
        quantizer: Of integers of 8 bits at most, with a scale per row or a single one.
        values_RI: Float32.
    """
    quantized_RI = quantizer(values_RI)
    unit_R = (largest_of(quantizer, values_RI).float() / quantizer.maxbound).reshape(-1)
    codes_RI = quantized_RI / divisor_of(unit_R)[:, None]
    return Integers(codes_RI.round_().to(torch.int8), unit_R)


def plain_codes(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of the nearest numbers, float32 ``(O, I)``."""
    return grid.round(weight_OI.float() / divisor_of(grid.unit_OI))


def divisor_of(unit: torch.Tensor) -> torch.Tensor:
    """What numbers are divided by to be in units: 0 is what comes out in a block of zeros."""
    return torch.where(unit > 0, unit, math.inf)


def packed(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes in one byte each, uint8; :func:`values_of` is the inverse."""
    dtype = torch.int8 if grid.number is None else torch.float8_e4m3fn
    return codes.to(dtype).view(torch.uint8)


def values_of(codes: Bytes, grid: Grid) -> torch.Tensor:
    """The numbers that codes stand for, float32 ``(O, I)``; the quantizer leaves them as they are.

    Args:
        codes: uint8, as in :class:`~autoquant_ray.quantize.calibration.FittedCodes`.
        grid: Of the weight's format.
    """
    unit_OI = grid.unit_OI
    dtype = torch.int8 if grid.number is None else torch.float8_e4m3fn
    numbers = torch.from_numpy(codes.copy()).view(dtype).view(unit_OI.shape)
    return numbers.to(unit_OI.device).float() * unit_OI
