"""The allocation runner against models that ``mtq.quantize`` made, run by transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from evaluations import make_evaluation, quantize, random_choices

from autoquant_ray.evaluate.runner import ShardEvaluation
from autoquant_ray.quantize.calibration import calibration_of_maxima
from autoquant_ray.quantize.modules import UNQUANTIZED, FormatNumbers

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")
LENGTHS = [24, 17, 9, 24]


@torch.no_grad()
def log_probabilities(model: Any, sample: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([sample]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.double(), dim=-1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "qwen3_vl"])
def test_equals_mtq_quantize(family: str, make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer(family, FORMATS, is_modelopt_form=True)
    samples = make_samples(LENGTHS, seed=3)
    runner = make_evaluation(prepared, samples)
    choices = random_choices(len(prepared.plan.searched), 2)
    result = runner.evaluate(samples, choices)
    for choice, ours in zip(choices, result.divergences, strict=True):
        quantized = quantize(prepared, choice, samples)
        for sample, loss_N, divergence in zip(samples, result.reference, ours, strict=True):
            log_p, log_q = (log_probabilities(m, sample) for m in (prepared.model, quantized))
            targets = torch.tensor(sample[1:])[:, None]
            kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
            np.testing.assert_allclose(divergence.kl_N, kl, rtol=2e-3, atol=2e-6)
            np.testing.assert_allclose(
                divergence.loss_N, -log_q.gather(1, targets)[:, 0], rtol=1e-4
            )
            np.testing.assert_allclose(loss_N, -log_p.gather(1, targets)[:, 0], rtol=1e-4)
            agrees = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
            assert (divergence.agrees_N == agrees.numpy()).mean() > 0.95


def test_model_does_not_diverge_from_itself(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("llama", FORMATS)
    samples = make_samples(LENGTHS)
    runner = make_evaluation(prepared, samples)
    result = runner.evaluate(samples, [(UNQUANTIZED,) * len(prepared.plan.searched)])
    for loss_N, divergence in zip(result.reference, result.divergences[0], strict=True):
        assert not divergence.kl_N.any()
        assert divergence.agrees_N.all()
        assert (divergence.loss_N == loss_N).all()


def flatten(result: ShardEvaluation, index: int) -> np.ndarray[Any, Any]:
    return np.concatenate([divergence.kl_N for divergence in result.divergences[index]])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_allocations_share_work_but_not_results(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer(family, FORMATS)
    samples = make_samples(LENGTHS)
    runner = make_evaluation(prepared, samples)
    first, second = random_choices(len(prepared.plan.searched), 2, seed=1)
    swapped = (*first[:-1], (first[-1] + 2) % len(FORMATS))
    together = runner.evaluate(samples, [first, swapped, second, first])
    for index, choice in enumerate([first, swapped, second, first]):
        alone = runner.evaluate(samples, [choice])
        assert flatten(together, index).tobytes() == flatten(alone, 0).tobytes()
    assert flatten(together, 0).tobytes() != flatten(together, 1).tobytes()


def test_model_itself_stays_as_it_was(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("qwen3_moe", FORMATS)
    samples = make_samples(LENGTHS)
    before = log_probabilities(prepared.model, samples[0])
    runner = make_evaluation(prepared, samples)
    runner.evaluate(samples, random_choices(len(prepared.plan.searched), 2))
    assert torch.equal(log_probabilities(prepared.model, samples[0]), before)


def test_allocation_that_breaks_leaves_the_others_alone(
    make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer("llama", FORMATS)
    samples = make_samples(LENGTHS)
    calibration = prepared.scorer.calibrate(samples)
    broken = prepared.plan.searched[0].modules[0].name
    maxima = calibration.maxima() | {(broken, "input_amax"): float("nan")}
    calibration = calibration_of_maxima(maxima)
    runner = make_evaluation(prepared, samples, calibration=calibration)
    groups = len(prepared.plan.searched)
    fine: FormatNumbers = (0,) * groups  # weights only
    bad: FormatNumbers = (2, *(0,) * (groups - 1))
    together = runner.evaluate(samples, [bad, fine])
    assert np.isinf(flatten(together, 0)).any()
    assert flatten(together, 1).tobytes() == flatten(runner.evaluate(samples, [fine]), 0).tobytes()


def test_little_room_gives_the_same_numbers(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("qwen3_moe", FORMATS)
    samples = make_samples(LENGTHS)
    choices = random_choices(len(prepared.plan.searched), 3)
    wide, narrow = (
        make_evaluation(prepared, samples, activation_bytes=room).evaluate(samples, choices)
        for room in (2**30, 1)
    )
    for index in range(3):
        assert flatten(wide, index).tobytes() == flatten(narrow, index).tobytes()
