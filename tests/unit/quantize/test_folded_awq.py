"""The method ``awq``, whose factors can be folded.

Factors that linears share, against ModelOpt's ``awq_lite`` of one linear with the rows of all;
rounded weights, against a model whose factors were folded.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from evaluations import make_evaluation

from autoquant_ray.quantize.awq import PLAIN, best_alphas, merge_losses, shared_losses
from autoquant_ray.quantize.calibration import Calibration, merge_calibrations
from autoquant_ray.quantize.folding import fold_factors
from autoquant_ray.quantize.quantizers import fake_quantize_weight
from autoquant_ray.quantize.weight_search import WeightScales

CUSTOM = {
    "int4_g32": {
        "weight": {"num_bits": 4, "block_sizes": {"-1": 32, "type": "static"}},
        "input": None,
    }
}
AWQ = "int4_g32:awq"
SHARDS = [[24, 24], [24, 24], [24, 24]]
START = "model.layers.0"
INPUTS = [
    [f"{START}.self_attn.{name}_proj" for name in "qkv"],
    [f"{START}.mlp.gate_proj", f"{START}.mlp.up_proj"],
    [f"{START}.mlp.down_proj"],
    ["lm_head"],
]


@pytest.fixture
def make_loud_model(make_model: Any) -> Any:
    """A small model some of whose channels are much larger than others, as in trained ones."""

    def build(family: str) -> Any:
        model = copy.deepcopy(make_model(family))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randn(len(parameter), generator=generator).exp())
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight is embedding.weight:
            head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
        return model

    return build


def calibrated(prepared: Any, shards: list[Any]) -> tuple[Calibration, Any]:
    """Both passes over the shards, merged; and the losses of single linears."""
    scorer, folds = prepared.scorer, prepared.plan.folds
    calibration = merge_calibrations(scorer.calibrate(shard) for shard in shards)
    calibration = replace(calibration, folds=folds)
    losses = merge_losses(scorer.search(shard, calibration) for shard in shards)
    shared = shared_losses(losses, folds, {f.name for f in prepared.plan.formats})
    return calibration.with_alphas(best_alphas(shared)), losses


def prepare(make_scorer: Any, model: Any, *names: str) -> Any:
    """A scorer of formats with factors for a model of ours."""
    return make_scorer(model, names or (AWQ,), CUSTOM)


def by_modelopt(model: Any, names: list[str], batches: list[torch.Tensor]) -> Any:
    """One linear with the rows of several, whose factors ModelOpt has searched."""
    rows = torch.cat([model.get_submodule(name).weight for name in names])
    states: list[torch.Tensor] = []
    hook = model.get_submodule(names[0]).register_forward_pre_hook(
        lambda _, arguments: states.append(arguments[0].clone())
    )
    with torch.no_grad():
        for ids_BS in batches:
            model(input_ids=ids_BS, use_cache=False)
    hook.remove()
    linear = torch.nn.Linear(rows.shape[1], len(rows), bias=False)
    linear.weight = torch.nn.Parameter(rows.clone(), requires_grad=False)
    weight = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True},
        ],
        "algorithm": {"method": "awq_lite", "debug": True},
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        run = mtq.quantize(torch.nn.Sequential(linear), config, lambda m: [m(s) for s in states])
    return run[0]


def test_factors_and_losses_equal_modelopt_of_one_linear(
    make_scorer: Any, make_loud_model: Any, make_samples: Any
) -> None:
    model = make_loud_model("llama")
    prepared = prepare(make_scorer, model)
    shards = [make_samples(lengths, seed=n) for n, lengths in enumerate(SHARDS)]
    calibration, losses = calibrated(prepared, shards)
    (format_,) = prepared.plan.formats
    scales = WeightScales(model, calibration)
    for names in INPUTS:
        theirs = by_modelopt(model, names, [torch.tensor(shard) for shard in shards])
        alpha = theirs.awq_lite.best_alpha
        for name in names:
            assert calibration.of(name).alphas == {AWQ: alpha}
            factors_I = scales.factors((name,), format_)
            torch.testing.assert_close(factors_I, 1 / theirs.input_quantizer.pre_quant_scale)
        size = sum(SHARDS[0]) * len(theirs.weight)
        sums = {a: sum(losses[n, AWQ, a] for n in names) for a in theirs.awq_lite.loss}
        expected = {alpha: size * loss for alpha, loss in theirs.awq_lite.loss.items()}
        assert sums == pytest.approx(expected, rel=1e-3)
        assert sum(losses[n, AWQ, PLAIN] for n in names) > 1.2 * sums[alpha]


def test_factors_are_equal_over_query_heads_that_share_a_key_head(
    make_scorer: Any, make_loud_model: Any, make_samples: Any
) -> None:
    model = make_loud_model("llama")
    prepared = prepare(make_scorer, model)
    calibration, losses = calibrated(prepared, [make_samples([24, 24])])
    name = f"{START}.self_attn.o_proj"
    alpha = min(a for n, _, a in losses if n == name and a > 0.3)
    calibration = calibration.with_alphas({(name, AWQ): alpha})
    factors_I = WeightScales(model, calibration).factors((name,), prepared.plan.formats[0])
    assert factors_I is not None
    heads = factors_I.reshape(2, 2, 16)  # key heads, query heads that share each
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert factors_I.unique().numel() == 32


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3n", "qwen3_moe"])
def test_rounded_model_is_the_folded_model_rounded_by_maximum(
    family: str, make_scorer: Any, make_loud_model: Any, make_samples: Any
) -> None:
    model = make_loud_model(family)
    prepared = prepare(make_scorer, model, AWQ, "int4_g32")
    calibration, _ = calibrated(prepared, [make_samples([24, 24])])
    format_ = prepared.plan.formats[0]
    scales = WeightScales(model, calibration)
    folds = prepared.plan.folds
    factors = {name: scales.factors((name,), format_) for name in folds}
    folded = copy.deepcopy(model)
    for fold in dict.fromkeys(folds.values()):
        factors_I = factors[fold.readers[0]]
        assert factors_I is not None
        fold_factors(folded, fold, factors_I)
    for group in prepared.plan.searched:
        for planned in group.modules if group.fold else ():
            weight = folded.get_submodule(planned.name).weight
            weight.copy_(fake_quantize_weight(format_.weight, weight))
    choice = tuple(0 if group.fold else -1 for group in prepared.plan.searched)
    samples = make_samples([24, 17], seed=9)
    runner = make_evaluation(prepared, samples, calibration=calibration, step_tokens=100)
    measured = runner.evaluate(samples, [choice]).divergences[0]
    for sample, divergence in zip(samples, measured, strict=True):
        ids = torch.tensor([sample])
        with torch.no_grad():
            log_p, log_q = (
                torch.log_softmax(m(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
                for m in (model, folded)
            )
        expected = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        assert expected.mean() > 1e-3
        np.testing.assert_allclose(divergence.kl_N, expected, rtol=2e-3, atol=2e-6)


def test_linears_without_tokens_are_rounded_by_maximum(
    make_scorer: Any, make_loud_model: Any
) -> None:
    model = make_loud_model("llama")
    (format_,) = prepare(make_scorer, model).plan.formats
    assert WeightScales(model).factors(("lm_head",), format_) is None
