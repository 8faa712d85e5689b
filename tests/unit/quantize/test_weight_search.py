"""Weight scales of least squared error, against ModelOpt's ``mse`` and against trying by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from modelopt_scores import (
    NOTHING,
    of_text,
    quantized_by_modelopt,
    scores_of_config,
    summed_by_step,
)
from weight_formats import FP8, INT4, INT8, searched

from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.errors import FormatError
from autoquant_ray.formats.format import Format
from autoquant_ray.modelopt_api import prepare_experts
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.quantize.experts import FusedExperts
from autoquant_ray.quantize.quantizers import fake_quantize_weight, quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales

NARROW = {"method": "mse", "start_multiplier": 0.5, "stop_multiplier": 1.2, "step_size": 0.07}


def of_modelopt(module: Any, prefix: str = "") -> torch.Tensor:
    quantizer = getattr(module, f"{prefix}weight_quantizer")
    quantized: torch.Tensor = quantizer(module.weight)
    return quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["mse", NARROW], ids=["defaults", "narrow"])
@pytest.mark.parametrize("weight", [INT4, INT8, FP8], ids=["int4", "int8", "fp8"])
def test_weights_equal_modelopt_bit_for_bit(
    weight: Any, algorithm: Any, dtype: torch.dtype, make_model: Any
) -> None:
    format_ = searched(weight, algorithm)
    model = make_model("llama").to(dtype)
    entries = [*NOTHING, *quantizer_entries("*.layers.0.*", format_)]
    theirs = quantized_by_modelopt(model, [], entries, algorithm)
    differs_from_max = 0
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        name = f"model.layers.0.{part}"
        weight = model.get_submodule(name).weight
        ours = fake_quantize_weight(format_.weight, weight, format_.algorithm)
        assert torch.equal(ours, of_modelopt(theirs.get_submodule(name)))
        differs_from_max += not torch.equal(ours, fake_quantize_weight(format_.weight, weight))
    assert differs_from_max


@pytest.mark.parametrize("family", ["Qwen3-MoE", "GPT-OSS"])
def test_experts_equal_modelopt_bit_for_bit(family: str) -> None:
    """Slices of fused experts are searched one by one, GPT-OSS's transposed ones as one."""
    format_ = searched(INT4)
    model = family_model(family)
    planned = next(
        module
        for group in build_plan(model, [format_]).groups
        for module in group.modules
        if module.kind == "experts"
    )
    entries = [*NOTHING]
    for prefix in planned.quantizer_prefixes:
        entries += quantizer_entries(f"{planned.name}.{prefix}", format_)
    theirs = quantized_by_modelopt(model, [], entries, "mse").get_submodule(planned.name)
    prepare_experts(model)
    experts = FusedExperts(model.get_submodule(planned.name), planned)
    scales = WeightScales(model)
    for name in planned.parameters:
        ours = experts.quantized_weight(name, format_, scales)
        if planned.is_transposed:
            quantizer = getattr(theirs, f"{name}_weight_quantizer")
            expected = quantizer(getattr(theirs, name).mT.contiguous()).mT
        else:
            quantizers = getattr(theirs, f"{name}_weight_quantizers")
            pairs = zip(quantizers, getattr(theirs, name), strict=True)
            expected = torch.stack([quantizer(slice_) for quantizer, slice_ in pairs])
        assert torch.equal(ours, expected)
        assert torch.equal(ours, experts.quantized_weight(name, format_, scales))


def test_scales_are_those_of_the_smallest_error_by_hand() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32))
    weight[0, 0], weight[1] = 30.0, 0.0
    format_ = searched({"num_bits": 3, "axis": 0}, NARROW)
    ours = fake_quantize_weight(format_.weight, weight, format_.algorithm)
    for row, quantized in zip(weight.double(), ours.double(), strict=True):
        errors = []
        for multiplier in torch.linspace(0.5, 1.2, 11).double():
            step = row.abs().max() * multiplier / 3
            on_grid = (row / step).round().clamp(-4, 3) * step if step else row * 0
            errors.append(float((on_grid - row).square().sum()))
        assert float((quantized - row).square().sum()) == pytest.approx(
            min(errors), rel=1e-5, abs=1e-9
        )
    assert len({float(row.abs().max()) for row in ours}) == len(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [INT4, INT8, FP8], ids=["int4", "int8", "fp8"])
