"""Output differences by products in bfloat16: as exact as they must be, in a float32 model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8", "INT8_SMOOTHQUANT_CFG")
LENGTHS = [60, 40, 52]


@pytest.fixture(scope="module")
def sums_of(make_scorer: Any, make_samples: Any) -> Any:
    """Elementwise sums ``(G, F)`` of a small Llama, by the type of the products."""

    def score(difference_dtype: str | None, dtype: str = "float32") -> Any:
        scorer = make_scorer("llama", FORMATS, difference_dtype=difference_dtype).scorer
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
