"""Which share of its rows each (group, format) is scored on, decided from samples scored on all.

Drawing rows adds noise to a score that is uncertain already, because the data is finite. A share is
enough where the standard error of the draw is at most a tenth of that over the data: it then adds
half a percent to the standard error of the score. Both are known once some samples are scored on
all their rows: the variance of the draw from every row's term
(:func:`~autoquant_ray.score.drawing.row_sampling.drawing_variances`), and that over the data from
the samples' sums ``e_i`` and tokens ``n_i``, as that of a ratio (Cochran 1977, "Sampling
Techniques", chapter 6): with ``R = sum e / sum n`` of N samples the variance of a sum over as many
is ``N/(N-1) * sum (e_i - R n_i)^2``. Of few samples that is itself uncertain; what is taken is its
lower bound at 95% for normal data, ``(N-1) / chi2`` of it, with the 95% quantile of N-1 degrees of
freedom. Samples are taken as independent: where those of a shard are alike, shards differ more,
and the share is larger than it need be.

Needs neither torch nor Ray.

Shape letters: N samples, S shares of ``SHARES``, G groups, F formats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoquant_ray.arrays import Floats
from autoquant_ray.distributed.scoring import DrawingTrial

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Shares that are chosen from; where none is enough, all rows are scored."""
ERROR_RATIO = 0.1
"""Largest standard error of a draw, over that of the data."""
MIN_SAMPLES, MIN_SHARDS = 8, 2
"""What the decision needs at least."""
_CONFIDENCE = 0.95


def choose_shares(trials: Sequence[DrawingTrial]) -> Floats:
    """Share of the rows that is enough, ``(G, F)``; 1 where none is, or nothing is known.

    Args:
        trials: Of the shards that were scored on all rows, in their order.
    """
    variances_SGF = np.sum([trial.variances_SGF for trial in trials], axis=0)
    sums_NGF = np.concatenate([trial.sample_sums_NGF for trial in trials])
    tokens_N = np.concatenate([trial.sample_tokens_N for trial in trials])
    allowed_GF = ERROR_RATIO**2 * _least_variance(sums_NGF, tokens_N)
    shares_GF: Floats = np.ones(allowed_GF.shape)
    for share, variances_GF in reversed(list(zip(SHARES, variances_SGF, strict=True))):
        shares_GF[(allowed_GF > 0) & (variances_GF <= allowed_GF)] = share
    return shares_GF


def _least_variance(sums_NGF: Floats, tokens_N: Floats) -> Floats:
    """Lower bound of the variance over the data of the sum of all samples; 0 of a single one."""
    from scipy.special import chdtri

    count = len(tokens_N)
    if count < 2:
        return np.zeros(sums_NGF.shape[1:])
    ratios_GF = sums_NGF.sum(axis=0) / tokens_N.sum()
    squares_GF = np.square(sums_NGF - ratios_GF * tokens_N[:, None, None]).sum(axis=0)
    least_GF: Floats = squares_GF * count / chdtri(count - 1, 1 - _CONFIDENCE)
    return least_GF
