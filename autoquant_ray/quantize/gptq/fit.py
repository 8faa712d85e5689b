"""Roundings of weights by GPTQ that are no worse than plain rounding on tokens they have not seen.

With ``H = sum_t x_t x_t^T`` of the inputs, ``tr(dW H dW^T)`` is the squared error of the output.
The result is that of ModelOpt's ``gptq`` but for the order of sums; scales stay those of the
format, so that it takes the same bytes. It is kept as codes: numbers on the format's grid, one byte
per weight.

What is fitted to few tokens fits their noise. So tokens are split into two halves: the damping is
the one whose roundings, fitted on either half, lose least on the other, and a weight that plain
rounding would serve better keeps plain rounding. Scores of a half are measured under the rounding
that was fitted without it (cross-fitting); the checkpoint's is fitted on all tokens.

Shape letters: I in features, O out features, R some rows, P problems.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.quantize.calibration import NUM_HALVES, FittedCodes
from autoquant_ray.quantize.gptq.columns import Problem, Rows, rounded
from autoquant_ray.quantize.grid import Grid, packed, plain_codes
from autoquant_ray.quantize.judged_rows import judged_rows
from autoquant_ray.quantize.quantizers import weight_grid
from autoquant_ray.quantize.second_moments import SecondMoments
from autoquant_ray.quantize.weight_search import WeightScales

DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of the mean of the Hessian's diagonal that may be added to it."""

_JUDGED_ROWS = 64
_LOSS_BLOCK = 256


class WeightToRound(NamedTuple):
    """A weight and how it may be rounded.

    Attributes:
        weight_OI: float32.
        grid: Of its format.
        dampings: To choose from.
    """

    weight_OI: torch.Tensor
    grid: Grid
    dampings: Sequence[float] = DAMPINGS


@torch.no_grad()
def weight_to_round(
    format_: Format,
    weight_OI: torch.Tensor,
    single_OI: torch.Tensor,
    moments: SecondMoments,
    scales: WeightScales,
    *name: str,
) -> tuple[WeightToRound, SecondMoments]:
    """What GPTQ rounds, and the second moments of what it is multiplied with.

    Where the format has factors, so that ``W s`` is multiplied with ``x / s``, that is what is
    rounded: all linears that read the input must be in memory.

    Args:
        format_: By ``gptq`` or ``awq+gptq``.
        weight_OI: The weight.
        single_OI: The same in float32.
        moments: Of its input.
        scales: Those of the model.
        name: The module's name; parameter and expert in a module of many.
    """
    factors_I = scales.factors(name, format_)
    if factors_I is not None:
        weight_OI = single_OI = single_OI * factors_I
        moments = moments.divided(factors_I, format_.name)
    grid = weight_grid(format_, weight_OI, scales, *name)
    return WeightToRound(single_OI, grid, dampings_of(format_)), moments


def dampings_of(format_: Format) -> Sequence[float]:
    """Those that a format by GPTQ chooses from."""
    given = (format_.algorithm or {}).get("perc_damp")
    return DAMPINGS if given is None else (given,)


def fit_codes(weights: Sequence[WeightToRound], moments: SecondMoments) -> list[FittedCodes | None]:
    """The roundings of weights with the same input, fitted on all tokens and without each half.

    They are faster together; each is what it would be alone.

    Args:
        weights: One weight under several formats, or several weights.
        moments: Of the input of all.

    Returns:
        Of each; None where plain rounding loses less on tokens that GPTQ has not seen.
    """
    fitted: list[FittedCodes | None] = [None] * len(weights)
    for numbers, is_unused_I in _alike(weights):
        chosen: dict[float, list[int]] = {}
        bests = _best_dampings([weights[n] for n in numbers], moments, is_unused_I)
        for number, damping in zip(numbers, bests, strict=True):
            if damping is not None:
                chosen.setdefault(damping, []).append(number)
        for damping, solved in chosen.items():
            problems = [(None, damping), *((1 - half, damping) for half in range(NUM_HALVES))]
            pairs = [(weights[n].weight_OI, weights[n].grid) for n in solved]
            for number, codes in zip(
                solved, gptq_codes(pairs, moments, problems, is_unused_I), strict=True
            ):
                if len(codes) == len(problems):
                    whole, *without = (codes[n].numpy() for n in range(len(problems)))
                    fitted[number] = FittedCodes(
                        damping=damping, whole=whole, without=tuple(without)
                    )
    return fitted


