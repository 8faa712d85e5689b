"""GPTQ of routed experts: moments of their own tokens, ModelOpt's own result, honest scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from weight_formats import INT4

from autoquant_ray.calibrate.hessians import HessianCollector, RoutedExperts
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.modelopt_api import prepare_experts
from autoquant_ray.models.quantizable import quantizable_modules
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.experts import FusedExperts
from autoquant_ray.quantize.gptq.fit import gptq_codes
from autoquant_ray.quantize.grid import grid_of, plain_codes, values_of
from autoquant_ray.quantize.modules import QuantizedLayers
from autoquant_ray.quantize.quantizers import make_weight_quantizer
from autoquant_ray.quantize.second_moments import SecondMoments
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.scorer import Scorer

PLAIN, GPTQ, FP8 = "wint4_g32_afp16:max", "wint4_g32_afp16:gptq", "wfp8_afp16:gptq"
LENGTHS = [250, 190, 220, 170]


def shards_of(samples: Sequence[Any], num_shards: int = 2) -> list[Any]:
    """Samples dealt to shards in turns."""
    return [
        SimpleNamespace(shard=number, samples=samples[number::num_shards])
        for number in range(num_shards)
    ]


def fitted(scorer: Scorer, samples: Sequence[Any], **changes: Any) -> Calibration:
    """What the stages before scores give: a half for each of two shards."""
    calibration = replace(scorer.calibrate(samples), halves={0: 0, 1: 1}, **changes)
    layers = range(len(scorer.model.model.layers) + 1)
    fits = scorer.fit(layers, calibration, shards_of(samples))
    rounding = {key: fit for layer in layers for key, fit in fits[layer].rounding.items()}
    return replace(calibration, rounding=rounding)


def expert_inputs(
    model: Any, path: str, batches: Sequence[dict[str, torch.Tensor]], num_experts: int
) -> list[dict[str, torch.Tensor]]:
    """Inputs of both projections of every expert at real tokens, by the formulas of the family."""
    module = model.get_submodule(path)
    calls: list[Any] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    seen: list[dict[str, list[torch.Tensor]]] = [
        {"gate_up_proj": [], "down_proj": []} for _ in range(num_experts)
    ]
    for (states_TH, routes_TK, _), batch in zip(calls, batches, strict=True):
        real_T = batch["attention_mask"].flatten().bool()
        for expert, inputs in enumerate(seen):
            rows_RH = states_TH[(routes_TK == expert).any(dim=1) & real_T]
            inputs["gate_up_proj"].append(rows_RH)
            weight = module.gate_up_proj[expert]
            if hasattr(module, "gate_up_proj_bias"):
                both = rows_RH @ weight + module.gate_up_proj_bias[expert]
                gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
                inputs["down_proj"].append((up + 1) * gate * torch.sigmoid(1.702 * gate))
            else:
                gate, up = (rows_RH @ weight.T).chunk(2, dim=1)
                inputs["down_proj"].append(gate * torch.sigmoid(gate) * up)
    return [{name: torch.cat(rows) for name, rows in inputs.items()} for inputs in seen]


def padded(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A batch of samples, filled up with token 7."""
    width = max(map(len, samples))
    ids = torch.tensor([[*sample, *[7] * (width - len(sample))] for sample in samples])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in samples])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["Qwen3-MoE", "GPT-OSS"])
@torch.no_grad()
def test_moments_are_sums_over_the_real_tokens_that_an_expert_got(
    family: str, make_samples: Any
) -> None:
    model = family_model(family)
    prepare_experts(model)
    planned = next(m for m in quantizable_modules(model) if m.kind == "experts")
    module = model.get_submodule(planned.name)
    numbers = (0, 1, 3)
    routed = RoutedExperts(module, FusedExperts(module, planned), numbers)
    collector = HessianCollector({}, {planned.name: routed})
    samples = make_samples(LENGTHS, seed=3)
    batches = [padded(samples[:2]), padded(samples[2:])]
    with collector.collecting():
        for half, batch in enumerate(batches):
            collector.begin(half)
            collector.set_mask(batch["attention_mask"])
            model(**batch, use_cache=False)
    by_half = [expert_inputs(model, planned.name, [batch], 4) for batch in batches]
    moments = collector.moments()
    names = {f"{planned.name}.{p}.{n}": (p, n) for p in planned.parameters for n in numbers}
    assert set(moments) == set(names)
    for name, (parameter, number) in names.items():
        for half, sum_II in enumerate(moments[name].halves_II):
            input_TI = by_half[half][number][parameter].double()
            torch.testing.assert_close(sum_II.double(), input_TI.T @ input_TI, rtol=1e-4, atol=1e-4)
            assert collector.num_tokens(name)[half] == len(input_TI) > 0


