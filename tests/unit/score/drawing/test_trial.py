"""A shard that finds out what drawing rows would do: its sums are exact, what it says holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from autoquant_ray.data.samples import num_predicted
from autoquant_ray.score.drawing.shares import SHARES

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")
LENGTHS = [40, 25, 60, 33]
NUM_SEEDS = 40


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_trial_has_exact_sums_of_every_sample(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples(LENGTHS)
    exact = make_scorer(family, FORMATS).scorer
    calibration = exact.calibrate(samples)
    expected = exact.score(samples, 0, calibration)
    scores = make_scorer(family, FORMATS, row_share="auto").scorer.score(samples, 0, calibration, 0)
    assert scores.sums.elementwise_GF == pytest.approx(expected.sums.elementwise_GF, rel=1e-4)
    assert not scores.sums.elementwise_variance_GF.any()
    trial = scores.trial
    assert trial.sample_tokens_N.tolist() == [num_predicted(sample) for sample in samples]
    assert trial.sample_sums_NGF.sum(axis=0) == pytest.approx(scores.sums.elementwise_GF)
    for number, sample in enumerate(samples):
        alone = exact.score([sample], number, calibration).sums.elementwise_GF
        assert trial.sample_sums_NGF[number] == pytest.approx(alone, rel=1e-3)
    assert (np.diff(trial.variances_SGF, axis=0) <= 0).all()


def test_trial_says_the_variance_that_drawn_sums_have(make_scorer: Any, make_samples: Any) -> None:
    """Each format is drawn with another share, in one scan."""
    samples = make_samples([50, 64])
    prepared = make_scorer("llama", FORMATS, row_share="auto", step_tokens=64)
    scorer = prepared.scorer
    calibration = scorer.calibrate(samples)
    trial = scorer.score(samples, 0, calibration).trial
    numbers = (3, 5, 7)
    shares_GF = np.tile([SHARES[n] for n in numbers], (len(prepared.plan.searched), 1))
    shares_GF[0] = 1
    stated_GF = np.stack([trial.variances_SGF[n, :, f] for f, n in enumerate(numbers)], axis=1)
    sums = []
    for seed in range(NUM_SEEDS):
        scorer.spec = dataclasses.replace(scorer.spec, seed=seed)
        sums.append(scorer.score(samples, 0, calibration, None, shares_GF).sums)
    spread_GF = np.var([s.elementwise_GF for s in sums], axis=0, ddof=1)
    assert spread_GF[0] == pytest.approx(0)
    assert np.median(spread_GF[1:] / stated_GF[1:]) == pytest.approx(1, abs=0.2)
    ours_GF = np.mean([s.elementwise_variance_GF for s in sums], axis=0)
    assert ours_GF[0] == pytest.approx(0)
    assert np.median(ours_GF[1:] / stated_GF[1:]) == pytest.approx(1, abs=0.1)


def test_token_sums_are_tried_where_they_are_the_estimator(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([30, 20])
    scorer = make_scorer("llama", FORMATS, row_share="auto", estimator="token").scorer
    scores = scorer.score(samples, 0, scorer.calibrate(samples))
    assert scores.trial.sample_sums_NGF.sum(axis=0) == pytest.approx(scores.sums.token_GF)
