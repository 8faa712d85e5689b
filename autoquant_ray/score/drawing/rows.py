"""Which rows of a module are scored: all that have a gradient, or a draw; what each adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autoquant_ray.arrays import Floats
from autoquant_ray.score.drawing.row_sampling import DrawnRows, draw_rows, row_masses

_FIRST_COLUMNS = 16
_WORTH_COPYING = 0.95  # share of rows with a gradient below which the others are left out


@dataclass(frozen=True, kw_only=True)
class ChosenRows:
    """Rows of a module that are scored.

    Attributes:
        indices: Rows to select; None takes all.
        num_rows: Rows that they were chosen from.
        num_live: Rows with a gradient among them.
        dead_T: Rows among them whose values do not count; None if all do.
        drawn: How they were drawn; None without sampling.
        masses_T: What they would be drawn by, where all are scored to find that out.
    """

    indices: torch.Tensor | None
    num_rows: int
    num_live: int
    dead_T: torch.Tensor | None = None
    drawn: DrawnRows | None = None
    masses_T: Floats | None = None

    def of(self, states_TN: torch.Tensor) -> torch.Tensor:
        """The chosen rows of a tensor."""
        return states_TN if self.indices is None else states_TN.index_select(0, self.indices)


def live_rows(gradients_TO: list[torch.Tensor]) -> ChosenRows:
    """Rows where any gradient is not zero (NaN counts).

    Computing a few dead rows and leaving them out of the sums is cheaper than copying all others:
    every sample's last token is dead.
    """
    live_T = _is_live(gradients_TO)
    num_rows, num_live = len(live_T), int(live_T.sum())  # all that the host waits for
    if num_live == num_rows:
        return ChosenRows(indices=None, num_rows=num_rows, num_live=num_live)
    if num_live >= _WORTH_COPYING * num_rows:
        return ChosenRows(indices=None, num_rows=num_rows, num_live=num_live, dead_T=~live_T)
    indices = torch.nonzero_static(live_T, size=num_live)[:, 0]
    return ChosenRows(indices=indices, num_rows=num_rows, num_live=num_live)


def _is_live(gradients_TO: list[torch.Tensor]) -> torch.Tensor:
    """Which rows have a gradient."""
    if gradients_TO[0].is_cuda:  # to read all of them takes less than to wait
        return torch.stack([g.ne(0).any(dim=1) for g in gradients_TO]).any(dim=0)
    # Nearly every live row shows in any few columns; only the others are looked at whole.
    live_T = torch.stack([g[:, :_FIRST_COLUMNS].ne(0).any(dim=1) for g in gradients_TO]).any(dim=0)
    unclear_U = (~live_T).nonzero()[:, 0]
    for gradient_TO in gradients_TO:
        live_T[unclear_U] |= gradient_TO[unclear_U].ne(0).any(dim=1)
    return live_T


def choose_rows(
    gradients_TO: list[torch.Tensor], input_TI: torch.Tensor, share: float, seed: tuple[int, ...]
) -> ChosenRows:
    """Rows with a gradient; with a share below 1, so many of them drawn by importance.

    Args:
        gradients_TO: Gradients at the output, one per label draw.
        input_TI: Input of the module.
        share: In (0, 1].
        seed: Non-negative integers.
    """
    if share == 1:
        return live_rows(gradients_TO)
    return chosen_by(row_masses(gradients_TO, input_TI), share, seed, input_TI.device)


def chosen_by(
    masses_T: Floats, share: float, seed: tuple[int, ...], device: torch.device
) -> ChosenRows:
    """Rows drawn by importance.

    Args:
        masses_T: Of all rows.
        share: In (0, 1).
        seed: Non-negative integers.
        device: Of the rows.
    """
    drawn = draw_rows(masses_T, share, seed, device)
    indices_U = drawn.indices_U
    return ChosenRows(
        indices=indices_U, num_rows=len(masses_T), num_live=len(indices_U), drawn=drawn
    )


def as_rows(states: torch.Tensor) -> torch.Tensor:
    """Samples one after the other: ``(B, S, N)`` as ``(B * S, N)``."""
    return states.reshape(-1, states.shape[-1])


def row_values(
    difference_CO: torch.Tensor,
    gradients_CO: list[torch.Tensor],
    take: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Each row's elementwise and token term, float64 ``(2, C)``, mean over the draws.

    Args:
        difference_CO: Of a module's output; may be overwritten.
        gradients_CO: Gradients at the output, one per label draw.
        take: Called with the number of a draw and its ``gradient x difference``, float32
            ``(C, O)``, which it may overwrite.
    """
    total: Any = 0.0
    for number, gradient_CO in enumerate(gradients_CO):
        is_last = number == len(gradients_CO) - 1
        if is_last and difference_CO.dtype == torch.float32:
            product_CO = difference_CO.mul_(gradient_CO)
        else:
            product_CO = difference_CO.float() * gradient_CO.float()
        norms_C = torch.linalg.vector_norm(product_CO, dim=1)
        values_2C = torch.stack([norms_C, product_CO.sum(dim=1)]).double().square_()
        total = total + values_2C
        if take is not None:
            take(number, product_CO)
    result: torch.Tensor = total / len(gradients_CO)
    return result


class SequenceSums:
    """Adds up ``gradient x difference`` over the rows of each sequence before it is squared.

    Args:
        sequence_T: Number of each row's sequence, int64, from 0.
        dead_T: Rows whose values do not count; None if all do.
    """

    def __init__(self, sequence_T: torch.Tensor, num_sequences: int, dead_T: torch.Tensor | None):
        numbers_B = torch.arange(num_sequences, device=sequence_T.device)
        self._is_of_BT = (numbers_B[:, None] == sequence_T).float()
        self._dead_T = dead_T
        self._sums_BO: dict[tuple[int, int], torch.Tensor] = {}

    def taker(self, index: int, rows: slice) -> Callable[[int, torch.Tensor], None]:
        """What takes the products of some rows under a format.

        Args:
            index: Of the format.
            rows: Which.
        """

        def take(draw: int, product_CO: torch.Tensor) -> None:
            if self._dead_T is not None:
                product_CO.masked_fill_(self._dead_T[rows, None], 0.0)
            sums_BO = self._is_of_BT[:, rows] @ product_CO
            before_BO = self._sums_BO.get((index, draw))
            self._sums_BO[index, draw] = sums_BO if before_BO is None else before_BO.add_(sums_BO)

        return take

    def is_complete(self, rows: slice) -> bool:
        """Whether these rows are the last ones."""
        return bool(rows.stop >= self._is_of_BT.shape[1])

    def pop(self, index: int, num_draws: int) -> torch.Tensor:
        """Sum of the squares under a format, float64, mean over the draws; forgets them."""
        squares = [
            torch.linalg.vector_norm(self._sums_BO.pop((index, draw)), dtype=torch.float64) ** 2
            for draw in range(num_draws)
        ]
        return torch.stack(squares).mean()
