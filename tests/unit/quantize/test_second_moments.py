"""Feedback by second moments: that of the inverse's Cholesky factor, made once for an input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoquant_ray.quantize.second_moments import SecondMoments
from autoquant_ray.quantize.weight_cache import UNBOUNDED, WeightCache


def halves(width: int, num_tokens: int = 400) -> list[torch.Tensor]:
    draws = np.random.default_rng(0).standard_normal((2, num_tokens, width), dtype=np.float32)
    return [torch.from_numpy(half.T @ half) for half in draws]


@pytest.mark.parametrize("width", [48, 300])
@pytest.mark.parametrize("half", [None, 0, 1])
def test_feedback_is_that_of_the_damped_inverse(width: int, half: int | None) -> None:
    sums = halves(width)
    is_unused_I = torch.zeros(width, dtype=torch.bool)
    is_unused_I[5] = True
    feedback_II = SecondMoments(sums).feedback(half, 0.1, is_unused_I)
    assert feedback_II is not None
    hessian_II = (sums[0] + sums[1] if half is None else sums[half]).double()
    hessian_II[5, :] = hessian_II[:, 5] = 0
    hessian_II[5, 5] = 1
    hessian_II += 0.1 * hessian_II.diagonal().mean() * torch.eye(width)
    factor_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    # GPTQ's column j is w_j - sum_k e_k A_kj / A_kk, with what is left of w_k as e_k: as one sum
    # over the errors w_k - q_k, the rows of A / diag(A) are to be inverted.
    expected_II = torch.linalg.inv(factor_II / factor_II.diagonal()[:, None])
    torch.testing.assert_close(feedback_II.double(), expected_II, rtol=1e-4, atol=1e-6)


def test_singular_moments_have_no_feedback() -> None:
    (alone,) = halves(32, num_tokens=8)[:1]
    is_unused_I = torch.zeros(32, dtype=torch.bool)
    assert SecondMoments([-alone, -alone]).feedback(0, 0.01, is_unused_I) is None
    assert SecondMoments([alone, alone]).feedback(0, 0.01, is_unused_I) is not None


def test_feedback_is_kept_for_weights_with_the_same_input() -> None:
    sums, kept = halves(32), WeightCache(UNBOUNDED)
    moments, others = SecondMoments(sums, kept), SecondMoments([h * 2 for h in sums], kept)
    is_unused_I = torch.zeros(32, dtype=torch.bool)
    first = moments.feedback(1, 0.1, is_unused_I)
    assert moments.feedback(1, 0.1, is_unused_I) is first
    for half, damping, of in ((0, 0.1, moments), (1, 1.0, moments), (1, 0.1, others)):
        other = of.feedback(half, damping, is_unused_I)
        assert first is not None
        assert other is not None
        assert not torch.equal(other, first)
    is_unused_I[3] = True
    assert moments.feedback(1, 0.1, is_unused_I) is not first


def test_divided_moments_are_those_of_divided_inputs() -> None:
    input_TI = torch.from_numpy(np.random.default_rng(1).standard_normal((60, 32)).astype("f4"))
    factors_I, kept = torch.linspace(0.5, 2, 32), WeightCache(UNBOUNDED)
    moments = SecondMoments([input_TI.T @ input_TI, torch.eye(32)], kept)
    is_unused_I = torch.zeros(32, dtype=torch.bool)
    plain = moments.feedback(0, 0.1, is_unused_I)
    divided = moments.divided(factors_I, "a")
    scaled_TI = input_TI / factors_I
    torch.testing.assert_close(divided.over(0), scaled_TI.T @ scaled_TI, rtol=1e-4, atol=1e-4)
    feedback_II = divided.feedback(0, 0.1, is_unused_I)
    assert feedback_II is not plain
    assert moments.divided(factors_I, "a").feedback(0, 0.1, is_unused_I) is feedback_II
