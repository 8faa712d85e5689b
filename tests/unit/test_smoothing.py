"""SmoothQuant and AWQ against ModelOpt: scales, candidates, scores, and models that it made.

ModelOpt averages AWQ's statistics over batches, and this package over tokens: batches are equally
long here, without padding, one per shard.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from modelopt_scores import modelopt_scores, of_text

from autoquant_ray.awq import best_alphas, merge_losses
from autoquant_ray.block_formats import for_cpu
from autoquant_ray.calibration import merge_statistics, to_maxima
from autoquant_ray.sensitivity import Maxima
from autoquant_ray.smoothing import input_maximum, input_scales, with_alphas

SMOOTHQUANT, INT4_AWQ, NVFP4_AWQ = "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "NVFP4_AWQ_LITE_CFG"
SHARDS = [[24, 24], [24, 24], [24, 24]]


def calibrate(engine: Any, shards: list[Any]) -> Maxima:
    """Both passes over the shards, merged."""
    maxima = to_maxima(merge_statistics(engine.calibrate(shard) for shard in shards))
    return with_alphas(maxima, merge_losses(engine.search(shard, maxima) for shard in shards))


def quantized_by_modelopt(model: Any, batches: list[torch.Tensor], preset: str) -> Any:
    """A copy as ``mtq.quantize`` makes it of a preset; AWQ's search stays on its modules."""
    config = for_cpu(copy.deepcopy(getattr(mtq, preset)))
    if "awq" in str(config["algorithm"]):
        config["algorithm"] = {"method": "awq_lite", "debug": True}
    config["quant_cfg"] = [e for e in config["quant_cfg"] if "lm_head" not in e["quantizer_name"]]

    def run(copied: Any) -> None:
        for ids_BS in batches:
            copied(input_ids=ids_BS, use_cache=False)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return mtq.quantize(copy.deepcopy(model), config, run)


@pytest.mark.parametrize("preset", [SMOOTHQUANT, INT4_AWQ, NVFP4_AWQ])
def test_scales_and_candidates_equal_modelopt(
    preset: str, make_engine: Any, make_samples: Any
) -> None:
    prepared = make_engine("llama", (preset,))
    shards = [make_samples(lengths, seed=n) for n, lengths in enumerate(SHARDS)]
    maxima = calibrate(prepared.engine, shards)
    losses = merge_losses(
        prepared.engine.search(shard, maxima) for shard in shards
    )
    alphas = best_alphas(losses)
    theirs = quantized_by_modelopt(prepared.model, [torch.tensor(s) for s in shards], preset)
    (format_,) = prepared.plan.formats
    for group in prepared.plan.searched:
        for planned in group.modules:
            name = planned.name
            module = theirs.get_submodule(name)
            weight = prepared.model.get_submodule(name).weight
            scales = input_scales(format_, weight, maxima[name])
            assert scales is not None
            torch.testing.assert_close(scales, module.input_quantizer.pre_quant_scale)
            if preset != SMOOTHQUANT:
                assert alphas[name, preset] == module.awq_lite.best_alpha
                ratios = [
                    losses[name, preset, alpha] / loss
                    for alpha, loss in module.awq_lite.loss.items()
                ]
                np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
            if format_.input is not None:
                expected = float(module.input_quantizer.amax)
                assert input_maximum(maxima[name], scales, weight.dtype) == pytest.approx(expected)


@pytest.mark.parametrize("presets", [(SMOOTHQUANT, "INT8_DEFAULT_CFG"), (INT4_AWQ,)])
def test_scores_equal_modelopt(
    presets: tuple[str, ...], make_engine: Any, make_samples: Any
) -> None:
    prepared = make_engine("llama", presets)
    shards = [make_samples(lengths, seed=n) for n, lengths in enumerate(SHARDS)]
    maxima = calibrate(prepared.engine, shards)
    ours = np.zeros((len(prepared.names), len(presets)))
    for shard in shards:
        scores = prepared.engine.score(shard, 0, maxima)
        ours += scores.sums.elementwise_GF / scores.num_tokens**2
    theirs = modelopt_scores(
        prepared.model, [of_text(torch.tensor(shard)) for shard in shards], presets
    )
    for name, scores_F in zip(prepared.names, ours, strict=True):
        expected = [theirs[name][preset] for preset in presets]
        assert scores_F == pytest.approx(expected, rel=1e-3), name
