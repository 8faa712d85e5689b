"""Exported checkpoints of solutions with ``awq``: nothing is left of the factors."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import transformers
from checkpoints import load_folder, logits_of_solution, unpack_modelopt
from click.testing import CliRunner
from small_models import make_tokenizer, small_model

from autoquant_ray.calibrate.files import calibration_of
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.cli.main import main
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.source import read_source
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.quantize.quantizers import fake_quantize_weight, quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.runs.directory import RunDirectory

AWQ, WEIGHTED, INT8 = "wint4_g32_afp16:awq", "wint4_g32_afp16:weighted", "wint8_afp16"
GPTQ, AWQ_GPTQ = "wint4_g32_afp16:gptq", "wint4_g32_afp16:awq+gptq"
MENU = (AWQ, WEIGHTED, GPTQ, AWQ_GPTQ, INT8)
ALGORITHMS = dict.fromkeys(MENU, "W4A16_AWQ") | {INT8: "W8A16"}
CHOICE = {
    "*": "none",
    "*0.self_attn.*": AWQ,
    "*1.self_attn.q_proj": INT8,
    "*1.self_attn.o_proj": AWQ,
    "*0.mlp.gate_proj": WEIGHTED,
    "*0.mlp.down_proj": AWQ,
    "*1.mlp.gate_proj": "none",
    "*1.mlp.down_proj": AWQ,
    "lm_head": AWQ,
}
IDS = torch.arange(1, 41)[None]
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


@pytest.fixture
def loud_run(solved_run: Any, tmp_path: Path) -> Any:
    """A run of a small model whose channels differ in size, with formats of every kind."""

    def build(family: str, changes: Any = None) -> tuple[RunDirectory, Path]:
        model: Any = small_model(family)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randn(len(parameter), generator=generator).exp())
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(len(parameter), generator=generator))
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        choice = CHOICE | (changes or {})
        directory, _, _ = solved_run(family, choice, MENU, folder=folder)
        return directory, folder

    return build


def folded(directory: RunDirectory, folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model, and the factors of inputs and the divisors of rows by linear."""
    source, calibration = read_source(directory), calibration_of(read_source(directory).state)
    model: Any = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    scales = WeightScales(model, calibration)
    factors, divisors = {}, {}
    for name, format_ in source.formats.items():
        factors_I = scales.factors((name,), format_)
        if factors_I is not None:
            factors[name] = factors_I
            fold = calibration.folds[name]
            divisors[fold.producer] = torch.ones(len(model.get_submodule(fold.producer).weight))
            divisors[fold.producer][torch.tensor(fold.rows(len(factors_I)))] = factors_I
    return model, factors, divisors


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_folder_holds_folded_weights_and_no_factor(
    family: str, layout: str, loud_run: Any, tmp_path: Path
) -> None:
    changes = {"*0.mlp.gate_proj": WEIGHTED}  # with up_proj, divided by what down_proj takes
    if family == "qwen3":
        changes = {"*0.mlp.gate_proj": GPTQ, "*1.mlp.down_proj": AWQ_GPTQ}
        changes |= {"*0.self_attn.*": AWQ_GPTQ, "lm_head": AWQ_GPTQ}
    directory, folder = loud_run(family, changes)
    model, factors, divisors = folded(directory, folder)
    assert len(factors) == 8
    assert all(factors_I.unique().numel() > 10 for factors_I in factors.values())
    out = tmp_path / "out"
    export_run(directory, str(out), layout=layout)
    tensors = load_folder(out)
    assert not any("pre_quant" in name for name in tensors)
    source = read_source(directory)
    read: Any = None
    if layout == "compressed-tensors":
        read = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        read(IDS)  # unpacks
    scales = WeightScales(model, calibration_of(source.state))
    rounded = copy.deepcopy(model)
    if family == "qwen3":
        rounded.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for name, format_ in source.formats.items():
        weight = model.get_submodule(name).weight
        expected = quantized_weight(format_, weight, scales, name) * factors.get(name, 1)
        expected = expected / divisors.get(name, torch.ones(1))[:, None]
        if read is None:
            stored = unpack_modelopt(tensors, name, ALGORITHMS[format_.name])
        else:
            stored = read.get_submodule(name).weight.detach().float()
        tolerance = 1e-5 if format_.name == INT8 else 2**-8  # 16-bit scales of blocks
        torch.testing.assert_close(stored, expected, rtol=tolerance, atol=1e-6)
        rounded.get_submodule(name).weight.data = stored
    for name in ("model.layers.0.input_layernorm", "model.norm"):
        expected = model.get_submodule(name).weight / divisors[name]
        torch.testing.assert_close(
            tensors[f"{name}.weight"].float(), expected, rtol=2**-8, atol=1e-7
        )
    up, value = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"
    assert up not in source.formats
    assert {up, value} <= divisors.keys()
    expected = model.get_submodule(up).weight / divisors[up][:, None]
    torch.testing.assert_close(tensors[f"{up}.weight"].float(), expected, rtol=2**-8, atol=1e-7)
    for name, tensor in tensors.items():
        if name.endswith(("norm.weight", "mlp.up_proj.weight", "mlp.gate_proj.weight")):
            owner = name.removesuffix(".weight")
            if owner not in source.formats:
                rounded.get_submodule(owner).weight.data = tensor.float()
    with torch.no_grad():
        logits = rounded(IDS).logits
    expected = logits_of_solution(directory, "", IDS)
    plain = model(IDS).logits
    error = (logits - expected).std() / (plain - expected).std()
    assert error < 0.15  # scales, norms and what is not rounded have 16 bits in the folder


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_mtq_quantize_makes_the_model_that_was_measured(family: str, loud_run: Any) -> None:
    """From the manifest and the scan's samples: equal logits, and no factor left in the model."""
    directory, folder = loud_run(family)
    model: Any = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    config = load_quantization_config(read_source(directory).manifest, device="cpu")
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 256, (2, 48), generator=generator)  # those of the run

    def run(copied: Any) -> None:
        copied(ids, use_cache=False)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        quantized = mtq.quantize(copy.deepcopy(model), config, run)
        logits, plain = quantized(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    expected = logits_of_solution(directory, "", IDS)
    assert (plain - expected).std() > 0.01 * plain.std()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(plain.std()))
    assert not any("pre_quant" in name for name in quantized.state_dict())


