"""Output differences by products in bfloat16 and of integers: as exact as they must be, in a
float32 model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import small_config
from transformers import AutoModelForCausalLM

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8", "INT8_SMOOTHQUANT_CFG", "per token")
CUSTOM = {
    "per token": {
        "weight": {"num_bits": 8, "axis": None},
        "input": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
    }
}
NUM_OTHERS = 2
"""The formats after these multiply integers."""
LENGTHS = [60, 40, 52]


@pytest.fixture(scope="module")
def sums_of(make_scorer: Any, make_samples: Any) -> Any:
    """Elementwise sums ``(G, F)`` of a small Llama, by the type of the products."""

    def score(difference_dtype: str | None, dtype: str = "float32") -> Any:
        scorer = make_scorer("llama", FORMATS, CUSTOM, difference_dtype=difference_dtype).scorer
        if dtype == "bfloat16":
            scorer.model.bfloat16()
        samples = make_samples(LENGTHS)
        return scorer.score(samples, 0, scorer.calibrate(samples)).sums.elementwise_GF

    return score


def test_products_in_bfloat16_err_by_less_than_a_percent(sums_of: Any) -> None:
    ratios = sums_of("bfloat16") / sums_of("float32")
    assert not (ratios == 1).any()  # others than in float32
    assert np.abs(np.median(ratios, axis=0) - 1).max() < 0.003
    assert np.abs(ratios - 1).max() < 0.02


def test_products_of_the_model_type_change_no_byte(sums_of: Any) -> None:
    assert np.array_equal(sums_of(None), sums_of("float32"))
    assert np.array_equal(sums_of(None, "bfloat16"), sums_of("bfloat16", "bfloat16"))


def test_products_in_float32_of_a_bfloat16_model_differ_little(sums_of: Any) -> None:
    ratios = sums_of("float32", "bfloat16") / sums_of("bfloat16", "bfloat16")
    assert not (ratios == 1).all(axis=0).any()
    assert np.abs(ratios - 1).max() < 0.02


def test_products_of_integers_give_the_sums_of_float32(sums_of: Any) -> None:
    exact, by_integers = sums_of("float32"), sums_of("int8+float32")
    assert np.array_equal(by_integers[:, :NUM_OTHERS], exact[:, :NUM_OTHERS])
    ratios = by_integers[:, NUM_OTHERS:] / exact[:, NUM_OTHERS:]
    assert not (ratios == 1).all(axis=0).any()
    assert np.abs(ratios - 1).max() < 1e-4


def test_formats_without_integers_are_multiplied_in_the_other_type(sums_of: Any) -> None:
    both = sums_of("int8+bfloat16")
    assert np.array_equal(both[:, :NUM_OTHERS], sums_of("bfloat16")[:, :NUM_OTHERS])
    assert np.array_equal(both[:, NUM_OTHERS:], sums_of("int8+float32")[:, NUM_OTHERS:])


def test_products_of_a_bfloat16_model_are_not_of_integers(sums_of: Any) -> None:
    sums = sums_of("int8+bfloat16", "bfloat16")
    assert np.array_equal(sums, sums_of("bfloat16", "bfloat16"))


def test_products_of_sizes_that_cuda_does_not_take_are_in_the_other_type(
    make_scorer: Any, make_samples: Any
) -> None:
    config = small_config("llama")
    config.intermediate_size, config.attention_bias = 100, True
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    samples, sums = make_samples(LENGTHS), []
    for dtype in ("float32", "int8+float32"):
        prepared = make_scorer(model, ("wint8_aint8",), difference_dtype=dtype)
        calibration = prepared.scorer.calibrate(samples)
        sums.append(prepared.scorer.score(samples, 0, calibration).sums.elementwise_GF[:, 0])
    is_equal = dict(zip(prepared.names, sums[0] == sums[1], strict=True))
    mlp = {name for name in prepared.names if "mlp" in name}
    assert mlp
    assert {name for name, equal in is_equal.items() if equal} == mlp
    assert np.abs(sums[1] / sums[0] - 1).max() < 1e-4  # with biases too
