"""Rows that stand for all: which they are, and AWQ's factors by them."""

from __future__ import annotations

import pytest
import torch
from weight_formats import INT4

from autoquant_ray.quantize.awq import channel_scales, weight_importance
from autoquant_ray.quantize.input_factors import candidate_error, shared_error, squared_norm
from autoquant_ray.quantize.judged_rows import judged_rows

ROWS, WIDTH = 1536, 64


@pytest.mark.parametrize("least", [64, 128])
@pytest.mark.parametrize("num_rows", [1, 63, 127, 192, 576, 1536, 49152])
def test_rows_are_some_of_all_and_of_every_channel_of_a_head(num_rows: int, least: int) -> None:
    numbers = range(num_rows)[judged_rows(num_rows, least)]
    assert min(num_rows, least) <= len(numbers) <= min(num_rows, 300)
    if num_rows >= 8 * least:
        assert len(numbers) <= num_rows / 6
        assert {number % 64 for number in numbers} == set(range(64))


def test_factors_are_what_all_rows_choose() -> None:
    """Rows of unequal size, and an input with a few large channels."""
    draw = torch.Generator().manual_seed(0)
    sizes_O = 0.5 + torch.rand(ROWS, 1, generator=draw)
    weight_OI = torch.randn(ROWS, WIDTH, generator=draw) * sizes_O
    input_TI = torch.randn(200, WIDTH, generator=draw)
    input_TI[:, ::9] *= 8
    importance_I, mean_I = weight_importance(weight_OI, INT4), input_TI.abs().mean(dim=0)
    losses, of_all = [], []
    for alpha in torch.arange(0, 1.1, 0.1).tolist():
        factors_I = channel_scales(mean_I, importance_I, alpha)
        error_RI = shared_error(weight_OI, INT4, factors_I)
        assert len(error_RI) < ROWS / 6
        losses.append(float(squared_norm(input_TI, error_RI)))
        of_all.append(float(squared_norm(input_TI, candidate_error(weight_OI, INT4, factors_I))))
    assert losses == pytest.approx(of_all, rel=0.1)
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1
    assert of_all[best] < 1.02 * min(of_all)
