"""Row sampling: unbiased against the exact sums, with an honest variance, and repeatable."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from autoquant_ray.errors import NonFiniteError
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.score.row_sampling import draw_rows

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")
LENGTHS = [40, 25, 60, 33]
NUM_SEEDS = 60


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sampled_sums_are_unbiased_and_their_variance_covers(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples(LENGTHS)
    exact = make_scorer(family, FORMATS)
    calibration = exact.scorer.calibrate(samples)
    expected = exact.scorer.score(samples, 0, calibration).sums
    estimates, scores = [], []
    sampled = make_scorer(family, FORMATS, row_share=0.25)
    for seed in range(NUM_SEEDS):
        sampled.scorer.spec = dataclasses.replace(sampled.scorer.spec, seed=seed)
        sums = sampled.scorer.score(samples, 0, calibration).sums
        for name in ("elementwise", "token"):
            true_GF = getattr(expected, f"{name}_GF")
            variance_GF = getattr(sums, f"{name}_variance_GF")
            assert (variance_GF > 0).all()
            scores.append((getattr(sums, f"{name}_GF") - true_GF) / np.sqrt(variance_GF))
        estimates.append(sums.elementwise_GF)
    means_GF, spread_GF = np.mean(estimates, axis=0), np.std(estimates, axis=0)
    assert (spread_GF > 0).all()
    from_exact_GF = (means_GF - expected.elementwise_GF) / (spread_GF / np.sqrt(NUM_SEEDS))
    assert np.abs(from_exact_GF).max() < 4.5
    z = np.array(scores)
    assert np.mean(np.abs(z) < 1) == pytest.approx(0.683, abs=0.06)
    assert np.mean(np.abs(z) < 2) == pytest.approx(0.954, abs=0.04)
    assert np.std(z) == pytest.approx(1, abs=0.2)


def test_sampled_sums_repeat_for_a_seed_and_differ_between_seeds_and_shards(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([40, 40])
    first = make_scorer("llama", FORMATS, row_share=0.2, seed=3)
    again = make_scorer("llama", FORMATS, row_share=0.2, seed=3)
    other = make_scorer("llama", FORMATS, row_share=0.2, seed=4)
    calibration = first.scorer.calibrate(samples)
    sums = [
        p.scorer.score(samples, 0, calibration).sums.elementwise_GF for p in (first, again, other)
    ]
    assert np.array_equal(sums[0], sums[1])
    assert not np.allclose(sums[0], sums[2], rtol=1e-6)
    moved = first.scorer.score(samples, 8, calibration).sums.elementwise_GF
    assert not np.allclose(sums[0], moved, rtol=1e-6)


def test_sampled_sums_do_not_depend_on_how_steps_are_visited(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples(LENGTHS)
    together = make_scorer("llama", FORMATS, row_share=0.3, step_tokens=60)
    apart = make_scorer("llama", FORMATS, row_share=0.3, step_tokens=60, activation_bytes=0)
    calibration = together.scorer.calibrate(samples)
    sums, sums_apart = (p.scorer.score(samples, 0, calibration).sums for p in (together, apart))
    assert np.array_equal(sums.elementwise_GF, sums_apart.elementwise_GF)
    assert np.array_equal(sums.token_variance_GF, sums_apart.token_variance_GF)


def test_sampled_nan_gradient_is_an_error(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("llama", ("wint8_afp16",), row_share=0.5)
    with torch.no_grad():
        prepared.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        prepared.scorer.score(make_samples([8]), 0, Calibration())


def test_draw_rows_never_draws_a_row_without_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients_TO = torch.randn(50, 3, generator=generator)
    gradients_TO[10:40] = 0
    drawn = draw_rows([gradients_TO], torch.randn(50, 4, generator=generator), 0.5, (1, 2))
    assert drawn.num_draws == 10
    assert drawn.counts_U.sum() == 10
    assert not set(drawn.indices_U.tolist()) & set(range(10, 40))


def test_draw_rows_one_row_alone_is_exact() -> None:
    gradients_TO = torch.zeros(5, 2)
    gradients_TO[3] = 1.0
    drawn = draw_rows([gradients_TO], torch.ones(5, 2), 0.1, (0,))
    mean, variance = drawn.estimate(torch.tensor([7.0], dtype=torch.float64))
    assert (float(mean), float(variance)) == (7.0, 0.0)


def test_draw_rows_without_any_gradient_gives_zero() -> None:
    drawn = draw_rows([torch.zeros(5, 2)], torch.ones(5, 2), 0.5, (0,))
    mean, variance = drawn.estimate(torch.zeros(0, dtype=torch.float64))
    assert (float(mean), float(variance)) == (0.0, 0.0)


def test_draw_rows_reproduces_known_probabilities() -> None:
    """Frequencies over many draws follow ``|g|^2 |x|^2``, a tenth of them ``|g|^2``."""
    gradients_TO = torch.tensor([[1.0], [2.0], [0.0], [1.0]])
    input_TI = torch.tensor([[2.0], [1.0], [5.0], [1.0]])
    counts_T = np.zeros(4)
    for seed in range(4000):
        drawn = draw_rows([gradients_TO], input_TI, 1.0, (seed,))
        counts_T[drawn.indices_U.numpy()] += drawn.counts_U.numpy()
    expected_T = 0.9 * np.array([4, 4, 0, 1]) / 9 + 0.1 * np.array([1, 4, 0, 1]) / 6
    assert counts_T / counts_T.sum() == pytest.approx(expected_T, abs=0.02)


def test_one_huge_input_does_not_hide_the_other_rows() -> None:
    """Drawn by ``|g|^2 |x|^2`` alone, the other rows would hardly ever be seen."""
    gradients_TO = torch.ones(1000, 1)
    input_TI = torch.ones(1000, 1)
    input_TI[0] = 1000.0
    errors_T = torch.ones(1000, dtype=torch.float64)
    estimates = []
    for seed in range(50):
        drawn = draw_rows([gradients_TO], input_TI, 0.1, (seed,))
        estimates.append(float(drawn.estimate(errors_T[drawn.indices_U])[0]))
    assert np.std(estimates) < 450
    assert np.mean(estimates) == pytest.approx(1000, abs=4 * 300 / np.sqrt(50))
