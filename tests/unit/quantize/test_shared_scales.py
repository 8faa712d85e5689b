"""Fused layers have one scale from the start: what engines make of a checkpoint changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pyarrow.parquet as pq
import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt.torch.quantization.utils import SHARED_PATTERNS
from modelopt_scores import NOTHING, quantized_by_modelopt
from pydantic import ValidationError

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.quantize.calibration import Calibration, Channels, ModuleCalibration
from autoquant_ray.quantize.quantizers import fake_quantize_weight, fit_weight, quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.serving.shared_scales import MODELOPT_SHARES, fused_layers, shares_scale
from autoquant_ray.solve import solve_run

ATTENTION = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
MLP = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
FP8 = {"num_bits": (4, 3), "axis": None}


def format_of(name: str, **entry: Any) -> Format:
    custom = {name: {"weight": FP8, **entry}} if entry else None
    return resolve_formats((name,), device="cpu", custom=custom)[0]


def in_fp8(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """As torch's own type rounds under one scale."""
    scale = largest / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def as_loaded(weights: list[torch.Tensor], scales: list[float]) -> list[torch.Tensor]:
    """What vLLM's loader makes of FP8 layers that it fuses: rounded again to the largest scale."""
    largest = max(scales)
    return [(weight / largest).to(torch.float8_e4m3fn).float() * largest for weight in weights]


@pytest.fixture
def model(make_model: Any) -> Any:
    """A Llama whose fused layers differ in size."""
    model = make_model("llama")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for weight, factor in ((attention.k_proj, 1.37), (attention.v_proj, 0.61), (mlp.up_proj, 1.7)):
        weight.weight.data.mul_(factor)
    return model


def quantized(model: Any, names: list[str], format_: Format, **more: Any) -> list[torch.Tensor]:
    scales = WeightScales(model, **more)
    weights = [model.get_submodule(name).weight for name in names]
    return [
        quantized_weight(format_, weight, scales, name)
        for name, weight in zip(names, weights, strict=True)
    ]


@pytest.mark.parametrize("names", [ATTENTION, MLP], ids=["qkv", "gate_up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_weights_are_rounded_under_the_largest_scale_and_loading_leaves_them(
    names: list[str], dtype: torch.dtype, model: Any
) -> None:
    model = model.to(dtype)
    weights = [model.get_submodule(name).weight.detach().float() for name in names]
    largest = torch.stack([weight.abs().max() for weight in weights]).max()
    ours = [weight.float() for weight in quantized(model, names, format_of("wfp8_afp8"))]
    expected = [in_fp8(weight, largest) for weight in weights]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0
        )
    if dtype == torch.float32:
        loaded = as_loaded(ours, [float(largest) / 448] * len(names))
        for mine, theirs in zip(ours, loaded, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        apart = quantized(model, names, format_of("mine", shares_scale=False))
        scales = [float(weight.abs().max()) / 448 for weight in weights]
        moved = [
            float((a != b).float().mean())
            for a, b in zip(apart, as_loaded(apart, scales), strict=True)
        ]
        assert sorted(moved)[1] > 0.3  # all but that with the largest scale


def test_fp8_layer_that_nothing_is_fused_with_keeps_its_scale(model: Any) -> None:
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj", "lm_head"):
        weight = model.get_submodule(name).weight
        (ours,) = quantized(model, [name], format_of("wfp8_afp8"))
        assert torch.equal(ours, fake_quantize_weight(FP8, weight))


def test_nvfp4_blocks_are_rounded_under_the_second_scale_of_all(model: Any) -> None:
    weights = [model.get_submodule(name).weight.detach() for name in ATTENTION]
    largest = torch.stack([weight.abs().max() for weight in weights]).max()
    second = largest / (6 * 448)
    for ours, weight in zip(
        quantized(model, ATTENTION, format_of("NVFP4_DEFAULT_CFG")), weights, strict=True
    ):
        scale, _ = NVFP4QTensor.get_weights_scaling_factor(weight, 16, second)
        stored, *_ = NVFP4QTensor.quantize(weight.clone(), 16, scale, second)
        packed = stored.dequantize(
            dtype=torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16}
        )
        torch.testing.assert_close(ours, packed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["mse", "weighted"])
