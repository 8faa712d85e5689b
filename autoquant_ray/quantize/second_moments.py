"""Second moments of an input, and what GPTQ needs of them: how errors are fed back.

Shape letters: I in features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from autoquant_ray.quantize.weight_cache import WeightCache


class SecondMoments:
    """``sum_t x_t x_t^T`` of an input, over the tokens of each half of the data.

    Args:
        halves_II: Of each half, float32 ``(I, I)``.
        kept: Keeps factors; shared by all inputs of some layers. None keeps none.
        key: Of this input in there; None: its own.

    Attributes:
        halves_II: As given.
        key: Equal for equal moments.
    """

    def __init__(
        self,
        halves_II: Sequence[torch.Tensor],
        kept: WeightCache | None = None,
        key: tuple[Hashable, ...] | None = None,
    ) -> None:
        self.halves_II = tuple(halves_II)
        self._kept = WeightCache(0) if kept is None else kept
        self.key = (object(),) if key is None else key

    def over(self, half: int | None) -> torch.Tensor:
        """The moments over a half, or over all tokens.

        Args:
            half: Its number; None: all.
        """
        return sum(self.halves_II[1:], self.halves_II[0]) if half is None else self.halves_II[half]

    def divided(self, factors_I: torch.Tensor, name: str) -> SecondMoments:
        """The moments of ``x / s``.

        Args:
            factors_I: The ``s``.
            name: Of the factors; equal for equal ones.
        """
        key = (*self.key, name)
        halves = []
        for number, half_II in enumerate(self.halves_II):

            def divide(half_II: torch.Tensor = half_II) -> torch.Tensor:
                return half_II / factors_I / factors_I[:, None]

            halves.append(self._kept.get((*key, number), divide))
        return SecondMoments(halves, self._kept, key)

    def drop_factors(self) -> None:
        """Forget the factors that were kept, those of inputs that share the place too."""
        self._kept.clear()

    def feedback(
        self, half: int | None, damping: float, is_unused_I: torch.Tensor
    ) -> torch.Tensor | None:
        """How much of a column's error each later column makes up for, float32 ``(I, I)``.

        The damped moments are ``R R^T`` with an upper triangular ``R``, whose columns are divided
        by their numbers on the diagonal. (What GPTQ takes from the rows of the inverse's Cholesky
        factor comes to the same.)

        Args:
            half: As in :meth:`over`.
            damping: Share of the mean of the diagonal that is added to it.
            is_unused_I: Channels that the weight leaves out.

        Returns:
            Above the diagonal: row k, column j of what is left of column k goes to column j. None
            where there is none: the damped moments are singular in float32.
        """

        def make() -> torch.Tensor:
            return _feedback(self.over(half), damping, is_unused_I)

        is_kept = not bool(is_unused_I.any())
        feedback_II = self._kept.get((*self.key, half, damping), make) if is_kept else make()
        return feedback_II if feedback_II.numel() else None


def _feedback(hessian_II: torch.Tensor, damping: float, is_unused_I: torch.Tensor) -> torch.Tensor:
    """The feedback; empty where there is none.

    With rows and columns in reverse, ``H = L L^T`` gives ``H = R R^T`` with an upper ``R``.
    No more than two matrices of this size are kept at a time, beside the caller's.
    """
    damped_II = hessian_II.flip(0, 1)
    del hessian_II  # a sum of halves that nobody else has
    is_unused_I = is_unused_I.flip(0)
    damped_II[is_unused_I, :] = 0
    damped_II[:, is_unused_I] = 0
    diagonal_I = damped_II.diagonal()
    diagonal_I[is_unused_I] = 1
    diagonal_I += damping * diagonal_I.mean()
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    del damped_II, diagonal_I
    if failed:
        return lower_II.new_empty(0, 0)
    lower_II.div_(lower_II.diagonal().clone())
    if not bool(lower_II.isfinite().all()):
        return lower_II.new_empty(0, 0)
    return lower_II.flip(0, 1)
