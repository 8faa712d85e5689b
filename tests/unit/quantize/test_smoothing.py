"""SmoothQuant and AWQ against ModelOpt: scales, candidates, scores, and models that it made.

ModelOpt averages AWQ's statistics over batches, and this package over tokens: batches are equally
long here, without padding, one per shard.
"""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from evaluations import make_evaluation
from modelopt_scores import modelopt_scores, of_text, summed_by_step

from autoquant_ray.quantize.awq import best_alphas, merge_losses
from autoquant_ray.quantize.backends.block_formats import for_cpu
from autoquant_ray.quantize.calibration import Calibration, merge_calibrations
from autoquant_ray.quantize.smoothing import input_maximum, input_scales
from autoquant_ray.score.scorer import Scorer

SMOOTHQUANT, INT4_AWQ, NVFP4_AWQ = "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "NVFP4_AWQ_LITE_CFG"
SHARDS = [[24, 24], [24, 24], [24, 24]]
EXACT = {"rtol": 2e-3, "atol": 2e-6}


def calibrate(scorer: Any, shards: list[Any]) -> Calibration:
    """Both passes over the shards, merged."""
    calibration = merge_calibrations(scorer.calibrate(shard) for shard in shards)
    losses = merge_losses(scorer.search(shard, calibration) for shard in shards)
    return calibration.with_alphas(best_alphas(losses))