def test_what_was_found_is_kept_in_one_byte_per_scale_and_changes_no_bit(
    weight: Any, dtype: torch.dtype
) -> None:
    format_ = searched(weight)
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[2, :16] = 0.0
    scales = WeightScales(torch.nn.Identity())
    first = quantized_weight(format_, values, scales, "a")
    assert scales.searched.nbytes == {4: 32, 8: 8, (4, 3): 1}[format_.weight["num_bits"]]
    assert torch.equal(first, quantized_weight(format_, values, scales, "a"))
    scales.searched.resize(0)
    assert torch.equal(first, quantized_weight(format_, values, scales, "a"))
    other = quantized_weight(format_, values.flip(1) * 2, scales, "b")
    assert torch.equal(
        other, fake_quantize_weight(format_.weight, values.flip(1) * 2, format_.algorithm)
    )


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scores_equal_modelopt_search(
    family: str, make_scorer: Any, make_model: Any, make_samples: Any
) -> None:
    weight = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
    custom = {"mine": {"weight": weight, "input": FP8, "algorithm": {"method": "mse"}}}
    prepared = make_scorer(family, ("mine", "wint4_afp16:max"), custom=custom)
    shards = [make_samples([24, 24], seed=1), make_samples([17, 17], seed=2)]
    calibration = merge_calibrations(prepared.scorer.calibrate(shard) for shard in shards)
    ours_G = summed_by_step(prepared.scorer, shards, calibration)[:, 0]
    config = {
        "quant_cfg": [
            *NOTHING,
            {"quantizer_name": "*weight_quantizer", "cfg": weight},
            {"quantizer_name": "*input_quantizer", "cfg": FP8},
        ],
        "algorithm": "mse",
    }
    batches = [of_text(torch.tensor(shard)) for shard in shards]
    theirs = scores_of_config(make_model(family), batches, config)
    assert set(theirs) == set(prepared.names)
    for name, score in zip(prepared.names, ours_G, strict=True):
        tolerance = 1e-3 if name.endswith("experts") else 1e-4
        assert score == pytest.approx(theirs[name], rel=tolerance), name


@pytest.mark.parametrize(
    ("weight", "algorithm", "words"),
    [
        (INT4, "msee", "'msee'; known are max, mse, weighted, gptq, smoothquant, awq_lite"),
        (INT4, {"method": "mse", "step": 1}, "no argument 'step'; it takes step_size, start_"),
        (INT4, {"method": "mse", "step_size": -1}, "algorithm.step_size: .*greater than 0.*-1"),
        (INT4, {"method": "mse", "step_size": True}, "algorithm.step_size: must be a number"),
        (INT4, {"method": "mse", "step_size": "a"}, "algorithm.step_size: .*'a'"),
        (INT4, {"method": "mse", "step_size": None}, "algorithm.step_size: must be a number"),
        (INT4, {"method": "mse", "step_size": 0.001}, "3751 candidates; there must be 1 to 256"),
        (INT4, {"method": "mse", "start_multiplier": 5}, "from 5 to 4 .* 0 candidates"),
        (INT4, {"method": "mse", "stop_multiplier": float("inf")}, "must be finite"),
        (INT4, {"method": "mse", "fp8_scale_sweep": True}, "static NVFP4 weights only"),
        (INT4, {"method": "max", "step_size": 1}, "max has no argument 'step_size'"),
        (INT8 | {"type": "dynamic"}, "mse", "needs stored scales"),
    ],
)
def test_algorithms_that_cannot_be_are_refused_with_the_remedy(
    weight: Any, algorithm: Any, words: str
) -> None:
    with pytest.raises(FormatError, match=f"'?mine'?.*{words}"):
        searched(weight, algorithm)


def test_algorithm_max_is_the_same_as_none() -> None:
    plain = searched(INT4, None)
    assert searched(INT4, "max") == plain == searched(INT4, {"method": "max"})
    assert "algorithm" not in plain.to_json()
    assert Format.from_json(searched(INT4, NARROW).to_json()) == searched(INT4, NARROW)
    assert searched(INT4, NARROW).weight_key != plain.weight_key
