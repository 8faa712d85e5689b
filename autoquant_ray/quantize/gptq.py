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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from autoquant_ray.formats.numbers import E2M1, E4M3
from autoquant_ray.quantize.block_formats import round_to
from autoquant_ray.quantize.calibration import NUM_HALVES, Bytes, FittedCodes

DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of the mean of the Hessian's diagonal that may be added to it."""

_BLOCK = 64
_FACTOR_BYTES = 2**28
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
    return grid.round(_in_units(weight_OI.float(), grid.unit_OI))


def gptq_codes(
    weight_OI: torch.Tensor, problems: Sequence[tuple[torch.Tensor, float]], grid: Grid
) -> list[torch.Tensor | None]:
    """Codes by GPTQ, float32 ``(O, I)``, under several Hessians and dampings.

    Problems with small Hessians are solved side by side, since most of the time would go to
    starting operations on single columns.

    Args:
        weight_OI: The weight.
        problems: Hessian, float32 ``(I, I)`` up to a factor, and the share of the mean of its
            diagonal that is added to it.
        grid: Of the weight's format.

    Returns:
        Of each problem; None where the damped Hessian has no Cholesky factor.
    """
    size = max(1, _FACTOR_BYTES // (4 * weight_OI.shape[1] ** 2))
    codes: list[torch.Tensor | None] = []
    for start in range(0, len(problems), size):
        factors = [
            _inverse_factor(h_II, weight_OI, d) for h_II, d in problems[start : start + size]
        ]
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
    pivots_PI1 = factors_PII.diagonal(dim1=1, dim2=2).unsqueeze(2)
    for start in range(0, width, _BLOCK):
        block, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, width)
        values_PBO = left_PIO[:, block]
        errors_PBO = torch.empty_like(values_PBO)
        factors_PBB = factors_PII[:, block, block]
        for column in range(values_PBO.shape[1]):
            values_PO, unit_O = values_PBO[:, column], unit_IO[start + column]
            codes_PO = grid.round(_in_units(values_PO, unit_O))
            codes_PIO[:, start + column] = codes_PO
            errors_PO = (values_PO - codes_PO * unit_O) / pivots_PI1[:, start + column]
            errors_PBO[:, column] = errors_PO
            later_PbO = values_PBO[:, column + 1 :]
            later_PbO.baddbmm_(
                factors_PBB[:, column, column + 1 :, None], errors_PO[:, None], alpha=-1
            )
        left_PIO[:, rest].baddbmm_(factors_PII[:, block, rest].mT, errors_PBO, alpha=-1)
    return codes_PIO.mT


def fit_codes(
    weight_OI: torch.Tensor,
    hessians_II: Sequence[torch.Tensor],
    grid: Grid,
    dampings: Sequence[float] = DAMPINGS,
) -> FittedCodes | None:
    """The rounding of a weight, fitted on all tokens and without each half.

    Args:
        weight_OI: The weight.
        hessians_II: Of the tokens of each half, sums, float32.
        grid: Of the weight's format.
        dampings: To choose from.

    Returns:
        None where plain rounding loses less on tokens that GPTQ has not seen.
    """
    weight_OI = weight_OI.float()
    first_II, second_II = hessians_II
    whole_II = first_II + second_II
    unseen = list(zip((second_II, first_II), hessians_II, strict=True))
    best_error = _loss(weight_OI, plain_codes(weight_OI, grid), grid, whole_II)
    problems = [(seen_II, damping) for damping in dampings for seen_II, _ in unseen]
    codes = gptq_codes(weight_OI, problems, grid)
    best: tuple[float, list[torch.Tensor]] | None = None
    for number, damping in enumerate(dampings):
        without = [c for c in codes[2 * number : 2 * number + 2] if c is not None]
        if len(without) < NUM_HALVES:
            continue
        error = sum(
            _loss(weight_OI, codes_OI, grid, unseen_II)
            for codes_OI, (_, unseen_II) in zip(without, unseen, strict=True)
        )
        if error < best_error:
            best_error, best = error, (damping, without)
    if best is None:
        return None
    (whole,) = gptq_codes(weight_OI, [(whole_II, best[0])], grid)
    if whole is None:
        return None
    packed = [_packed(codes_OI, grid) for codes_OI in (whole, *best[1])]
    return FittedCodes(damping=best[0], whole=packed[0], without=tuple(packed[1:]))


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


def _in_units(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Numbers over the unit; 0 in a block of zeros."""
    return torch.where(unit > 0, values / unit, 0.0)


def _loss(
    weight_OI: torch.Tensor, codes_OI: torch.Tensor, grid: Grid, hessian_II: torch.Tensor
) -> float:
    """``tr(dW H dW^T)``: the squared error of the output."""
    error_OI = codes_OI * grid.unit_OI - weight_OI
    return float(((error_OI @ hessian_II) * error_OI).sum(dtype=torch.float64))


def _inverse_factor(
    hessian_II: torch.Tensor, weight_OI: torch.Tensor, damping: float
) -> torch.Tensor | None:
    """Upper Cholesky factor of the inverse of the damped Hessian."""
    damped_II = hessian_II.clone()
    is_unused_I = (weight_OI == 0).all(dim=0)
    damped_II[is_unused_I, :] = 0
    damped_II[:, is_unused_I] = 0
    diagonal_I = damped_II.diagonal()
    diagonal_I[is_unused_I] = 1
    diagonal_I += damping * diagonal_I.mean()
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if failed:
        return None
    upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
    return None if failed or not upper_II.isfinite().all() else upper_II
