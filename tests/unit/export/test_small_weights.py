"""Checkpoints of weights that are tiny, zero or uneven hold what was scored, and no NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import CUSTOM, load_folder, unpack_modelopt
from modelopt_scores import quantized_by_modelopt
from small_models import make_tokenizer

from autoquant_ray import load_quantization_config
from autoquant_ray.calibrate.files import read_calibration
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.quantize.quantizers import quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales

ALGORITHMS = {
    "NVFP4_DEFAULT_CFG": "NVFP4",
    "wfp4_afp16": "W4A16_NVFP4",
    "wfp4_afp16:gptq": "W4A16_NVFP4",
    "wfp4_afp16:max": "W4A16_NVFP4",
    "NVFP4_FOUR_OVER_SIX_CFG": "NVFP4",
    "MXFP8_DEFAULT_CFG": "MXFP8",
    "wfp8_afp8": "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "FP8_PER_CHANNEL_PER_TOKEN",
    "wint8_aint8": "W8A8_SQ_PER_CHANNEL",
    "int4_g32": "W4A16_AWQ",
}
IN_BOTH_LAYOUTS = ("wfp8_afp8", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "wint8_aint8", "int4_g32")
LAYOUTS = [(name, "modelopt") for name in ALGORITHMS]
LAYOUTS += [(name, "compressed-tensors") for name in IN_BOTH_LAYOUTS]
SMALL, UNEVEN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
ZERO, AFTER_ZERO = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"
ZERO_ALONE, OUTLIER = "model.layers.1.mlp.down_proj", "lm_head"
CHANGED = (SMALL, UNEVEN, ZERO, AFTER_ZERO, ZERO_ALONE, OUTLIER)


@pytest.fixture
def odd_folder(make_model: Any, tmp_path: Path) -> Path:
    """A model with odd weights where no fused neighbour shares their scale."""
    model = make_model("llama")
    weights = {name: model.get_submodule(name).weight.data for name in CHANGED}
    weights[SMALL].mul_(1e-4)  # standard deviation 2e-5
    weights[UNEVEN][3].mul_(1e-3)
    weights[UNEVEN][4].mul_(1e-6)
    weights[UNEVEN][5] = 0
    weights[ZERO].zero_()
    weights[ZERO_ALONE].zero_()
    weights[OUTLIER][1, 1] = 200.0
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_exported_weights_are_those_that_were_scored(
    name: str, layout: str, odd_folder: Path, solved_run: Any, make_model: Any, tmp_path: Path
) -> None:
    directory, _, _ = solved_run("llama", {"*": name}, (name,), folder=odd_folder)
    export_run(directory, str(tmp_path / "out"), layout=layout)
    tensors, weights = load_folder(tmp_path / "out"), load_folder(odd_folder)
    assert not [key for key, tensor in tensors.items() if tensor.float().isnan().any()]
    inputs = {key: float(t) for key, t in tensors.items() if key.endswith("input_scale")}
    assert all(0 < scale < float("inf") for scale in inputs.values())
    read = None
    if layout == "compressed-tensors":
        read = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        )
        read(torch.tensor([[1, 2]]))  # unpacks
    model = make_model("llama")
    model.load_state_dict(weights)
    custom = {key: entry for key, entry in CUSTOM.items() if key == name}
    (format_,) = resolve_formats((name,), device="cpu", custom=custom)
    scales = WeightScales(model, read_calibration(directory, [format_]))
    for module in CHANGED:
        scored = quantized_weight(format_, weights[f"{module}.weight"], scales, module)
        if read is None:
            exported = unpack_modelopt(tensors, module, ALGORITHMS[name])
        else:
            exported = read.get_submodule(module).weight.detach().float()
        tolerance = 2**-8 if "int4" in name else 1e-6  # 16-bit scales of blocks
        torch.testing.assert_close(exported, scored, rtol=tolerance, atol=1e-12, msg=module)
        weight = weights[f"{module}.weight"]
        errors_O = (scored - weight).norm(dim=1) / weight.norm(dim=1).clamp(min=1e-30)
        assert errors_O.median() < 0.2, module


@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "wfp4_afp16", "NVFP4_FOUR_OVER_SIX_CFG"])
def test_quantized_by_modelopt_on_cpu_they_are_those_that_were_scored(
    name: str, odd_folder: Path, solved_run: Any, make_model: Any
) -> None:
    directory, _, _ = solved_run("llama", {"*": name}, (name,), folder=odd_folder)
    model, weights = make_model("llama"), load_folder(odd_folder)
    model.load_state_dict(weights)
    config = load_quantization_config(directory.uri, device="cpu")
    ids = torch.arange(96).reshape(2, 48)
    quantized = quantized_by_modelopt(model, [ids], config["quant_cfg"], config["algorithm"])
    (format_,) = resolve_formats((name,), device="cpu")
    scales = WeightScales(model, read_calibration(directory, [format_]))
    for module in CHANGED:
        layer = quantized.get_submodule(module)
        scored = quantized_weight(format_, weights[f"{module}.weight"], scales, module)
        assert torch.equal(layer.weight_quantizer(layer.weight), scored), module
