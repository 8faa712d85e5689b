"""NVFP4 weights with calibrated scales on CPU, value by value and against ModelOpt's own search.

ModelOpt has a Triton kernel for them and nothing for CPU. Here its whole calibration runs on a
kernel written with ``ml_dtypes`` from the kernel's description alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt_scores import (
    NOTHING,
    of_text,
    quantized_by_modelopt,
    scores_of_config,
    summed_by_step,
)

from autoquant_ray import load_quantization_config
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.formats.format import Format, attributes_to_json
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.quantize.backends.block_formats import quantize_static_blocks
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.quantize.quantizers import quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.solve import solve_run

PRESETS = ("NVFP4_FOUR_OVER_SIX_CFG", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG")
STATIC = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
MAX = {"static_max": {"weight": STATIC, "input": None}}


def cast(values: np.ndarray, dtype: Any) -> np.ndarray:
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(values, -largest, largest).astype(dtype).astype(np.float32)


def expected(values: np.ndarray, maxima: np.ndarray, largest: float, top: float) -> np.ndarray:
    """Blocks by e4m3 scales under one float32 scale; ``top`` is the scale at the largest value."""
    unit = np.float32(largest) * np.float32(448 / top) / np.float32(6)
    # torch forms 448 / unit by the reciprocal, and so does ModelOpt's compute_fp4_scales.
    up = np.float32(1) / unit * np.float32(448)
    scales = cast(maxima.astype(np.float32) / np.float32(6) * up, ml_dtypes.float8_e4m3fn)
    scales = scales.reshape(-1, 1) * (np.float32(1) / up)
    safe = np.where(scales == 0, np.float32(1), scales)
    on_grid = cast(values / safe, ml_dtypes.float4_e2m1fn) * safe
    return np.where(scales == 0, np.float32(0), on_grid)


def kernel(
    x: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor,
    quantize_block_scales: bool,
    fp8_max_for_normalization: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """What ModelOpt calls; x is already in blocks."""
    assert quantize_block_scales
    values = expected(
        x.float().numpy(), amax.float().numpy(), float(global_amax), fp8_max_for_normalization
    )
    return torch.from_numpy(values).to(out_dtype)


@pytest.fixture
def modelopt_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt finds the kernel above instead of Triton's."""
    module = SimpleNamespace(IS_AVAILABLE=True, static_blockwise_fp4_fake_quant=kernel)
    monkeypatch.setattr(tensor_quant, "triton_kernel", module)


def format_of(name: str) -> Format:
    return resolve_formats((name,), device="cpu", custom=MAX if name in MAX else None)[0]


@pytest.mark.parametrize("top", [448.0, 256.0])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-12])
def test_small_blocks_equal_what_modelopt_packs(size: float, top: float) -> None:
    """The kernel makes zeros of blocks whose e4m3 scale is 0, and of any that are below 2^-24."""
    generator = torch.Generator().manual_seed(1)
    sizes_N1 = torch.exp2(torch.empty(2000, 1).uniform_(-26, 0, generator=generator)) * size
    values_NB = torch.randn(2000, 16, generator=generator) * sizes_N1
    values_NB[::11] = 0
    maxima_N1, largest = values_NB.abs().amax(dim=1, keepdim=True), values_NB.abs().max()
    quantizer = SimpleNamespace(
        global_amax=largest, _amax=maxima_N1, block_sizes={-1: 16, "four_over_six": top == 256.0}
    )
    scale_N1, second = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, values_NB)
    stored, *_ = NVFP4QTensor.quantize(values_NB.clone(), 16, scale_N1, second)
    packed_NB = stored.dequantize(
        dtype=torch.float32, scale=scale_N1, double_scale=second, block_sizes={-1: 16}
    )
    ours_NB = quantize_static_blocks(values_NB, maxima_N1, largest, top)
    # A value at a tie may fall to either side: the scales differ in their last bits.
    is_close_NB = torch.isclose(ours_NB, packed_NB, rtol=1e-6, atol=0)
    assert is_close_NB.float().mean() > 0.9999
    by_kernel = expected(values_NB.numpy(), maxima_N1.numpy()[:, 0], float(largest), top)
    is_lost = (by_kernel == 0).all(axis=1) & (packed_NB != 0).any(dim=1).numpy()
    assert is_lost.any()
    if size == 1.0:
        same = ~is_lost & (packed_NB != 0).any(dim=1).numpy()
        np.testing.assert_array_equal(ours_NB.numpy()[same], by_kernel[same])


@pytest.mark.parametrize("top", [448.0, 256.0])
def test_blocks_of_all_magnitudes_equal_ml_dtypes(top: float) -> None:
    generator = np.random.default_rng(0)
    sizes = np.exp2(generator.uniform(-12, 3, size=(4000, 1)))
    values = (generator.standard_normal((4000, 16)) * sizes).astype(np.float32)
    values[::11], values[:, 3], values[1, 1] = 0.0, 0.0, -0.0
    maxima = np.abs(values).max(axis=1) * generator.choice([0.5, 1.0, 1.5], 4000)
    maxima = maxima.astype(np.float32)
    largest = float(np.abs(values).max())
    ours = quantize_static_blocks(
        torch.from_numpy(values), torch.from_numpy(maxima)[:, None], torch.tensor(largest), top
    ).numpy()
    np.testing.assert_array_equal(ours, expected(values, maxima, largest, top))
    assert np.count_nonzero(ours) > 0.5 * ours.size
    assert (ours[maxima < largest * 2**-20] == 0).all()