def test_mtq_quantize_without_inputs_is_refused(loud_run: Any) -> None:
    directory, folder = loud_run("llama")
    model: Any = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    config = load_quantization_config(read_source(directory).manifest, device="cpu")
    with pytest.raises(ValueError, match="the algorithm awq needs inputs"):
        mtq.quantize(model, config)


def test_base_of_a_recipe_rounded_by_maximum_is_what_was_measured(
    loud_run: Any, tmp_path: Path
) -> None:
    """Without ``weighted``, whose scales a tool chooses itself."""
    directory, folder = loud_run("qwen3", {"*0.mlp.gate_proj": "none", "lm_head": AWQ})
    out, base = tmp_path / "recipe.json", tmp_path / "base"
    words = ["export", directory.uri, "--format", "recipe", "--tool", "mlx-lm", "--out", str(out)]
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, "give --base FOLDER" in refused.output) == (2, True)
    assert not out.exists()
    result = CliRunner().invoke(main, [*words, "--base", str(base), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["paths"] == [str(out), str(base)]
    assert json.loads(out.read_text())["model.layers.0.mlp.down_proj"]["bits"] == 4
    assert load_folder(base)["model.norm.weight"].dtype == torch.bfloat16
    ours: Any = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    read = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        plain = ours(IDS).logits
        assert (read(IDS).logits - plain).std() < 0.05 * plain.std()
        for name, format_ in read_source(directory).formats.items():
            weight = read.get_submodule(name).weight
            weight.copy_(fake_quantize_weight(format_.weight, weight))
        rounded = read(IDS).logits
    expected = logits_of_solution(directory, "", IDS)
    # Weights that have 16 bits before they are rounded to 4 are now and then rounded otherwise.
    assert (rounded - expected).std() < 0.5 * (plain - expected).std()
