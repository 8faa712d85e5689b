"""Importance sampling of rows: score a share of the tokens, unbiased, with a known error.

A module's sum over rows ``sum_t e_t`` is estimated from M rows drawn with replacement with
probability ``p_t``:

    estimate = 1/M sum_m e_{t_m} / p_{t_m}

Nine tenths of ``p_t`` are proportional to ``|g_t|^2 |x_t|^2``, an upper estimate of ``e_t``. The
rest is proportional to ``|g_t|^2``: where one token's input is a thousand times larger than all
others, as at the start of a text, it alone would be drawn, and an input quantizer whose scale it
sets errs on all the others. Such a mixture keeps ``e/p`` bounded (Hesterberg 1995, "Weighted
average importance sampling and defensive mixture distributions"). A larger rest would draw more
distinct rows, which cost time.

Its variance is estimated by ``s^2 / M`` with ``s^2`` the sample variance of ``e/p`` (Hansen and
Hurwitz 1943, "On the theory of sampling from finite populations").

Shape letters: T rows, M draws, U distinct rows drawn, O out features, I in features.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch

_DEFENSIVE = 0.1  # share of the probability that does not look at the input


@dataclass(frozen=True, kw_only=True)
class DrawnRows:
    """Rows drawn with replacement.

    Attributes:
        indices_U: Distinct rows, ascending, int64.
        counts_U: How often each was drawn, float64; sums to ``num_draws``, if any row can be drawn.
        inverse_U: ``1 / p`` of each, float64.
        num_draws: M, at least 2.
    """

    indices_U: torch.Tensor
    counts_U: torch.Tensor
    inverse_U: torch.Tensor
    num_draws: int

    def estimate(self, values_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate a sum over all rows, and the variance of that estimate.

        Args:
            values_U: The drawn rows' values, float64.

        Returns:
            Two scalars, float64.
        """
        scaled_U = values_U * self.inverse_U
        mean = (self.counts_U * scaled_U).sum() / self.num_draws
        squares = (self.counts_U * (scaled_U - mean).square()).sum()
        return mean, squares / (self.num_draws - 1) / self.num_draws


def draw_rows(
    gradients_TO: list[torch.Tensor], input_TI: torch.Tensor, share: float, seed: tuple[int, ...]
) -> DrawnRows:
    """Draw ``ceil(share * T')`` rows, T' being the rows with a gradient; at least two.

    Args:
        gradients_TO: Gradients at the output, one per label draw.
        input_TI: Input of the module.
        share: In (0, 1].
        seed: Non-negative integers.
    """
    squares_T = torch.linalg.vector_norm(input_TI, dim=1, dtype=torch.float32).double().square()
    norms_KT = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float32) for g in gradients_TO]
    gradient_T = torch.stack(norms_KT).double().square().sum(dim=0)
    by_input_T = gradient_T * squares_T
    scale = _DEFENSIVE / (1 - _DEFENSIVE) * by_input_T.sum() / gradient_T.sum()
    mass_T = by_input_T + gradient_T * torch.where(scale > 0, scale, torch.ones_like(scale))
    cumulative_T = mass_T.cumsum(0)
    num_live = int((mass_T != 0).sum())  # NaN counts, and makes the estimate NaN
    if num_live == 0:
        empty = mass_T.new_zeros(0)
        return DrawnRows(indices_U=empty.long(), counts_U=empty, inverse_U=empty, num_draws=2)
    num_draws = max(2, math.ceil(share * num_live))
    uniforms_M = np.sort(np.random.default_rng(seed).random(num_draws))
    points_M = torch.from_numpy(uniforms_M).to(cumulative_T) * cumulative_T[-1]
    rows_M = torch.searchsorted(cumulative_T, points_M, right=True)
    last = int(mass_T.nonzero()[-1])
    indices_U, counts_U = torch.unique_consecutive(rows_M.clamp(max=last), return_counts=True)
    return DrawnRows(
        indices_U=indices_U,
        counts_U=counts_U.double(),
        inverse_U=cumulative_T[-1] / mass_T[indices_U],
        num_draws=num_draws,
    )


def name_seed(name: str) -> int:
    """A number that belongs to a module's name."""
    return zlib.crc32(name.encode())
