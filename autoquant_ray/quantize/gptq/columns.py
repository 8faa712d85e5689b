"""Rounds columns one after the other, many rows and several problems side by side.

The target of a column is ``w_j + sum_k (w_k - q_k) F_kj`` over the columns ``k`` before it, with
the feedback ``F`` of :meth:`~autoquant_ray.quantize.second_moments.SecondMoments.feedback`. That is
GPTQ without the inverse of the Hessian (https://arxiv.org/abs/2307.13304, theorem 6).

Most of the time would go to starting operations on single columns, so rows of all weights with the
same input are rounded together. What a row is rounded to must not depend on its company: products
are made for each strip of rows by itself, in a shape that its weight alone decides, and all else is
done number by number.

Shape letters: I in features, N rows of all strips, R rows of a strip, P problems, B columns of a
block, G groups of columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from autoquant_ray.formats.algorithms import FACTOR_BYTES
from autoquant_ray.quantize.backends.block_formats import round_to
from autoquant_ray.quantize.grid import Grid, divisor_of
from autoquant_ray.quantize.second_moments import SecondMoments

_BLOCK = 64
_SUBBLOCK = 8
_STRIP_ROWS = 512
_ALIGNED_ROWS = 16  # 64 bytes: no strip begins within a cache line
_STACK_ELEMENTS = 2**23

Problem = tuple[int | None, float]
"""Which half's Hessian (None: over all tokens), and the share of the mean of its diagonal that is
added to it."""


class Rows(NamedTuple):
    """Some rows of a weight.

    Attributes:
        weight_OI: float32.
        grid: Of these rows.
    """

    weight_OI: torch.Tensor
    grid: Grid

    def strips(self) -> Iterator[tuple[slice, Rows]]:
        """The same in parts of at most 512 rows, and which rows they are."""
        for start in range(0, len(self.weight_OI), _STRIP_ROWS):
            rows = slice(start, start + _STRIP_ROWS)
            yield rows, Rows(self.weight_OI[rows], self.grid.of_slice(rows))


class Rounded(NamedTuple):
    """What a strip is rounded to in a problem; tensors are good until the next is asked for.

    Attributes:
        strip: Number of the strip.
        problem: Number of the problem.
        error_IR: What the weight is above its rounding, float32.
        codes_IR: Codes on the grid, float32.
    """

    strip: int
    problem: int
    error_IR: torch.Tensor
    codes_IR: torch.Tensor


def rounded(
    strips: Sequence[Rows],
    moments: SecondMoments,
    problems: Sequence[Problem],
    is_unused_I: torch.Tensor,
) -> Iterator[Rounded]:
    """Roundings of strips, problem after problem for each strip.

    A problem whose damped Hessian has no Cholesky factor gives none.

    Args:
        strips: At most 512 rows each, on grids of the same kind of number.
        moments: Of the input of all; up to a factor, the Hessians.
        problems: To solve.
        is_unused_I: Columns that are 0 in the whole of every weight.
    """
    width = len(is_unused_I)
    size = max(1, FACTOR_BYTES // (4 * width**2))
    for start in range(0, len(problems), size):
        feedbacks = {}
        for number in range(start, min(start + size, len(problems))):
            feedback_II = moments.feedback(*problems[number], is_unused_I)
            if feedback_II is not None:
                feedbacks[number] = feedback_II
        if not feedbacks:
            continue
        most_rows = _STACK_ELEMENTS // (width * len(feedbacks))
        for numbers in _stacks(strips, most_rows):
            stack = _Stack([strips[number] for number in numbers], list(feedbacks.values()))
            stack.solve()
            for number, rows in zip(numbers, stack.rows, strict=True):
                for position, problem in enumerate(feedbacks):
                    error_IR = stack.error_PIN[position, :, rows]
                    yield Rounded(number, problem, error_IR, stack.codes_PIN[position, :, rows])


def _stacks(strips: Sequence[Rows], most_rows: int) -> list[list[int]]:
    """Numbers of strips that are rounded together."""
    stacks: list[list[int]] = []
    room = 0
    for number, strip in enumerate(strips):
        size = len(strip.weight_OI)
        if not stacks or size > room:
            stacks.append([])
            room = most_rows
        stacks[-1].append(number)
        room -= size
    return stacks


class _Stack:
    """Strips beside each other.

    Args:
        strips: The strips.
        feedbacks: Of each problem.

    Attributes:
        rows: Where each strip is.
        error_PIN: What weights are above their rounding, float32.
        codes_PIN: Codes, float32.
    """

    def __init__(self, strips: Sequence[Rows], feedbacks: Sequence[torch.Tensor]) -> None:
        width, like = strips[0].grid.width, strips[0].weight_OI
        self.rows, num_rows = [], 0
        for strip in strips:
            size = len(strip.weight_OI)
            self.rows.append(slice(num_rows, num_rows + size))
            num_rows += math.ceil(size / _ALIGNED_ROWS) * _ALIGNED_ROWS
        self._feedbacks = feedbacks
        self._number = strips[0].grid.number
        self._step = math.gcd(*(strip.grid.step for strip in strips))
        self._weight_IN = like.new_zeros(width, num_rows)
        self._unit_GN = like.new_ones(math.ceil(width / self._step), num_rows)
        self._least_N, self._most_N = like.new_zeros(num_rows), like.new_zeros(num_rows)
        for rows, strip in zip(self.rows, strips, strict=True):
            self._lay(rows, strip)
        self._divisor_GN = divisor_of(self._unit_GN)

        def empty(num_columns: int) -> torch.Tensor:
            return like.new_empty(len(feedbacks), num_columns, num_rows)

        self.error_PIN, self.codes_PIN = empty(width), empty(width)
        self._target_PBN, self._passed_PBN = empty(_BLOCK), empty(_SUBBLOCK)
        self._scaled_PN = like.new_empty(len(feedbacks), num_rows)

    def _lay(self, rows: slice, strip: Rows) -> None:
        """Put a strip and its grid in its place."""
        weight_OI, grid = strip
        self._weight_IN[:, rows] = weight_OI.T
        unit_GR = grid.unit_OK.T.repeat_interleave(grid.step // self._step, dim=0)
        self._unit_GN[:, rows] = unit_GR[: len(self._unit_GN)]
        self._least_N[rows], self._most_N[rows] = grid.least, grid.most

    def solve(self) -> None:
        """Round all columns."""
        width = len(self._weight_IN)
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            block = slice(start, stop)
            self._begin(start, stop)
            feedback_PBB = torch.stack(
                [feedback_II[block, block] for feedback_II in self._feedbacks]
            )
            for first in range(0, stop - start, _SUBBLOCK):
                last = min(first + _SUBBLOCK, stop - start)
                for column in range(first, last):
                    self._round(start + column, column)
                    self._pass_on(
                        start + column, feedback_PBB[:, column, column + 1 : last], column
                    )
                if last < stop - start:
                    self._pass_on_subblock(start, first, last, feedback_PBB)

    def _begin(self, start: int, stop: int) -> None:
        """Targets of the columns of a block after all columns before it."""
        weight_BN = self._weight_IN[start:stop]
        if not start:
            self._target_PBN[:, :stop] = weight_BN
            return
        for rows in self.rows:
            for problem, feedback_II in enumerate(self._feedbacks):
                torch.addmm(
                    weight_BN[:, rows],
                    feedback_II[:start, start:stop].T,
                    self.error_PIN[problem, :start, rows],
                    out=self._target_PBN[problem, : stop - start, rows],
                )

    def _round(self, number: int, column: int) -> None:
        """Round a column of all rows.

        Args:
            number: Of the column.
            column: The same within its block.
        """
        group, scaled_PN = number // self._step, self._scaled_PN
        codes_PN = self.codes_PIN[:, number]
        torch.div(self._target_PBN[:, column], self._divisor_GN[group], out=scaled_PN)
        if self._number is None:
            torch.maximum(scaled_PN.round_(), self._least_N, out=scaled_PN)
            torch.minimum(scaled_PN, self._most_N, out=codes_PN)
        else:
            codes_PN.copy_(round_to(scaled_PN, self._number))
        torch.mul(codes_PN, self._unit_GN[group], out=scaled_PN)
        torch.sub(self._weight_IN[number], scaled_PN, out=self.error_PIN[:, number])

    def _pass_on(self, number: int, feedback_PB: torch.Tensor, column: int) -> None:
        """Give the error of a column to the columns after it in its subblock.

        Product and sum are rounded apart: what comes out is the same wherever a number stands.
        """
        num_columns = feedback_PB.shape[1]
        if num_columns:
            passed_PBN = self._passed_PBN[:, :num_columns]
            torch.mul(self.error_PIN[:, number, None], feedback_PB[:, :, None], out=passed_PBN)
            self._target_PBN[:, column + 1 : column + 1 + num_columns].add_(passed_PBN)

    def _pass_on_subblock(
        self, start: int, first: int, last: int, feedback_PBB: torch.Tensor
    ) -> None:
        """Give the errors of a subblock to the columns after it in its block."""
        stop = min(_BLOCK, len(self._weight_IN) - start)
        later_PBB = feedback_PBB[:, first:last, last:stop].mT
        errors_PBN = self.error_PIN[:, start + first : start + last]
        for rows in self.rows:
            self._target_PBN[:, last:stop, rows].baddbmm_(later_PBB, errors_PBN[:, :, rows])