@torch.no_grad()
def test_integers_of_an_expert_are_those_of_modelopt(make_samples: Any, make_spec: Any) -> None:
    """Its ``gptq`` of linears with an expert's weights, called with the expert's tokens alone."""
    import modelopt.torch.quantization as mtq

    model = family_model("Qwen3-MoE")
    entry = {"weight": INT4, "algorithm": {"method": "gptq", "perc_damp": 0.1}}
    formats = resolve_formats(("mine",), device="cpu", custom={"mine": entry})
    plan = build_plan(model, formats)
    samples = make_samples(LENGTHS, seed=3)
    calibration = fitted(Scorer(make_spec(plan), model=model), samples)
    config: dict[str, Any] = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": INT4},
        ],
        "algorithm": {"method": "gptq", "perc_damp": 0.1, "layerwise": {"enable": False}},
    }
    num_equal = num_changed = num_weights = 0
    batches = [padded([sample]) for sample in samples]
    inputs = {
        (planned.name, f"{parameter}.{expert}"): input_TI
        for planned in quantizable_modules(model)
        if planned.kind == "experts"
        for expert, by_parameter in enumerate(expert_inputs(model, planned.name, batches, 4))
        for parameter, input_TI in by_parameter.items()
    }
    for (path, part, _), fit in calibration.rounding.items():
        if not part or fit.codes is None:
            continue
        parameter, expert = part.split(".")
        weight = getattr(model.get_submodule(path), parameter)[int(expert)]
        grid = grid_of(make_weight_quantizer(INT4, weight), weight)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.copy_(weight)
        input_TI = inputs[path, part]
        mtq.quantize(torch.nn.Sequential(linear), config, lambda m, x=input_TI: m(x[None]))
        expected = (linear.weight / grid.unit_OI).round()
        ours = (values_of(fit.codes.whole, grid) / grid.unit_OI).round()
        num_equal += int((ours == expected).sum())
        num_changed += int((ours != plain_codes(weight, grid)).sum())
        num_weights += weight.numel()
    assert num_weights > 20_000
    assert num_changed > 0.05 * num_weights
    assert num_equal > 0.999 * num_weights


@pytest.mark.parametrize("family", ["Qwen3-MoE", "GPT-OSS"])
def test_scores_of_a_shard_are_those_of_roundings_without_its_half(
    family: str, make_samples: Any, make_spec: Any
) -> None:
    """With weights kept from one shard to the next: those of the other half are other weights."""
    plan = build_plan(family_model(family), resolve_formats((PLAIN, GPTQ), device="cpu"))
    spec = make_spec(plan, weight_cache_bytes=2**30)
    scorer = Scorer(spec, model=family_model(family))
    samples = make_samples(LENGTHS, seed=3)
    shards, calibration = shards_of(samples), fitted(scorer, samples)
    experts = [n for n, group in enumerate(plan.searched) if group.name.endswith("experts")]
    assert experts

    def scores(scorer: Scorer, number: int, shard: int | None) -> Any:
        sums = scorer.score(shards[number].samples, 0, calibration, shard).sums
        return sums.elementwise_GF[experts]

    honest = [scores(scorer, number, number) for number in (0, 1)]
    for number in (0, 1):
        anew = Scorer(spec, model=family_model(family))
        assert np.array_equal(scores(anew, number, number), honest[number])
        within = scores(scorer, number, None)
        assert np.array_equal(within[:, 0], honest[number][:, 0])
        assert (within[:, 1] < honest[number][:, 1]).all()
    assert (sum(honest)[:, 1] < 0.95 * sum(honest)[:, 0]).all()  # type: ignore[index]


