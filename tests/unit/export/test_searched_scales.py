"""Exported checkpoints of formats whose weight scales or rounding were fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import CUSTOM, fake_weight, load_folder, unpack_modelopt

from autoquant_ray.calibrate.files import read_calibration
from autoquant_ray.errors import FormatError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.source import read_source
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.quantize.quantizers import quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales

SEARCHED = {
    "*0.self_attn.*": "int4_g32_mse",
    "*1.self_attn.*": "int4_g32_weighted",
    "*layers.0.mlp.*": "int8_mse",
    "*layers.0.mlp.down_proj": "int4_g32_gptq",
    "*layers.1.mlp.*": "fp8_mse",
    "lm_head": "int4_g32",
}
ALGORITHMS = {
    "int4_g32_mse": "W4A16_AWQ",
    "int4_g32_weighted": "W4A16_AWQ",
    "int4_g32_gptq": "W4A16_AWQ",
    "int4_g32": "W4A16_AWQ",
    "int8_mse": "W8A8_SQ_PER_CHANNEL",
    "fp8_mse": "FP8",
}
MENU = tuple(dict.fromkeys(SEARCHED.values()))


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_folder_holds_the_weights_that_were_measured(
    layout: str, solved_run: Any, tmp_path: Path
) -> None:
    directory, folder, _ = solved_run("llama", SEARCHED, MENU)
    out = tmp_path / "out"
    export_run(directory, str(out), layout=layout)
    tensors = load_folder(out)
    read = None
    if layout == "compressed-tensors":
        read = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        read(torch.tensor([[1, 2]]))  # unpacks
    seen = set()
    menu = resolve_formats(MENU, device="cpu", custom=CUSTOM)
    model = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    scales = WeightScales(model, read_calibration(directory, menu))
    plain = {f.name: f for f in menu if f.name == "int4_g32"}
    for name, format_ in read_source(directory).formats.items():
        source = load_folder(folder)[f"{name}.weight"]
        expected = quantized_weight(format_, source, scales, name)
        if read is None:
            weight = unpack_modelopt(tensors, name, ALGORITHMS[format_.name])
        else:
            weight = read.get_submodule(name).weight.detach().float()
        tolerance = 2**-8 if "int4" in format_.name else 1e-6  # 16-bit scales of blocks
        torch.testing.assert_close(weight, expected, rtol=tolerance, atol=1e-7)
        if format_.name in ("int4_g32_mse", "int4_g32_weighted", "int4_g32_gptq"):
            unsearched = fake_weight(folder, name, plain["int4_g32"])
            assert (weight - unsearched).abs().max() > 1e-3
        seen.add(format_.name)
    assert seen == set(MENU)


def test_methods_of_one_format_are_one_format_in_a_checkpoint(
    solved_run: Any, tmp_path: Path
) -> None:
    """SGLang reads this layout with one format only."""
    menu = ("wint8_aint8", "wint8_aint8:mse", "wint8_aint8:max")
    choice = {"*": menu[0], "*0.mlp.*": menu[1], "*1.mlp.*": menu[2]}
    directory, _, _ = solved_run("llama", choice, menu)
    out = tmp_path / "out"
    export_run(directory, str(out), layout="compressed-tensors", engine="sglang")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 1


STATIC = ("NVFP4_FOUR_OVER_SIX_CFG", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG")


def test_static_nvfp4_folder_holds_the_weights_that_were_measured(
    solved_run: Any, make_model: Any, tmp_path: Path
) -> None:
    choice = {"*attn*": STATIC[0], "*0.mlp.*": STATIC[1], "*1.mlp.*": "none", "lm_head": STATIC[0]}
    directory, folder, maxima = solved_run("llama", choice, STATIC)
    export_run(directory, str(tmp_path / "out"))
    tensors, weights = load_folder(tmp_path / "out"), load_folder(folder)
    scales = WeightScales(make_model("llama"))
    for name, format_ in read_source(directory).formats.items():
        expected = quantized_weight(format_, weights[f"{name}.weight"], scales, name)
        weight = unpack_modelopt(tensors, name, "NVFP4")
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        scale = tensors[f"{name}.input_scale"].item()
        assert scale == pytest.approx(maxima[name] / (6 * 448), rel=1e-6)


@pytest.mark.parametrize(
    "name",
    ["fp8_mse", STATIC[1], "wfp8_afp8:weighted", "wfp8_afp8:gptq", "wfp4_afp16:gptq"],
)
def test_every_expert_is_packed_with_its_searched_scales(
    name: str, solved_run: Any, tmp_path: Path
) -> None:
    directory, folder, _ = solved_run("qwen3_moe", {"*": "none", "*experts": name}, (name,))
    export_run(directory, str(tmp_path / "out"))
    tensors, source = load_folder(tmp_path / "out"), load_folder(folder)
    format_ = next(iter(read_source(directory).formats.values()))
    algo = "FP8" if "fp8_" in name else "NVFP4"
    calibration = read_calibration(directory, [format_])
    scales = WeightScales(torch.nn.Identity(), calibration)
    is_fitted = any(fit.codes is not None for fit in calibration.rounding.values())
    assert is_fitted == name.endswith(":gptq")
    tolerance = 2**-8 if "int4" in name else 1e-6
    for layer in [
        layer_name.removesuffix(".weight") for layer_name in source if ".experts." in layer_name
    ]:
        # gate and up of one expert are one matrix in the model, quantized under one scale
        pair = [
            layer.replace(a, b) for a, b in (("up_proj", "gate_proj"), ("gate_proj", "up_proj"))
        ]
        names = sorted({layer, *pair}) if "down_proj" not in layer else [layer]
        together = torch.cat([source[f"{layer_name}.weight"] for layer_name in names])
        experts, number = layer.rpartition(".")[0].rsplit(".", 1)
        part = "down_proj" if "down_proj" in layer else "gate_up_proj"
        expected = quantized_weight(format_, together, scales, experts, part, number)
        rows = len(source[f"{layer}.weight"])
        start = names.index(layer) * rows
        weight = unpack_modelopt(tensors, layer, algo)
        torch.testing.assert_close(
            weight, expected[start : start + rows], rtol=tolerance, atol=1e-7
        )


def test_blocks_of_integers_in_fused_experts_are_refused(solved_run: Any, tmp_path: Path) -> None:
    directory, _, _ = solved_run("qwen3_moe", {"*": "none", "*experts": "int4_g32"}, ("int4_g32",))
    with pytest.raises(FormatError, match=r"int4_g32: ModelOpt packs no 4-bit.*mlp\.experts"):
        export_run(directory, str(tmp_path / "out"))