def test_searched_scale_is_the_one_that_loses_least_in_all_layers_together(
    method: str, model: Any
) -> None:
    """Against every multiple, tried by hand."""
    algorithm = {"method": method, "start_multiplier": 0.5, "stop_multiplier": 1.2}
    algorithm |= {"step_size": 0.1}
    format_ = format_of("mine", algorithm=algorithm)
    weights = [model.get_submodule(name).weight.detach() for name in ATTENTION]
    generator = torch.Generator().manual_seed(3)
    squares = torch.rand(weights[0].shape[1], generator=generator) ** 4
    channels = Channels(
        largest_I=None, sum_I=None, square_sum_I=squares.double().numpy(), num_tokens=1
    )
    calibration = Calibration({name: ModuleCalibration(channels=channels) for name in ATTENTION})
    largest = torch.stack([weight.abs().max() for weight in weights]).max()
    by_column = squares if method == "weighted" else torch.ones_like(squares)
    losses = {}
    for number in range(8):
        maximum = largest * (0.5 + 0.1 * number)
        rounded = [in_fp8(w.clamp(-maximum, maximum), maximum) for w in weights]
        errors = ((w - q).square() * by_column for w, q in zip(weights, rounded, strict=True))
        losses[number] = float(sum(error.double().sum() for error in errors))
    best = min(losses, key=losses.__getitem__)
    maximum = largest * (0.5 + 0.1 * best)
    for ours, weight in zip(
        quantized(model, ATTENTION, format_, calibration=calibration), weights, strict=True
    ):
        expected = in_fp8(weight.clamp(-maximum, maximum), maximum)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-9)
    if method == "weighted":
        scales = WeightScales(model, calibration)
        fitted = [
            fit_weight(format_, w, scales, n) for n, w in zip(ATTENTION, weights, strict=True)
        ]
        assert [int(numbers.item()) for numbers in fitted] == [best] * 3


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_scales_apart_are_those_of_modelopt(name: str, model: Any) -> None:
    from autoquant_ray.quantize.backends.block_formats import for_cpu

    format_ = replace(format_of(name), shares_scale=False)
    entries = [*NOTHING, *quantizer_entries("*.layers.0.*", format_)]
    config = for_cpu({"quant_cfg": entries, "algorithm": "max"})
    theirs = quantized_by_modelopt(model, [torch.tensor([[1, 2, 3]])], config["quant_cfg"])
    for ours, layer_name in zip(quantized(model, ATTENTION, format_), ATTENTION, strict=True):
        layer = theirs.get_submodule(layer_name)
        assert torch.equal(ours, layer.weight_quantizer(layer.weight))


MENU = ("wfp8_afp8", "NVFP4_DEFAULT_CFG", "wfp4_afp16:max", "wfp8_afp8:mse", "wint8_aint8")


def test_manifest_gives_mtq_quantize_the_scales_that_were_scored(
    make_run: Any, model: Any, make_scorer: Any, make_samples: Any
) -> None:
    directory = make_run("llama", MENU, disable=())
    groups = [group.name for group in make_scorer("llama", MENU).plan.searched]
    pins = dict.fromkeys(groups, MENU[4])
    parts = ("0.self_attn.q", "0.mlp.gate", "1.self_attn.q", "1.mlp.gate")
    for part, name in zip(parts, (MENU[0], MENU[1], MENU[3], MENU[2]), strict=True):
        pins |= {group: name for group in groups if part in group}
    solution = solve_run(directory, SolveOptions(bits=16, pins=pins))
    manifest = json.loads(Path(solution.paths["manifest.json"]).read_text())
    config = load_quantization_config(manifest, device="cpu")
    second = model.model.layers[1]
    for layer, factor in ((second.self_attn.v_proj, 1.6), (second.mlp.up_proj, 0.7)):
        layer.weight.data.mul_(factor)
    ids = torch.tensor(make_samples([24] * 2))
    theirs = quantized_by_modelopt(model, [ids], config["quant_cfg"], config["algorithm"])
    formats = {name: format_of(name) for name in MENU}
    differs = set()
    for row in pq.read_table(solution.paths["manifest.parquet"]).to_pylist():
        layer, format_ = row["module"], formats[row["format"]]
        weight = model.get_submodule(layer).weight
        (ours,) = quantized(model, [layer], format_)
        assert torch.equal(ours, theirs.get_submodule(layer).weight_quantizer(weight)), layer
        (apart,) = quantized(model, [layer], replace(format_, shares_scale=False))
        differs |= {format_.name} if not torch.equal(ours, apart) else set()
    assert differs == set(MENU[:4])


