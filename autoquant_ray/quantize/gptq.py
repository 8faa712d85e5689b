"""GPTQ (https://arxiv.org/abs/2210.17323): a weight's columns are rounded one after the other, and
what a column loses is made up for by the columns that follow.

With ``H = sum_t x_t x_t^T`` of the inputs, ``tr(dW H dW^T)`` is the squared error of the output.
The update is that of ModelOpt's ``gptq``; scales stay those of the format, so that the result takes
the same bytes. A result is kept as codes: numbers on the format's grid, one byte per weight.

What is fitted to few tokens fits their noise. So tokens are split into two halves: the damping is
the one whose roundings, fitted on either half, lose least on the other, and a weight that plain
rounding would serve better keeps plain rounding. Scores of a half are measured under the rounding
that was fitted without it (cross-fitting); the checkpoint's is fitted on all tokens.

Shape letters: I in features, O out features, B columns of a block, P problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from autoquant_ray.formats.algorithms import FACTOR_BYTES
from autoquant_ray.formats.numbers import E2M1, E4M3
from autoquant_ray.quantize.block_formats import round_to
from autoquant_ray.quantize.calibration import NUM_HALVES, Bytes, FittedCodes
from autoquant_ray.quantize.second_moments import SecondMoments

DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of the mean of the Hessian's diagonal that may be added to it."""

_BLOCK = 64
_JUDGED_ROWS = 256
_HUGE = 1e30
_FLOATS = {(4, 3): E4M3, (2, 1): E2M1}


class Grid(NamedTuple):
    """What the numbers of a quantized weight can be.

    Attributes:
        unit_OI: Value of the code 1, float32.
        round: Codes of numbers that are given in units.
        is_integer: Whether codes are integers, else floats of 8 bits (e4m3) at most.
    """

    unit_OI: torch.Tensor
    round: Callable[[torch.Tensor], torch.Tensor]
    is_integer: bool

    def of_slice(self, index: int | slice) -> Grid:
        """The grid of some rows, or of one expert where the units are those of all."""
        return self._replace(unit_OI=self.unit_OI[index])


def grid_of(quantizer: Any, weight_OI: torch.Tensor) -> Grid:
    """The grid of a calibrated quantizer of ModelOpt's: static, of integers, FP8 or NVFP4.

    Args:
        quantizer: Of the weight.
        weight_OI: The weight.
    """
    huge_OI = torch.full(weight_OI.shape, _HUGE, device=weight_OI.device)
    largest_OI = quantizer(huge_OI)
    number = _FLOATS.get(quantizer.num_bits)
    if number is not None:
        unit_OI = largest_OI / number.largest
        return Grid(unit_OI, lambda values: round_to(values, number), is_integer=False)
    most = 2 ** (quantizer.num_bits - 1) - 1
    unit_OI = largest_OI / most
    least = round(float((quantizer(-huge_OI) / unit_OI).nan_to_num().amin()))
    return Grid(unit_OI, lambda values: values.round().clamp_(least, most), is_integer=True)


