"""Finds out, while all rows of a shard are scored, what drawing some of them would do to its sums.

The samples of such a shard are run one by one, so that the sums of each are known too.

Shape letters: T rows, N samples, S shares, G groups, F formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from autoquant_ray.arrays import Floats
from autoquant_ray.distributed.scoring import DrawingTrial
from autoquant_ray.score.drawing.row_sampling import drawing_variances
from autoquant_ray.score.drawing.shares import SHARES

_SUMS = ("elementwise", "token")


class DrawingTrials:
    """Collects a :class:`DrawingTrial`.

    Args:
        tokens: Predicted tokens of each sample.
        num_groups: G.
        num_formats: F.
        estimator: Which of the sums.

    Attributes:
        sample: Position of the sample that is scored now.
    """

    def __init__(
        self, tokens: Sequence[int], num_groups: int, num_formats: int, estimator: str
    ) -> None:
        self.sample = 0
        self._tokens = tokens
        self._row = _SUMS.index(estimator)
        self._sums_NGF = np.zeros((len(tokens), num_groups, num_formats))
        self._variances_SGF = np.zeros((len(SHARES), num_groups, num_formats))

    def add(self, group: int, values_F2T: Mapping[int, torch.Tensor], masses_T: Floats) -> None:
        """Take in a call of a module.

        Args:
            group: Of the module.
            values_F2T: Format -> both terms of each row.
            masses_T: What rows would be drawn by.
        """
        formats = list(values_F2T)
        values_FT: Floats = torch.stack([v[self._row] for v in values_F2T.values()]).cpu().numpy()
        self._sums_NGF[self.sample, group, formats] += values_FT.sum(axis=1)
        self._variances_SGF[:, group, formats] += drawing_variances(values_FT, masses_T, SHARES)

    def result(self) -> DrawingTrial:
        """Of the whole shard."""
        return DrawingTrial(
            sample_sums_NGF=self._sums_NGF,
            sample_tokens_N=np.array(self._tokens, dtype=np.float64),
            variances_SGF=self._variances_SGF,
        )