def test_run_of_an_earlier_version_keeps_scales_apart(model: Any) -> None:
    format_ = format_of("wfp8_afp8")
    now = format_.to_json()
    assert Format.from_json(now) == format_
    earlier = Format.from_json({k: v for k, v in now.items() if k != "shares_scale"})
    assert earlier.weight_key != format_.weight_key
    for ours, name in zip(quantized(model, ATTENTION, earlier), ATTENTION, strict=True):
        assert torch.equal(ours, fake_quantize_weight(FP8, model.get_submodule(name).weight))
    int4 = format_of("wint4_afp16")
    assert "shares_scale" not in int4.to_json()
    assert Format.from_json(int4.to_json()) == int4


def test_layers_are_fused_as_engines_do_and_no_others() -> None:
    names = [
        *(f"model.layers.0.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"model.layers.1.self_attn.{part}" for part in ("q_a_proj", "kv_a_proj_with_mqa")),
        *(f"model.layers.2.linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
        *(f"model.layers.2.mlp.experts.{e}.{part}" for e in (0, 1) for part in ("w1", "w2", "w3")),
        "model.layers.3.self_attn.q_proj",
        "gate_proj",
        "up_proj",
        "lm_head",
    ]
    fused = fused_layers(names)
    sets = sorted({members for members in fused.values() if len(members) > 1})
    assert all(name in fused[name] for name in names)
    assert [tuple(name.rpartition(".")[2] for name in members) for members in sets] == [
        ("gate_proj", "up_proj"),
        ("q_proj", "k_proj", "v_proj"),
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("in_proj_b", "in_proj_a"),
        ("in_proj_qkv", "in_proj_z"),
        ("w1", "w3"),
        ("w1", "w3"),
    ]
    assert sets[-1][0].startswith("model.layers.2.mlp.experts.1.")


def test_what_modelopt_shares_is_what_it_says() -> None:
    import re

    for shards in MODELOPT_SHARES:
        (pattern,) = (p for p in SHARED_PATTERNS if re.fullmatch(p, f"a.{shards[0]}"))
        assert all(re.fullmatch(pattern, f"a.{shard}") for shard in shards)
    assert len(SHARED_PATTERNS) == len(MODELOPT_SHARES)


def test_every_engine_needs_one_scale_for_fp8_and_nvfp4_and_none_for_channels() -> None:
    for engine in (None, "vllm", "sglang", "trtllm"):
        for name in ("wfp8_afp8", "NVFP4_DEFAULT_CFG", "wfp4_afp16"):
            assert shares_scale(format_of(name), engine), (engine, name)
    assert not shares_scale(format_of("FP8_PER_CHANNEL_PER_TOKEN_CFG"), "vllm")
    assert hasattr(mtq, "FP8_PER_CHANNEL_PER_TOKEN_CFG")


def test_custom_format_asks_for_scales_apart_by_true_or_false() -> None:
    def space(**entry: Any) -> SearchSpace:
        weight = {"num_bits": [4, 3], "axis": None}
        custom = {"mine": {"weight": weight, **entry}}
        return SearchSpace(model="m", formats=("mine",), custom_formats=custom)

    for shares in (True, False):
        given = space(shares_scale=shares).custom_formats
        (format_,) = resolve_formats(("mine",), device="cpu", custom=given)
        assert format_.has_shared_scale == shares
    with pytest.raises(ValidationError, match="shares_scale: must be true or false"):
        space(shares_scale={})
    with pytest.raises(ValidationError, match="input: must be a mapping or null"):
        space(input=True)
    with pytest.raises(ValidationError, match="unknown key"):
        space(shared_scale=False)
