"""Importance sampling of rows: score a share of the tokens, unbiased, with a known error.

A module's sum over rows ``sum_t e_t`` is estimated from n distinct rows. Row t is among them with
probability ``pi_t = min(1, c m_t)``, where c makes these add up to n, so that the rows that matter
most are all taken, and only the others are left to chance:

    estimate = sum over drawn rows of e_t / pi_t

(Horvitz and Thompson 1952, "A generalization of sampling without replacement from a finite
universe"). The others are put into random order and drawn systematically (Hartley and Rao 1962,
"Sampling with unequal probabilities and without replacement"): every n has exactly these
probabilities, and the estimate is unbiased. Its variance is that of Hajek (1964, "Asymptotic theory
of rejective sampling with varying probabilities from a finite population"), over all rows

    N / (N - 1) * sum_t pi_t (1 - pi_t) (e_t / pi_t - B)^2

with B the mean of ``e/pi`` weighted by ``pi (1 - pi)`` and N the rows with ``pi < 1``; of the drawn
rows alone it is estimated with weights ``1 - pi_t``.

Nine tenths of ``m_t`` are proportional to ``|g_t|^2 |x_t|^2``, an upper estimate of ``e_t``. The
rest is proportional to ``|g_t|^2``: where one token's input is a thousand times larger than all
others, as at the start of a text, it alone would count, and an input quantizer whose scale it
sets errs on all the others. Such a mixture keeps ``e/pi`` bounded (Hesterberg 1995, "Weighted
average importance sampling and defensive mixture distributions").

Shape letters: T rows, U rows drawn, O out features, I in features, F formats.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoquant_ray.arrays import Floats

_DEFENSIVE = 0.1  # share of the mass that does not look at the input
_CERTAIN = 1 - 1e-9  # a larger probability is 1
_LEAST_BY_CHANCE = 2  # a single row would not show its error


@dataclass(frozen=True, kw_only=True)
class DrawnRows:
    """Rows drawn without replacement.

    Attributes:
        indices_U: Ascending, int64.
        inclusion_U: ``pi`` of each, float64.
    """

    indices_U: torch.Tensor
    inclusion_U: torch.Tensor

    def estimate(self, values_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate a sum over all rows, and the variance of that estimate.

        Args:
            values_U: The drawn rows' values, float64.

        Returns:
            Two scalars, float64.
        """
        scaled_U = values_U / self.inclusion_U
        weights_U = 1 - self.inclusion_U
        num_by_chance = weights_U.ne(0).sum()
        total = weights_U.sum().clamp(min=torch.finfo(torch.float64).tiny)
        mean = (weights_U * scaled_U).sum() / total
        squares = (weights_U * (scaled_U - mean).square()).sum()
        return scaled_U.sum(), squares * num_by_chance / (num_by_chance - 1).clamp(min=1)


def row_masses(gradients_TO: Sequence[torch.Tensor], input_TI: torch.Tensor) -> Floats:
    """``m_t`` of each row, float64 ``(T,)``; 0 where it has no gradient.

    Args:
        gradients_TO: Gradients at the output, one per label draw.
        input_TI: Input of the module.
    """
    squares_T = torch.linalg.vector_norm(input_TI, dim=1, dtype=torch.float32).double().square()
    norms_KT = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float32) for g in gradients_TO]
    gradient_T = torch.stack(norms_KT).double().square().sum(dim=0)
    by_input_T = gradient_T * squares_T
    scale = _DEFENSIVE / (1 - _DEFENSIVE) * by_input_T.sum() / gradient_T.sum()
    masses_T = by_input_T + gradient_T * torch.where(scale > 0, scale, torch.ones_like(scale))
    masses: Floats = masses_T.cpu().numpy()
    return masses