def test_ties_between_numbers_are_rounded_to_even() -> None:
    row = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5, 0, 1, 2, 3, 7])
    ours = quantize_static_blocks(row[None], torch.tensor([[6.0]]), torch.tensor(6.0), 448.0)[0]
    assert ours.tolist() == [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -4, 0, 1, 2, 3, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*PRESETS, *MAX])
def test_weights_equal_modelopt_bit_for_bit_with_scales_that_fused_layers_share(
    name: str, dtype: torch.dtype, make_model: Any, modelopt_on_cpu: None
) -> None:
    format_ = format_of(name)
    model = make_model("llama").to(dtype)
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(3)
    theirs = quantized_by_modelopt(
        model,
        [torch.tensor([[1, 2, 3]])],
        [*NOTHING, *quantizer_entries("*.layers.0.*", format_)],
        format_.algorithm or "max",
    )
    scales = WeightScales(model)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"):
        layer = theirs.get_submodule(f"model.layers.0.{part}")
        weight = model.get_submodule(f"model.layers.0.{part}").weight
        for _ in range(2):
            ours = quantized_weight(format_, weight, scales, f"model.layers.0.{part}")
            assert torch.equal(ours, layer.weight_quantizer(layer.weight)), part
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    alone = quantized_weight(format_, weight, WeightScales(torch.nn.Identity()), "somewhere")
    shared = quantized_weight(format_, weight, scales, "model.layers.0.self_attn.q_proj")
    assert not torch.equal(alone, shared)  # k_proj has the largest weight
    if name in PRESETS:
        assert scales.searched.nbytes > 0


@pytest.mark.parametrize(("family", "name"), [("llama", PRESETS[0]), ("qwen3_moe", PRESETS[1])])
def test_scores_equal_modelopt_search(
    family: str,
    name: str,
    make_scorer: Any,
    make_model: Any,
    make_samples: Any,
    modelopt_on_cpu: None,
) -> None:
    from autoquant_ray.quantize.backends.block_formats import for_cpu

    prepared = make_scorer(family, (name,))
    shards = [make_samples([24, 24], seed=1), make_samples([17, 17], seed=2)]
    calibration = merge_calibrations(prepared.scorer.calibrate(shard) for shard in shards)
    ours_G = summed_by_step(prepared.scorer, shards, calibration)[:, 0]
    batches = [of_text(torch.tensor(shard)) for shard in shards]
    theirs = scores_of_config(make_model(family), batches, for_cpu(getattr(mtq, name)))
    assert set(theirs) == set(prepared.names)
    for group, score in zip(prepared.names, ours_G, strict=True):
        tolerance = 1e-3 if group.endswith("experts") else 1e-4
        assert score == pytest.approx(theirs[group], rel=tolerance), group


def test_manifest_quantizes_on_cpu_without_a_kernel(
    make_run: Any, make_model: Any, make_samples: Any, make_scorer: Any
) -> None:
    """``load_quantization_config`` alone lets ModelOpt's own calibration run on CPU."""
    menu = (*PRESETS, "wint8_aint8")
    directory = make_run("llama", menu, disable=())
    groups = [group.name for group in make_scorer("llama", menu).plan.searched]
    pins = {name: menu[number % 3] for number, name in enumerate(groups)}
    solution = solve_run(directory, SolveOptions(bits=16, pins=pins))
    manifest = json.loads(Path(solution.paths["manifest.json"]).read_text())
    config = load_quantization_config(manifest, device="cpu")
    model, ids = make_model("llama"), torch.tensor(make_samples([24] * 2))
    quantized = quantized_by_modelopt(model, [ids], config["quant_cfg"], config["algorithm"])
    scales, formats = WeightScales(model), {name: format_of(name) for name in menu}
    compared = set()
    for name, chosen in pins.items():
        layer = quantized.get_submodule(name)
        ours = quantized_weight(formats[chosen], layer.weight, scales, name)
        assert torch.equal(ours, layer.weight_quantizer(layer.weight)), name
        compared.add(chosen)
    assert compared == set(menu)
    assert torch.isfinite(quantized(ids).logits).all()
    on_cuda = load_quantization_config(manifest, device="cuda")["algorithm"]
    assert [set_["algorithm"]["method"] for set_ in on_cuda["sets"]] == ["mse", "mse"]


def test_plan_of_static_weights_alone_is_calibrated_by_the_mode_on_cpu_only() -> None:
    entry = {"quantizer_name": "*weight_quantizer", "cfg": attributes_to_json(STATIC)}
    manifest = {"quantization_config": {"quant_cfg": [entry], "algorithm": "max"}}
    assert load_quantization_config(manifest, device="cuda")["algorithm"] == "max"
    assert load_quantization_config(manifest, device="cpu")["algorithm"] == {
        "method": "autoquant_ray_sets",
        "sets": [],
        "others": "max",
    }
