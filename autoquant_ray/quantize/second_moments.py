"""Second moments of an input, and what GPTQ needs of them: triangular factors of their inverse.

Shape letters: I in features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from autoquant_ray.quantize.weight_cache import WeightCache

_SMALL = 128


class SecondMoments:
    """``sum_t x_t x_t^T`` of an input, over the tokens of each half of the data.

    Args:
        halves_II: Of each half, float32 ``(I, I)``.
        kept: Keeps factors; shared by all inputs of some layers. None keeps none.
        key: Of this input in there; None: its own.
    """

    def __init__(
        self,
        halves_II: Sequence[torch.Tensor],
        kept: WeightCache | None = None,
        key: tuple[Hashable, ...] | None = None,
    ) -> None:
        self.halves_II = tuple(halves_II)
        self._kept = WeightCache(0) if kept is None else kept
        self._key = (object(),) if key is None else key

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
        key = (*self._key, name)
        halves = []
        for number, half_II in enumerate(self.halves_II):

            def divide(half_II: torch.Tensor = half_II) -> torch.Tensor:
                return half_II / factors_I / factors_I[:, None]

            halves.append(self._kept.get((*key, number), divide))
        return SecondMoments(halves, self._kept, key)

    def inverse_factor(
        self, half: int | None, damping: float, is_unused_I: torch.Tensor
    ) -> torch.Tensor | None:
        """Upper Cholesky factor of the inverse of the damped moments, float32 ``(I, I)``.

        Args:
            half: As in :meth:`over`.
            damping: Share of the mean of the diagonal that is added to it.
            is_unused_I: Channels that the weight leaves out.

        Returns:
            None where there is none: the damped moments are singular in float32.
        """

        def make() -> torch.Tensor:
            return _inverse_factor(self.over(half), damping, is_unused_I)

        is_kept = not bool(is_unused_I.any())
        factor_II = self._kept.get((*self._key, half, damping), make) if is_kept else make()
        return factor_II if factor_II.numel() else None


def _inverse_factor(
    hessian_II: torch.Tensor, damping: float, is_unused_I: torch.Tensor
) -> torch.Tensor:
    """The factor; empty where there is none.

    With rows and columns in reverse, ``H = L L^T`` gives ``H = R R^T`` with an upper ``R``, whose
    inverse is the upper factor of the inverse of ``H``.
    """
    damped_II = hessian_II.clone()
    damped_II[is_unused_I, :] = 0
    damped_II[:, is_unused_I] = 0
    diagonal_I = damped_II.diagonal()
    diagonal_I[is_unused_I] = 1
    diagonal_I += damping * diagonal_I.mean()
    lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if failed:
        return damped_II[:0]
    factor_II = _inverted(lower_II.flip(0, 1))
    return factor_II if bool(factor_II.isfinite().all()) else damped_II[:0]


def _inverted(upper_II: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper triangular matrix, half by half: most of it is products."""
    width = len(upper_II)
    if width <= _SMALL:
        identity_II = torch.eye(width, device=upper_II.device)
        return torch.linalg.solve_triangular(upper_II, identity_II, upper=True)
    middle = width // 2
    inverse_II = torch.zeros_like(upper_II)
    first = _inverted(upper_II[:middle, :middle])
    last = _inverted(upper_II[middle:, middle:])
    inverse_II[:middle, :middle], inverse_II[middle:, middle:] = first, last
    torch.mm(-first @ upper_II[:middle, middle:], last, out=inverse_II[:middle, middle:])
    return inverse_II
