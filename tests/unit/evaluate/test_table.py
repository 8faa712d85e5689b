"""Rows of measured allocations, some of which break the model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.evaluate.table import Measured, evaluation_rows


def test_perplexity_of_a_broken_model_is_the_last_float_or_infinite() -> None:
    """Finite logits that are thousands of nats off are no reason to lose all other results."""
    nats = (2.0, 700.0, 710.0, 1e6, math.inf)
    candidates = [
        Candidate(name=f"{n}", formats={}, predicted_kl=1.0, weight_bytes=8.0, effective_bits=4.0)
        for n in nats
    ]
    measured = [
        Measured(
            kl_N=np.full(2, n),
            kl_S=np.full(1, 2 * n),
            loss=2 * n,
            reference_loss=2.0,
            num_agreeing=0,
            tokens_S=np.full(1, 2.0),
        )
        for n in nats
    ]
    rows = evaluation_rows(candidates, measured, {})
    values = [row["perplexity"] for row in rows]
    assert values[:2] == [pytest.approx(math.e**2), pytest.approx(1.0142320547350045e304)]
    assert values[2:] == [math.inf] * 3
    assert [row["reference_perplexity"] for row in rows] == [pytest.approx(math.e)] * len(nats)