def quantized_by_modelopt(model: Any, batches: list[torch.Tensor], preset: str) -> Any:
    """A copy as ``mtq.quantize`` makes it of a preset; AWQ's search stays on its modules."""
    config = for_cpu(copy.deepcopy(getattr(mtq, preset)))
    if "awq" in str(config["algorithm"]):
        config["algorithm"] = {"method": "awq_lite", "debug": True}
    whole = ("*", "*weight_quantizer", "*input_quantizer")  # no entries for some layers
    config["quant_cfg"] = [e for e in config["quant_cfg"] if e["quantizer_name"] in whole]

    def run(copied: Any) -> None:
        for ids_BS in batches:
            copied(input_ids=ids_BS, use_cache=False)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return mtq.quantize(copy.deepcopy(model), config, run)


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("llama", SMOOTHQUANT),
        ("llama", INT4_AWQ),
        ("llama", NVFP4_AWQ),
        ("gemma3n", INT4_AWQ),  # is not visited layer by layer
    ],
)
def test_scales_and_candidates_equal_modelopt(
    family: str, preset: str, make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer(family, (preset,))
    shards = [make_samples(lengths, seed=n) for n, lengths in enumerate(SHARDS)]
    calibration = calibrate(prepared.scorer, shards)
    losses = merge_losses(prepared.scorer.search(shard, calibration) for shard in shards)
    alphas = best_alphas(losses)
    theirs = quantized_by_modelopt(prepared.model, [torch.tensor(s) for s in shards], preset)
    (format_,) = prepared.plan.formats
    for group in prepared.plan.searched:
        for planned in group.modules:
            name = planned.name
            module = theirs.get_submodule(name)
            weight = prepared.model.get_submodule(name).weight
            scales = input_scales(format_, weight, calibration.of(name))
            assert scales is not None
            torch.testing.assert_close(scales, module.input_quantizer.pre_quant_scale)
            if preset != SMOOTHQUANT:
                assert alphas[name, preset] == module.awq_lite.best_alpha
                size = sum(SHARDS[0]) * len(weight)  # ModelOpt adds up the mean of every batch
                expected = {alpha: size * loss for alpha, loss in module.awq_lite.loss.items()}
                ours = {a: loss for (n, _, a), loss in losses.items() if n == name}
                assert ours == pytest.approx(expected, rel=1e-3)
            if format_.input is not None:
                largest = float(module.input_quantizer.amax)
                maximum = input_maximum(calibration.of(name), scales, weight.dtype)
                assert maximum == pytest.approx(largest)


@pytest.mark.parametrize("presets", [(SMOOTHQUANT, "INT8_DEFAULT_CFG"), (INT4_AWQ,)])
def test_scores_equal_modelopt(
    presets: tuple[str, ...], make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer("llama", presets)
    shards = [make_samples(lengths, seed=n) for n, lengths in enumerate(SHARDS)]
    calibration = calibrate(prepared.scorer, shards)
    ours = summed_by_step(prepared.scorer, shards, calibration)
    theirs = modelopt_scores(
        prepared.model, [of_text(torch.tensor(shard)) for shard in shards], presets
    )
    for name, scores_F in zip(prepared.names, ours, strict=True):
        expected = [theirs[name][preset] for preset in presets]
        assert scores_F == pytest.approx(expected, rel=1e-3), name


def evaluated(
    prepared: Any, scorer: Any, calibration: Calibration, samples: list[Any]
) -> list[Any]:
    """KL per token of each sample, with every group under the first format."""
    spec = scorer.spec
    runner = make_evaluation(
        prepared,
        samples,
        modules=spec.modules,
        formats=spec.formats,
        calibration=calibration,
        step_tokens=100,
    )
    choice = (0,) * len(prepared.plan.searched)
    evaluation = runner.evaluate(samples, [choice])
    return [divergence.kl_N for divergence in evaluation.divergences[0]]


@torch.no_grad()
def divergences(model: Any, other: Any, sample: list[int]) -> torch.Tensor:
    ids = torch.tensor([sample])
    log_p, log_q = (
        torch.log_softmax(m(input_ids=ids, use_cache=False).logits[0, :-1].double(), dim=-1)
        for m in (model, other)
    )
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@pytest.mark.parametrize(
    ("family", "preset", "dtype"),
    [
        ("llama", SMOOTHQUANT, torch.float32),
        ("llama", NVFP4_AWQ, torch.float32),
        ("llama", SMOOTHQUANT, torch.bfloat16),
        ("llama", INT4_AWQ, torch.bfloat16),
        ("qwen3_moe", SMOOTHQUANT, torch.float32),
        ("qwen3_moe", INT4_AWQ, torch.float32),
    ],
)
def test_evaluation_equals_mtq_quantize(
    family: str, preset: str, dtype: torch.dtype, make_scorer: Any, make_samples: Any
) -> None:
    """Fused experts, which neither algorithm smooths, included.

    AWQ's candidates are taken from ModelOpt: in 16 bits it compares rounded outputs, and its search
    runs with the experts already quantized, so that its choice among near equals may differ.
    """
    prepared = make_scorer(family, (preset,))
    prepared.model.to(dtype)
    scorer = Scorer(prepared.scorer.spec, model=prepared.model)
    shards = [make_samples(lengths, seed=n) for n, lengths in enumerate(SHARDS)]
    calibration = calibrate(scorer, shards)
    samples = make_samples([24, 17], seed=9)
    theirs = quantized_by_modelopt(prepared.model, [torch.tensor(s) for s in shards], preset)
    alphas = {
        (name, preset): module.awq_lite.best_alpha
        for name, module in theirs.named_modules()
        if hasattr(module, "awq_lite")
    }
    calibration = calibration.with_alphas(alphas)
    tolerance = EXACT if dtype == torch.float32 else {"rtol": 0.3, "atol": 2e-2}
    divergences_of_samples = evaluated(prepared, scorer, calibration, samples)
    for sample, kl_N in zip(samples, divergences_of_samples, strict=True):
        expected = divergences(prepared.model, theirs, sample)
        assert expected.mean() > 1e-3
        np.testing.assert_allclose(kl_N, expected, **tolerance)


def test_padding_changes_no_statistic_and_no_loss(make_scorer: Any, make_samples: Any) -> None:
    samples = make_samples([24, 9, 17])
    padded = make_scorer("llama", (NVFP4_AWQ,)).scorer
    alone = make_scorer("llama", (NVFP4_AWQ,), step_tokens=24).scorer
    results = []
    for scorer in (padded, alone):
        calibration = scorer.calibrate(samples)
        name = "model.layers.1.mlp.down_proj"
        channels = calibration.of(name).channels
        assert channels is not None
        assert channels.num_tokens == 50
        results.append((channels.largest_I, channels.mean_I, scorer.search(samples, calibration)))
    for first, second in zip(*results, strict=True):
        if isinstance(first, dict):
            assert first == pytest.approx(second, rel=1e-4)
        else:
            np.testing.assert_allclose(first, second, rtol=1e-4)


def test_search_between_calibration_and_scores_changes_no_bit_of_kept_inputs(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([24, 17, 9])
    scorer = make_scorer("llama", (INT4_AWQ, "wint8_aint8"), step_tokens=60).scorer
    calibration = scorer.calibrate(samples, shard=5)
    alphas = best_alphas(scorer.search(samples, calibration))
    calibration = calibration.with_alphas(alphas)
    kept = scorer.score(samples, 0, calibration, shard=5)
    fresh = scorer.score(samples, 0, calibration, shard=5)
    assert np.array_equal(kept.sums.elementwise_GF, fresh.sums.elementwise_GF)


def test_search_leaves_no_tensor_between_those_of_the_candidates(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([24, 17, 9])
    scorer = make_scorer("llama", (INT4_AWQ,)).scorer
    calibration = scorer.calibrate(samples)
    before = num_tensors()
    losses = scorer.search(samples, calibration)
    assert len(losses) > 100
    assert num_tensors() == before


def num_tensors() -> int:
    """Tensors that something holds."""
    gc.collect()
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


def test_scores_bfloat16_stay_near_float32(make_scorer: Any, make_samples: Any) -> None:
    samples = make_samples([60, 60])
    prepared = make_scorer("llama", (SMOOTHQUANT, INT4_AWQ))
    prepared.model.to(torch.bfloat16)
    half = Scorer(prepared.scorer.spec, model=prepared.model)
    calibration = calibrate(half, [samples])
    rounded = half.score(samples, 0, calibration).sums.elementwise_GF
    prepared.model.to(torch.float32)
    exact = Scorer(prepared.scorer.spec, model=prepared.model).score(samples, 0, calibration).sums
    ratios = rounded / exact.elementwise_GF
    # Scaled weights and inputs are rounded to 16 bits once more.
    np.testing.assert_allclose(ratios, 1, atol=0.25)
    assert np.median(ratios[:, 1]) == pytest.approx(1, abs=0.03)