def plain_codes(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of the nearest numbers, float32 ``(O, I)``."""
    return grid.round(weight_OI.float() / _divisor(grid.unit_OI))


def gptq_codes(
    weight_OI: torch.Tensor,
    moments: SecondMoments,
    problems: Sequence[tuple[int | None, float]],
    grid: Grid,
    is_unused_I: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Codes by GPTQ, float32 ``(O, I)``, under several Hessians and dampings.

    Problems with small Hessians are solved side by side, since most of the time would go to
    starting operations on single columns.

    Args:
        weight_OI: The weight, or some of its rows.
        moments: Of its input; up to a factor, the Hessians.
        problems: Which half's (None: over all tokens), and the share of the mean of the diagonal
            that is added to it.
        grid: Of these rows.
        is_unused_I: Columns of the whole weight that are 0; None: those of the rows.

    Returns:
        Of each problem; None where the damped Hessian has no Cholesky factor.
    """
    if is_unused_I is None:
        is_unused_I = (weight_OI == 0).all(dim=0)
    size = max(1, FACTOR_BYTES // (4 * weight_OI.shape[1] ** 2))
    codes: list[torch.Tensor | None] = []
    for start in range(0, len(problems), size):
        factors = [moments.inverse_factor(*p, is_unused_I) for p in problems[start : start + size]]
        solved = [factor_II for factor_II in factors if factor_II is not None]
        results = iter(_rounded_columns(weight_OI, torch.stack(solved), grid) if solved else ())
        codes += [None if factor_II is None else next(results) for factor_II in factors]
    return codes


def _rounded_columns(
    weight_OI: torch.Tensor, factors_PII: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Codes ``(P, O, I)``, column after column, a block of columns at a time."""
    num_problems, width, _ = factors_PII.shape
    left_PIO = weight_OI.float().T.expand(num_problems, -1, -1).contiguous()
    codes_PIO, unit_IO = torch.empty_like(left_PIO), grid.unit_OI.T.contiguous()
    divisor_IO = _divisor(unit_IO)
    pivots_PI1 = factors_PII.diagonal(dim1=1, dim2=2).unsqueeze(2)
    for start in range(0, width, _BLOCK):
        block, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, width)
        values_PBO = left_PIO[:, block]
        errors_PBO = torch.empty_like(values_PBO)
        factors_PBB = factors_PII[:, block, block]
        for column in range(values_PBO.shape[1]):
            values_PO, number = values_PBO[:, column], start + column
            codes_PO = grid.round(values_PO / divisor_IO[number])
            codes_PIO[:, number] = codes_PO
            errors_PO = (values_PO - codes_PO.mul_(unit_IO[number])) / pivots_PI1[:, number]
            errors_PBO[:, column] = errors_PO
            later_PbO = values_PBO[:, column + 1 :]
            later_PbO.baddbmm_(
                factors_PBB[:, column, column + 1 :, None], errors_PO[:, None], alpha=-1
            )
        left_PIO[:, rest].baddbmm_(factors_PII[:, block, rest].mT, errors_PBO, alpha=-1)
    return codes_PIO.mT


def fit_codes(
    weight_OI: torch.Tensor,
    moments: SecondMoments,
    grid: Grid,
    dampings: Sequence[float] = DAMPINGS,
) -> FittedCodes | None:
    """The rounding of a weight, fitted on all tokens and without each half.

    Args:
        weight_OI: The weight.
        moments: Of its input.
        grid: Of the weight's format.
        dampings: To choose from.

    Returns:
        None where plain rounding loses less on tokens that GPTQ has not seen.
    """
    weight_OI = weight_OI.float()
    damping = _best_damping(weight_OI, moments, grid, dampings)
    if damping is None:
        return None
    problems = [(None, damping), *((1 - half, damping) for half in range(NUM_HALVES))]
    codes = gptq_codes(weight_OI, moments, problems, grid)
    packed = [_packed(codes_OI, grid) for codes_OI in codes if codes_OI is not None]
    if len(packed) < len(problems):
        return None
    return FittedCodes(damping=damping, whole=packed[0], without=tuple(packed[1:]))


def _best_damping(
    weight_OI: torch.Tensor, moments: SecondMoments, grid: Grid, dampings: Sequence[float]
) -> float | None:
    """The damping whose roundings, fitted on either half, lose least on the other.

    Rows are rounded independently of each other, so some of them tell.

    Returns:
        None if plain rounding loses less.
    """
    is_unused_I = (weight_OI == 0).all(dim=0)
    rows = slice(None, None, max(1, len(weight_OI) // _JUDGED_ROWS))
    weight_OI, grid = weight_OI[rows], grid.of_slice(rows)
    unseen = range(NUM_HALVES)
    problems = [(1 - half, damping) for damping in dampings for half in unseen]
    codes = iter(gptq_codes(weight_OI, moments, problems, grid, is_unused_I))
    best = None
    best_loss = _loss(weight_OI, plain_codes(weight_OI, grid), grid, moments.over(None))
    for damping in dampings:
        loss = 0.0
        for half in unseen:
            codes_OI = next(codes)
            if codes_OI is None:
                loss = math.inf
            else:
                loss += _loss(weight_OI, codes_OI, grid, moments.over(half))
        if loss < best_loss:
            best, best_loss = damping, loss
    return best


def values_of(codes: Bytes, grid: Grid) -> torch.Tensor:
    """The numbers that codes stand for, float32 ``(O, I)``; the quantizer leaves them as they are.

    Args:
        codes: uint8, as in :class:`FittedCodes`.
        grid: Of the weight's format.
    """
    unit_OI = grid.unit_OI
    dtype = torch.int8 if grid.is_integer else torch.float8_e4m3fn
    numbers = torch.from_numpy(codes.copy()).view(dtype).view(unit_OI.shape)
    return numbers.to(unit_OI.device).float() * unit_OI


def _packed(codes_OI: torch.Tensor, grid: Grid) -> Bytes:
    dtype = torch.int8 if grid.is_integer else torch.float8_e4m3fn
    packed: Bytes = codes_OI.contiguous().to(dtype).view(torch.uint8).cpu().numpy()
    return packed


def _divisor(unit: torch.Tensor) -> torch.Tensor:
    """What numbers are divided by to be in units: 0 is what comes out in a block of zeros."""
    return torch.where(unit > 0, unit, math.inf)


def _loss(
    weight_OI: torch.Tensor, codes_OI: torch.Tensor, grid: Grid, hessian_II: torch.Tensor
) -> float:
    """``tr(dW H dW^T)``: the squared error of the output."""
    error_OI = codes_OI * grid.unit_OI - weight_OI
    return float(((error_OI @ hessian_II) * error_OI).sum(dtype=torch.float64))