def test_experts_that_share_a_quantizer_are_rounded_on_its_grid(
    make_samples: Any, make_spec: Any
) -> None:
    """GPT-OSS, FP8: one scale for all experts of a projection, moments of each for itself."""
    model = family_model("GPT-OSS")
    (format_,) = formats = resolve_formats((FP8,), device="cpu")
    plan = build_plan(model, formats)
    scorer = Scorer(make_spec(plan), model=model)
    samples = make_samples(LENGTHS, seed=3)
    calibration = fitted(scorer, samples)
    scales, num_rounded = WeightScales(model, calibration), 0
    for planned in (m for group in plan.searched for m in group.modules if m.is_transposed):
        module = model.get_submodule(planned.name)
        batches = [padded([sample]) for sample in samples]
        inputs = expert_inputs(model, planned.name, batches, 4)
        for parameter in planned.parameters:
            weight_EOI = getattr(module, parameter).mT.contiguous()
            quantizer = make_weight_quantizer(format_.weight, weight_EOI)
            ours = FusedExperts(module, planned).quantized_weight(parameter, format_, scales).mT
            assert (planned.name, parameter, format_.weight_key) not in calibration.rounding
            for expert in range(4):
                key = (planned.name, f"{parameter}.{expert}", format_.weight_key)
                fit, expected = calibration.rounding.get(key), quantizer(weight_EOI)[expert]
                if fit is not None and fit.codes is not None:
                    input_TI = inputs[expert][parameter]
                    moments = SecondMoments([input_TI.T @ input_TI])
                    grid = grid_of(quantizer, weight_EOI).of_slice(expert)
                    is_unused_I = (weight_EOI[expert] == 0).all(dim=0)
                    (codes,) = gptq_codes(
                        [(weight_EOI[expert], grid)],
                        moments,
                        [(None, fit.codes.damping)],
                        is_unused_I,
                    )
                    agree = (ours[expert] - values_of(codes[0].numpy(), grid)).abs() < 1e-6
                    assert agree.float().mean() > 0.999
                    assert (ours[expert] != expected).float().mean() > 0.02
                    num_rounded += 1
                else:
                    torch.testing.assert_close(ours[expert], expected, rtol=1e-6, atol=0)
    assert num_rounded >= 4


def test_experts_apart_get_the_rounding_of_experts_together(
    make_samples: Any, make_spec: Any
) -> None:
    samples, roundings = make_samples(LENGTHS, seed=3), []
    for expert_groups in ("layer", "expert"):
        model = family_model("Qwen3-MoE")
        plan = build_plan(
            model, resolve_formats((PLAIN, GPTQ), device="cpu"), expert_groups=expert_groups
        )
        calibration = fitted(Scorer(make_spec(plan), model=model), samples)
        roundings.append(
            {
                key: (fit.codes.damping, fit.codes.whole.tobytes())
                for key, fit in calibration.rounding.items()
                if fit.codes is not None
            }
        )
    assert roundings[0] == roundings[1]
    assert any(part for _, part, _ in roundings[0])


@pytest.mark.parametrize("expert_groups", ["layer", "expert"])
@torch.no_grad()
def test_measurements_run_experts_with_what_was_fitted_to_all_tokens(
    expert_groups: str, make_samples: Any, make_spec: Any
) -> None:
    model = family_model("Qwen3-MoE")
    formats = resolve_formats((GPTQ,), device="cpu")
    plan = build_plan(model, formats, disable=("*attn*", "lm_head"), expert_groups=expert_groups)
    samples = make_samples(LENGTHS, seed=3)
    calibration = fitted(Scorer(make_spec(plan), model=model), samples)
    by_hand, num_rounded = copy.deepcopy(model), 0
    for path in (f"model.layers.{layer}.mlp.experts" for layer in (0, 1)):
        for name in ("gate_up_proj", "down_proj"):
            for number, weight in enumerate(getattr(by_hand.get_submodule(path), name)):
                quantizer = make_weight_quantizer(formats[0].weight, weight)
                codes = calibration.codes((path, f"{name}.{number}", formats[0].weight_key))
                num_rounded += codes is not None
                weight.copy_(
                    quantizer(weight)
                    if codes is None
                    else values_of(codes, grid_of(quantizer, weight))
                )
    assert num_rounded >= 4
    layers = QuantizedLayers(model, [], scored_modules(plan), plan.formats, calibration)
    ids = torch.tensor(samples[0])[None]
    with layers.quantized(0, (0,) * len(plan.searched), WeightCache(2**30)):
        logits = model(ids).logits
    torch.testing.assert_close(logits, by_hand(ids).logits, rtol=1e-4, atol=1e-4)
    assert (logits - model(ids).logits).abs().max() > 0.01
