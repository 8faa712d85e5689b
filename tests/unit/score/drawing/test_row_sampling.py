"""Row sampling: unbiased against the exact sums, with an honest variance, and repeatable."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from autoquant_ray.errors import NonFiniteError
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.score.drawing.row_sampling import (
    draw_rows,
    drawing_variances,
    inclusion,
    row_masses,
)

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
    estimates, scores, variances = [], [], []
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
        variances.append(sums.elementwise_variance_GF)
    means_GF, spread_GF = np.mean(estimates, axis=0), np.std(estimates, axis=0)
    assert (spread_GF > 0).all()
    from_exact_GF = (means_GF - expected.elementwise_GF) / (spread_GF / np.sqrt(NUM_SEEDS))
    assert np.abs(from_exact_GF).max() < 4.5
    z = np.array(scores)
    assert np.mean(np.abs(z) < 1) == pytest.approx(0.683, abs=0.06)
    assert np.mean(np.abs(z) < 2) == pytest.approx(0.954, abs=0.06)  # few rows: skewed
    assert np.std(z) == pytest.approx(1, abs=0.25)
    ratios_GF = np.mean(variances, axis=0) / np.var(estimates, axis=0)
    assert np.median(ratios_GF) == pytest.approx(1, abs=0.15)


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
    masses_T = row_masses([gradients_TO], torch.randn(50, 4, generator=generator))
    drawn = draw_rows(masses_T, 0.5, (1, 2)).indices_U.tolist()
    assert len(set(drawn)) == len(drawn) == 10
    assert drawn == sorted(drawn)
    assert not set(drawn) & set(range(10, 40))


def test_draw_rows_two_rows_alone_are_exact() -> None:
    masses_T = np.array([0.0, 3.0, 0.0, 1.0, 0.0])
    drawn = draw_rows(masses_T, 0.1, (0,))
    assert drawn.indices_U.tolist() == [1, 3]
    mean, variance = drawn.estimate(torch.tensor([7.0, 2.0], dtype=torch.float64))
    assert (float(mean), float(variance)) == (9.0, 0.0)


def test_draw_rows_without_any_gradient_gives_zero() -> None:
    drawn = draw_rows(row_masses([torch.zeros(5, 2)], torch.ones(5, 2)), 0.5, (0,))
    mean, variance = drawn.estimate(torch.zeros(0, dtype=torch.float64))
    assert (float(mean), float(variance)) == (0.0, 0.0)


def test_row_masses_are_gradient_times_input_and_a_tenth_gradient_alone() -> None:
    gradients_TO = torch.tensor([[1.0], [2.0], [0.0], [1.0]])
    input_TI = torch.tensor([[2.0], [1.0], [5.0], [1.0]])
    masses_T = row_masses([gradients_TO], input_TI)
    expected_T = 0.9 * np.array([4, 4, 0, 1]) / 9 + 0.1 * np.array([1, 4, 0, 1]) / 6
    assert masses_T / masses_T.sum() == pytest.approx(expected_T)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_draw_rows_takes_each_row_as_often_as_stated(share: float) -> None:
    """Over many draws: the largest rows always, the others in proportion to their masses."""
    masses_T = np.random.default_rng(0).lognormal(sigma=2.0, size=60)
    inclusion_T = inclusion(masses_T, share)
    assert inclusion_T.sum() == pytest.approx(math.ceil(share * 60))
    by_chance_T = inclusion_T < 1
    assert np.ptp((inclusion_T / masses_T)[by_chance_T]) < 1e-12
    assert masses_T[~by_chance_T].min(initial=np.inf) > masses_T[by_chance_T].max()
    counts_T = np.zeros(60)
    for seed in range(3000):
        drawn = draw_rows(masses_T, share, (seed,))
        counts_T[drawn.indices_U.numpy()] += 1
        assert drawn.inclusion_U.numpy() == pytest.approx(inclusion_T[drawn.indices_U])
    deviations_T = counts_T / 3000 - inclusion_T
    assert np.abs(deviations_T / np.sqrt(inclusion_T * (1 - inclusion_T) / 3000 + 1e-12)).max() < 4


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_drawing_variances_are_those_of_many_draws(share: float, sigma: float) -> None:
    """Brute force: both formulas, of all rows and of the drawn ones, against repeated draws."""
    random = np.random.default_rng(1)
    masses_T = random.lognormal(sigma=1.5, size=400)
    values_T = masses_T * random.lognormal(sigma=sigma, size=400)
    (((stated,),),) = (drawing_variances(values_T[None], masses_T, [share]),)
    estimates, variances = [], []
    for seed in range(3000):
        drawn = draw_rows(masses_T, share, (seed,))
        mean, variance = drawn.estimate(torch.from_numpy(values_T)[drawn.indices_U])
        estimates.append(float(mean))
        variances.append(float(variance))
    assert np.mean(estimates) == pytest.approx(values_T.sum(), abs=4 * math.sqrt(stated / 3000))
    assert np.var(estimates) == pytest.approx(stated, rel=0.12)
    assert np.mean(variances) == pytest.approx(stated, rel=0.12)


def test_drawing_variances_of_all_rows_and_of_one_are_zero() -> None:
    values_FT = np.array([[1.0, 5.0, 2.0], [0.0, 0.0, 3.0]])
    assert not drawing_variances(values_FT, np.array([1.0, 2.0, 3.0]), [1.0]).any()
    assert not drawing_variances(values_FT, np.array([1.0, 0.0, 0.0]), [0.1, 0.5]).any()


def test_nan_in_a_row_is_drawn_and_shows() -> None:
    masses_T = np.array([1.0, math.nan, 1.0, 1.0, 1.0, 1.0])
    drawn = draw_rows(masses_T, 0.2, (0,))
    assert 1 in drawn.indices_U.tolist()
    values_T = torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert math.isnan(drawn.estimate(values_T[drawn.indices_U])[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_none_of_which_has_a_finite_mass_are_all_drawn(value: float) -> None:
    """Gradients that overflow in a layer do so in all rows of the layers before it."""
    masses_T = np.array([0.0, *[value] * 8, 0.0])
    for share in (0.1, 0.5):
        assert inclusion(masses_T, share).tolist() == [0, *[1] * 8, 0]
        assert draw_rows(masses_T, share, (0,)).indices_U.tolist() == list(range(1, 9))


def test_one_huge_input_does_not_hide_the_other_rows() -> None:
    """Drawn by ``|g|^2 |x|^2`` alone, the other rows would hardly ever be seen."""
    input_TI = torch.ones(1000, 1)
    input_TI[0] = 1000.0
    masses_T = row_masses([torch.ones(1000, 1)], input_TI)
    errors_T = torch.ones(1000, dtype=torch.float64)
    errors_T[::2] = 3.0
    estimates = []
    for seed in range(50):
        drawn = draw_rows(masses_T, 0.1, (seed,))
        estimates.append(float(drawn.estimate(errors_T[drawn.indices_U])[0]))
    assert np.std(estimates) < 150
    assert np.mean(estimates) == pytest.approx(2000, abs=4 * 100 / np.sqrt(50))