def inclusion(masses_T: Floats, share: float) -> Floats:
    """``pi_t`` of each row, which add up to ``ceil(share * T')``, T' being the rows with a mass.

    At least two rows are left to chance, or none; a mass that is NaN or infinite is certain, so
    that its row shows.

    Args:
        masses_T: From :func:`row_masses`.
        share: In (0, 1].
    """
    live_T = masses_T != 0
    count = math.ceil(share * np.count_nonzero(live_T))
    order_T = np.argsort(-np.where(np.isfinite(masses_T), masses_T, np.inf), kind="stable")
    masses_T = masses_T[order_T]
    tails_T = np.cumsum(np.where(np.isfinite(masses_T), masses_T, 0.0)[::-1])[::-1]
    num_live = int(np.count_nonzero(live_T))
    while count < num_live:
        left_T = count - np.arange(len(masses_T))
        certain_T = ~np.isfinite(masses_T) | (left_T * masses_T >= _CERTAIN * tails_T)
        if certain_T.all():  # no mass is finite
            break
        num_certain = int(np.argmin(certain_T))
        if count - num_certain >= _LEAST_BY_CHANCE:
            sorted_T = (count - num_certain) * masses_T / tails_T[num_certain]
            sorted_T[:num_certain] = 1.0
            inclusion_T: Floats = np.empty_like(sorted_T)
            inclusion_T[order_T] = sorted_T
            return inclusion_T
        count = max(count, num_certain) + 1
    everything_T: Floats = live_T.astype(np.float64)
    return everything_T


def drawing_variances(values_FT: Floats, masses_T: Floats, shares: Sequence[float]) -> Floats:
    """Variance of the estimate of each row sum, by share, ``(shares, F)``: the first formula above.

    Args:
        values_FT: ``e_t`` of all rows.
        masses_T: From :func:`row_masses`.
        shares: Each in (0, 1].
    """
    variances = np.zeros((len(shares), len(values_FT)))
    for number, share in enumerate(shares):
        inclusion_T = inclusion(masses_T, share)
        by_chance_T = (inclusion_T > 0) & (inclusion_T < 1)
        num_rows = np.count_nonzero(by_chance_T)
        if num_rows < _LEAST_BY_CHANCE:
            continue
        inclusion_T = inclusion_T[by_chance_T]
        scaled_FT = values_FT[:, by_chance_T] / inclusion_T
        weights_T = inclusion_T * (1 - inclusion_T)
        means_F = scaled_FT @ weights_T / weights_T.sum()
        squares_F = np.square(scaled_FT - means_F[:, None]) @ weights_T
        variances[number] = squares_F * num_rows / (num_rows - 1)
    return variances


def draw_rows(
    masses_T: Floats, share: float, seed: tuple[int, ...], device: torch.device | str = "cpu"
) -> DrawnRows:
    """Draw ``ceil(share * T')`` rows, T' being the rows with a gradient; at least two.

    Args:
        masses_T: From :func:`row_masses`.
        share: In (0, 1].
        seed: Non-negative integers.
        device: Where the result is needed.
    """
    inclusion_T = inclusion(masses_T, share)
    random = np.random.default_rng(seed)
    order = random.permutation(np.flatnonzero((inclusion_T > 0) & (inclusion_T < 1)))
    drawn = np.flatnonzero(inclusion_T == 1)
    if len(order):
        cumulative = np.cumsum(inclusion_T[order])
        count = round(cumulative[-1])
        points = (random.random() + np.arange(count)) * (cumulative[-1] / count)
        places = np.searchsorted(cumulative, points, side="right")
        drawn = np.sort(np.concatenate([drawn, order[places.clip(max=len(order) - 1)]]))
    return DrawnRows(
        indices_U=torch.from_numpy(drawn).to(device, non_blocking=True),
        inclusion_U=torch.from_numpy(inclusion_T[drawn]).to(device, non_blocking=True),
    )


def name_seed(name: str) -> int:
    """A number that belongs to a module's name."""
    return zlib.crc32(name.encode())