def gptq_codes(
    weights: Sequence[tuple[torch.Tensor, Grid]],
    moments: SecondMoments,
    problems: Sequence[Problem],
    is_unused_I: torch.Tensor,
) -> list[dict[int, torch.Tensor]]:
    """Codes by GPTQ under several Hessians and dampings.

    Args:
        weights: float32 ``(O, I)`` each, with grids of the same kind of number.
        moments: Of the input of all.
        problems: To solve.
        is_unused_I: Columns that are 0 in all weights.

    Returns:
        Of each weight, number of a problem -> packed codes ``(O, I)`` on CPU; those whose damped
        Hessian has no Cholesky factor are missing.
    """
    strips, places = [], []
    for number, pair in enumerate(weights):
        for rows, strip in Rows(*pair).strips():
            strips.append(strip)
            places.append((number, rows))
    codes: list[dict[int, torch.Tensor]] = [{} for _ in weights]
    for result in rounded(strips, moments, problems, is_unused_I):
        number, rows = places[result.strip]
        weight_OI, grid = weights[number]
        if result.problem not in codes[number]:
            codes[number][result.problem] = torch.empty(weight_OI.shape, dtype=torch.uint8)
        codes[number][result.problem][rows] = packed(result.codes_IR, grid).T.cpu()
    return codes


def _alike(weights: Sequence[WeightToRound]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Numbers of weights that can be rounded together, and the columns that are 0 in all."""
    unused: dict[int, torch.Tensor] = {}
    alike: dict[Hashable, tuple[list[int], torch.Tensor]] = {}
    for number, (weight_OI, grid, dampings) in enumerate(weights):
        if id(weight_OI) not in unused:
            unused[id(weight_OI)] = (weight_OI == 0).all(dim=0)
        is_unused_I = unused[id(weight_OI)]
        key = (grid.number, tuple(dampings), tuple(is_unused_I.nonzero().flatten().tolist()))
        alike.setdefault(key, ([], is_unused_I))[0].append(number)
    yield from alike.values()


def _best_dampings(
    weights: Sequence[WeightToRound], moments: SecondMoments, is_unused_I: torch.Tensor
) -> list[float | None]:
    """The dampings whose roundings, fitted on either half, lose least on the other.

    Rows are rounded independently of each other, so some of them tell.

    Args:
        weights: That can be rounded together.
        moments: Of their input.
        is_unused_I: Columns that are 0 in all.

    Returns:
        Of each weight; None if plain rounding loses less.
    """
    dampings = weights[0].dampings
    judged = [_judged(weight) for weight in weights]
    problems = [(1 - half, damping) for damping in dampings for half in range(NUM_HALVES)]
    losses: list[dict[int, float]] = [{} for _ in weights]
    for result in rounded(judged, moments, problems, is_unused_I):
        unseen_II = moments.over(result.problem % NUM_HALVES)
        losses[result.strip][result.problem] = _loss(result.error_IR, unseen_II)
    bests, whole_II = [], moments.over(None)
    for rows, losses_of in zip(judged, losses, strict=True):
        error_IR = (rows.weight_OI - plain_codes(*rows) * rows.grid.unit_OI).T
        best, best_loss = None, _loss(error_IR, whole_II)
        for damping, loss in _by_damping(dampings, losses_of).items():
            if loss < best_loss:
                best, best_loss = damping, loss
        bests.append(best)
    return bests


def _judged(weight: WeightToRound) -> Rows:
    rows = judged_rows(len(weight.weight_OI), _JUDGED_ROWS)
    return Rows(weight.weight_OI[rows], weight.grid.of_slice(rows))


def _by_damping(dampings: Sequence[float], losses: Mapping[int, float]) -> dict[float, float]:
    """Losses of both halves together; infinite where a half has none.

    Args:
        dampings: In order.
        losses: By the number of the problem.
    """
    numbers = iter(range(NUM_HALVES * len(dampings)))
    return {
        damping: sum(losses.get(next(numbers), math.inf) for _ in range(NUM_HALVES))
        for damping in dampings
    }


def _loss(error_IR: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """``tr(dW H dW^T)``: the squared error of the output.

    The Hessian is symmetric: what is above the blocks of its diagonal counts twice below them.
    """
    total = torch.zeros((), dtype=torch.float64, device=error_IR.device)
    for start in range(0, len(error_IR), _LOSS_BLOCK):
        block = slice(start, start + _LOSS_BLOCK)
        error_BR, hessian_BI = error_IR[block], hessian_II[block]
        product_BR = hessian_BI[:, block] @ error_BR
        if start:
            product_BR.addmm_(hessian_BI[:, :start], error_IR[:start], alpha=2)
        total += product_BR.mul_(error_BR).sum(dtype=torch.float64)
    return float(total)
