"""Shares of rows: enough against brute force, all rows where little is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autoquant_ray.distributed.scoring import DrawingTrial
from autoquant_ray.score.drawing.row_sampling import draw_rows, drawing_variances
from autoquant_ray.score.drawing.shares import ERROR_RATIO, SHARES, choose_shares

ROWS = 64


class Population:
    """Samples of rows with masses and terms of one group under two formats.

    The first follows the masses closely; the second does not, and its samples are nearly alike.
    """

    def __init__(self, seed: int, num_samples: int) -> None:
        random = np.random.default_rng(seed)
        levels_N1 = random.gamma(4.0, 0.25, size=(num_samples, 1))
        self.masses_NT = random.gamma(2.0, 0.5, size=(num_samples, ROWS))
        close = levels_N1 * self.masses_NT * random.lognormal(sigma=0.1, size=(num_samples, ROWS))
        loose = random.gamma(2.0, 0.5, size=(num_samples, ROWS))
        self.values_FNT = np.stack([close, loose])

    def trial(self) -> DrawingTrial:
        variances_SGF = np.zeros((len(SHARES), 1, 2))
        for number, masses_T in enumerate(self.masses_NT):
            variances_SGF[:, 0] += drawing_variances(self.values_FNT[:, number], masses_T, SHARES)
        return DrawingTrial(
            sample_sums_NGF=self.values_FNT.sum(axis=2).T[:, None],
            sample_tokens_N=np.full(len(self.masses_NT), float(ROWS)),
            variances_SGF=variances_SGF,
        )


def test_chosen_shares_keep_the_draw_below_a_tenth_of_the_error_over_the_data() -> None:
    """Brute force: other samples of the same kind, their rows drawn with the chosen shares."""
    ratios, shares = [], []
    for seed in range(12):
        ((close, loose),) = choose_shares([Population(seed, 16).trial()])
        assert loose == 1
        shares.append(close)
        others = Population(1000 + seed, 400)
        sums_N, errors = others.values_FNT[0].sum(axis=1), []
        for number, (values_T, masses_T) in enumerate(
            zip(others.values_FNT[0], others.masses_NT, strict=True)
        ):
            drawn = draw_rows(masses_T, close, (seed, number))
            rows = drawn.indices_U.numpy()
            errors.append((values_T[rows] / drawn.inclusion_U.numpy()).sum() - sums_N[number])
        ratios.append(np.std(errors) / np.std(sums_N))
    assert 0.05 <= min(shares) <= max(shares) < 0.7
    assert max(ratios) < ERROR_RATIO
    assert np.mean(ratios) > 0.4 * ERROR_RATIO  # and not much more rows than needed


def test_more_noise_of_the_draw_needs_a_larger_share_until_all() -> None:
    trial = Population(0, 16).trial()
    shares = []
    for factor in (0.5, 1.0, 4.0, 16.0, 1e6):
        louder = DrawingTrial(
            sample_sums_NGF=trial.sample_sums_NGF,
            sample_tokens_N=trial.sample_tokens_N,
            variances_SGF=trial.variances_SGF * factor,
        )
        shares.append(choose_shares([louder])[0, 0])
    assert shares == sorted(shares)
    assert shares[0] < shares[-2] < shares[-1] == 1


@pytest.mark.parametrize("case", ["a single sample", "no spread", "nothing seen"])
def test_unknown_error_over_the_data_scores_all_rows(case: str) -> None:
    population: Any = Population(0, 1 if case == "a single sample" else 8)
    if case == "no spread":
        population.values_FNT[:] = 1.0
    elif case == "nothing seen":
        population.values_FNT[:] = 0.0
    assert (choose_shares([population.trial()]) == 1).all()


def test_shares_of_two_shards_are_those_of_their_samples_together() -> None:
    first, second = Population(3, 8).trial(), Population(4, 8).trial()
    together = DrawingTrial(
        sample_sums_NGF=np.concatenate([first.sample_sums_NGF, second.sample_sums_NGF]),
        sample_tokens_N=np.concatenate([first.sample_tokens_N, second.sample_tokens_N]),
        variances_SGF=first.variances_SGF + second.variances_SGF,
    )
    assert np.array_equal(choose_shares([first, second]), choose_shares([together]))
