"""Gradients around a quantized plan against the same model run with the changes made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from laboratory import FORMATS, Laboratory

from autoquant_ray.calibration import to_maxima
from autoquant_ray.evaluation_engine import EvaluationEngine, EvaluationSpec
from autoquant_ray.evaluation_table import mean_kl
from autoquant_ray.formats import NONE
from autoquant_ray.models import ModelRef
from autoquant_ray.quantized_layers import UNQUANTIZED

MENU = ("wint4_afp16", "wfp8_afp8", "wint8_aint8")
LENGTHS = [24, 17, 9, 24]


def make_evaluation(prepared: Any, samples: list[list[int]], **changes: Any) -> EvaluationEngine:
    spec = prepared.engine.spec
    fields: dict[str, Any] = {
        "model": ModelRef(name="in memory", path="unused"),
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "modules": spec.modules,
        "formats": spec.formats,
        "maxima": to_maxima(prepared.engine.calibrate(samples)),
        "step_tokens": 60,
    }
    return EvaluationEngine(EvaluationSpec(**(fields | changes)), model=prepared.model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma3n"])
def test_small_flips_change_what_the_gradients_say(
    family: str, make_engine: Any, make_samples: Any
) -> None:
    """Back to 16 bits from 8: the changes are small, so that the first terms tell them."""
    prepared = make_engine(family, MENU)
    samples = make_samples(LENGTHS, seed=3)
    engine = make_evaluation(prepared, samples)
    groups = len(prepared.plan.searched)
    choice = tuple(0 if group % 2 else 2 for group in range(groups))
    found = engine.score_flips(samples, 0, choice)
    flips = [(*choice[:group], UNQUANTIZED, *choice[group + 1 :]) for group in range(0, groups, 2)]
    own, *others = (
        sum(float(one.kl_N.sum(dtype=np.float64)) for one in column)
        for column in engine.evaluate(samples, [choice, *flips]).divergences
    )
    assert found.num_tokens == sum(length - 1 for length in LENGTHS)
    assert found.kl == pytest.approx(own, rel=1e-4)
    predicted = found.slope_GF[::2, -1] + 0.5 * found.squares_GF[::2, -1]
    measured = np.array(others) - own
    assert np.corrcoef(predicted, measured)[0, 1] > 0.9
    for group, index in enumerate(choice):
        assert found.slope_GF[group, index] == found.squares_GF[group, index] == 0


def test_steps_and_placement_of_samples_change_nothing(make_engine: Any, make_samples: Any) -> None:
    prepared = make_engine("llama", MENU)
    samples = make_samples(LENGTHS, seed=3)
    choice = tuple(group % 3 for group in range(len(prepared.plan.searched)))
    maxima = to_maxima(prepared.engine.calibrate(samples))
    one, many = (
        make_evaluation(prepared, samples, maxima=maxima, **changes).score_flips(samples, 5, choice)
        for changes in ({"step_tokens": 10_000}, {"step_tokens": 24, "activation_bytes": 1})
    )
    np.testing.assert_allclose(one.slope_GF, many.slope_GF, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(one.squares_GF, many.squares_GF, rtol=1e-3, atol=1e-7)


def test_model_itself_stays_as_it_was(make_engine: Any, make_samples: Any) -> None:
    prepared = make_engine("qwen3_moe", MENU)
    samples = make_samples(LENGTHS)
    engine = make_evaluation(prepared, samples)
    choice = (0,) * len(prepared.plan.searched)
    before = engine.evaluate(samples, [choice])
    engine.score_flips(samples, 0, choice)
    after = engine.evaluate(samples, [choice])
    for ours, theirs in zip(before.divergences[0], after.divergences[0], strict=True):
        assert ours.kl_N.tobytes() == theirs.kl_N.tobytes()
    assert [one.tobytes() for one in before.reference] == [o.tobytes() for o in after.reference]


def test_flips_are_ranked_better_than_by_the_scores(laboratory: Laboratory) -> None:
    """Where all layers have few bits, gradients around the plan tell its neighbours apart."""
    names = laboratory.names
    formats = dict(zip(names, [FORMATS[0], FORMATS[2]] * len(names), strict=False))
    plan: Any = SimpleNamespace(formats=formats)
    shards = range(4)
    predicted = laboratory.score_flips(plan, shards)
    flips = [(g, f) for g in names for f in FORMATS if formats[g] != f]
    plans: list[Any] = [SimpleNamespace(formats={**formats, g: f}) for g, f in flips]
    own, *others = (mean_kl(one) for one in laboratory.measure([plan, *plans], shards))
    measured = [other - own for other in others]
    by_scores = [laboratory.scores[g, f] - laboratory.scores[g, formats[g]] for g, f in flips]
    ours = [predicted[flip] for flip in flips]
    assert scipy.stats.spearmanr(ours, measured).statistic > 0.9
    errors = [np.abs(np.subtract(one, measured)).sum() for one in (ours, by_scores)]
    assert errors[0] < errors[1]
    assert set(predicted) == {(g, f) for g in names for f in (*FORMATS, NONE)}
