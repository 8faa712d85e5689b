"""Heads that transformers does not load, quantized in a format of their own."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import CUSTOM, load_folder, unpacked_by_the_library
from click.testing import CliRunner
from engine_readers import read_by_engine
from moe_models import write_moe
from safetensors.torch import load_file, save_file

from autoquant_ray.cli.main import main
from autoquant_ray.errors import AutoQuantError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.quantize.quantizers import fake_quantize_weight

VLLM = os.environ.get("AUTOQUANT_RAY_VLLM")
SCRIPT = Path(__file__).parents[2] / "support" / "vllm_layers.py"
JOINS = (
    "mtp.fc",
    "model.layers.2.eh_proj",
    "model.layers.2.shared_head.head",
    "model.layers.2.embed_tokens",
)
"""Matrices that engines keep in 16 bits."""
FORMATS = (
    "int4_g32",
    "wint8_afp16",
    "int8_per_token",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "wfp8_afp16",
    "wfp4_afp16",
    "MXFP8_DEFAULT_CFG",
)
CHOICE = {"*": "none", "*o_proj": "int8_per_token", "*q_proj": "wint8_aint8"}


def with_heads(folder: Path, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a model of two layers with two heads; returns the heads' tensors.

    The heads are its last layer with other numbers, as those of Qwen3-Next and of GLM-4.5 are made.
    """
    out.mkdir()
    for file in folder.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    in_source = load_file(folder / "model.safetensors")
    width = in_source["model.norm.weight"].numel()
    generator, last = torch.Generator().manual_seed(5), "model.layers.1."
    names = [name.removeprefix(last) for name in in_source if name.startswith(last)]
    shapes = {name: in_source[f"{last}{name}"].shape for name in names}
    heads = {
        f"{start}{name}": torch.randn(shape, generator=generator) * (1 + 3 * ("k_proj" in name))
        for start in ("mtp.layers.0.", "model.layers.2.")
        for name, shape in shapes.items()
    }
    shapes = dict.fromkeys(JOINS[:2], (width, 2 * width))
    shapes |= dict.fromkeys(JOINS[2:], tuple(in_source["lm_head.weight"].shape))
    norms = ("enorm", "hnorm", "shared_head.norm")
    shapes |= {f"model.layers.2.{name}": (width,) for name in norms}
    heads |= {f"{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    save_file(in_source | heads, out / "model.safetensors", metadata={"format": "pt"})
    return heads


def export_with(directory: Any, out: Path, *words: str) -> Any:
    """What ``export`` does of a run."""
    return CliRunner().invoke(main, ["export", directory.uri, "--out", str(out), *words])


@pytest.fixture
def run_of(solved_run: Any, model_folder: Any, tmp_path: Path) -> Any:
    """A run of a small Llama with two heads, and their tensors."""
    heads = with_heads(model_folder("llama"), tmp_path / "model")
    formats = ("int4_g32", "wint8_aint8", "int8_per_token")
    directory, *_ = solved_run("llama", CHOICE, formats, folder=tmp_path / "model")
    return directory, heads


@pytest.mark.parametrize("name", FORMATS)
def test_heads_are_what_their_format_makes_of_them(name: str, run_of: Any, tmp_path: Path) -> None:
    directory, heads = run_of
    written = export_run(directory, str(tmp_path / "out"), extra_heads=name)
    tensors, made = load_folder(tmp_path / "out"), unpacked_by_the_library(tmp_path / "out")
    by_maxima = f"{name}:max" if name == "wfp4_afp16" else name
    (format_,) = resolve_formats((by_maxima,), device="cpu", custom=CUSTOM)
    linears = [n.removesuffix(".weight") for n in heads if re.search("_proj.weight", n)]
    linears = [module for module in linears if module not in JOINS]
    assert len(linears) == 14
    assert sum(written.head_layers.values()) == len(linears)
    for module in linears:
        weight, largest = heads[f"{module}.weight"], None
        parts = re.search(r"(?<=self_attn\.)[qkv](?=_proj)|(?<=mlp\.)(gate|up)(?=_proj)", module)
        if parts and format_.has_shared_scale:
            names = ("q", "k", "v") if parts[0] in "qkv" else ("gate", "up")
            fused = [f"{module[: parts.start()]}{part}_proj.weight" for part in names]
            largest = torch.stack([heads[name].abs().max() for name in fused]).max()
        expected = fake_quantize_weight(format_.weight, weight, largest=largest)
        is_rounded = name in ("int4_g32", "wfp4_afp16")  # scales of blocks; what is unpacked
        tolerance = 2**-8 if is_rounded else 1e-6
        torch.testing.assert_close(made[module].float(), expected, rtol=tolerance, atol=1e-6)
    for kept in [name for name in heads if name.removesuffix(".weight") not in linears]:
        assert torch.equal(tensors[kept], heads[kept].bfloat16())
    assert written.num_carried == len(heads) - len(linears)
    assert written.bytes_on_disk == sum(tensor.nbytes for tensor in tensors.values())
    assert written.bytes_on_disk == pytest.approx(written.weight_bytes, rel=2e-3)


def test_config_names_what_is_quantized_and_ignores_the_rest(run_of: Any, tmp_path: Path) -> None:
    directory, heads = run_of
    result = export_with(directory, tmp_path / "out", "--extra-heads", "int4_g32")
    assert result.exit_code == 0, result.output
    assert "extra heads: 14 pack-quantized" in result.stdout
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = {name for group in content["config_groups"].values() for name in group["targets"]}
    ignored = [name for name in content["ignore"] if not name.startswith("re:")]
    patterns = [name.removeprefix("re:") for name in content["ignore"] if name.startswith("re:")]
    for module in {name.rpartition(".")[0] for name in heads if heads[name].dim() == 2}:
        is_kept = module in JOINS
        assert (module in ignored) == is_kept
        assert (module in targets) != is_kept
        assert any(re.match(pattern, module) for pattern in patterns) == is_kept
    assert any(re.match(pattern, "model.layers.2.head") for pattern in patterns)
    _, problems = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not problems["missing_keys"]
    assert not [name for name in problems["unexpected_keys"] if name.startswith("model.layers.1")]


def test_experts_of_a_head_are_quantized(solved_run: Any, tmp_path: Path) -> None:
    folder = write_moe(tmp_path / "plain", "deepseek_v3", num_layers=2)
    heads = with_heads(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    gates = [name for name in heads if re.match(r"mtp.*\.experts\..*gate_proj", name)]
    save_file({n: t for n, t in load_file(file).items() if n not in gates}, file)
    directory, *_ = solved_run(
        "qwen3_moe", {"*": "none", "*o_proj": "int4_g32"}, ("int4_g32",), folder=tmp_path / "model"
    )
    words = ("--extra-heads", "wfp8_afp16", "--engine", "vllm", "--gpu", "hopper")
    result = export_with(directory, tmp_path / "out", *words)
    assert result.exit_code == 2
    assert "vllm serves no routed experts in it: not for routed experts" in result.stderr
    words = ("--extra-heads", "int4_g32", "--engine", "vllm", "--gpu", "hopper")
    result = export_with(directory, tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    made = unpacked_by_the_library(tmp_path / "out")
    experts = {name.removesuffix(".weight") for name in heads if ".experts." in name}
    without_gates = {name for name in experts if name.startswith("mtp")}
    assert without_gates
    assert experts & set(made) == experts - without_gates
    assert "mtp.layers.0.self_attn.o_proj" in made
    assert "mtp.layers.0.mlp.gate.weight" in load_folder(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("wfp8_afp8",), "nothing is known of what a head reads"),
        (("int4_g32:mse",), "nothing is known of what a head reads"),
        (("wint4_afp16",), "weights are no whole number of blocks of 128"),
        (("nonsense",), "nonsense"),
        (("int4_g32", "--format", "modelopt"), "with --format compressed-tensors alone"),
        (
            ("int4_g32", "--engine", "vllm"),
            "no source says that vllm reads a quantized head of llama",
        ),
        (("int4_g32", "--engine", "sglang"), "sglang"),
    ],
)
def test_formats_and_engines_that_take_no_such_heads_are_refused(
    words: tuple[str, ...], text: str, run_of: Any, tmp_path: Path
) -> None:
    result = export_with(run_of[0], tmp_path / "out", "--extra-heads", *words)
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert len(result.stderr.splitlines()[-1]) <= 400
    assert not (tmp_path / "out").exists()


def test_models_without_such_heads_are_refused(solved_run: Any, tmp_path: Path) -> None:
    directory, *_ = solved_run("llama", CHOICE, ("wint8_aint8", "int8_per_token"))
    with pytest.raises(AutoQuantError, match=r"no head with linears of a decoder layer.*leave it"):
        export_run(directory, str(tmp_path / "out"), extra_heads="wint8_afp16")


@pytest.mark.skipif(VLLM is None, reason="AUTOQUANT_RAY_VLLM names no Python")
def test_vllm_reads_the_linears_of_heads_as_they_are_written(run_of: Any, tmp_path: Path) -> None:
    export_run(run_of[0], str(tmp_path / "out"), extra_heads="int4_g32")
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    starts = ("mtp.layers.0", "model.layers.2")
    quantized = {f"{start}.{part}": "linear" for start in starts for part in parts}
    kept = {"mtp.fc": "linear", "model.layers.2.eh_proj": "linear", "model.layers.2.head": "head"}
    command = [str(VLLM), "-W", "ignore", str(SCRIPT), str(tmp_path / "out"), "LlamaForCausalLM"]
    read = read_by_engine(command, quantized | kept, VLLM_LOGGING_LEVEL="ERROR")
    scheme = {"scheme": "CompressedTensorsWNA16"}
    assert read == {name: scheme if name in quantized else None for name in quantized | kept}


@pytest.mark.skipif(VLLM is None, reason="AUTOQUANT_RAY_VLLM names no Python")
def test_vllm_loads_a_quantized_head_into_its_class(solved_run: Any, tmp_path: Path) -> None:
    """vLLM's own class of DeepSeek-V3's head is made, and its own loader fills it."""
    folder = write_moe(tmp_path / "plain", "deepseek_v3", num_layers=2)
    with_heads(folder, tmp_path / "model", num_nextn_predict_layers=1)
    choice = {"*": "none", "*0.self_attn.o_proj": "int4_g32"}
    directory, *_ = solved_run("qwen3_moe", choice, ("int4_g32",), folder=tmp_path / "model")
    out, experts = tmp_path / "out", tmp_path / "experts.safetensors"
    export_run(directory, str(out), extra_heads="int4_g32", engine="vllm")
    script = SCRIPT.with_name("vllm_model.py")
    read = read_by_engine([str(VLLM), "-W", "ignore", str(script), str(out), str(experts), "mtp"])
    start = "model.layers.2.mtp_block."
    kinds = {n.removeprefix(start): k for n, k in read["kinds"].items() if n.startswith(start)}
    attention = {name: kind for name, kind in kinds.items() if name.endswith("_proj")}
    assert len(attention) >= 4
    assert set(attention.values()) == {"CompressedTensorsWNA16"}
    assert kinds["mlp.experts.routed_experts"] == "CompressedTensorsWNA16MoEMethod"
    assert {name for name in read["missing"] if ".attn" not in name} == set()
    loaded, stored = load_file(experts), load_folder(out)
    for part, linears in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
        weights = loaded[f"{start}mlp.experts.routed_experts.{part}_weight_packed"]
        for expert, theirs in enumerate(weights):
            names = [f"model.layers.2.mlp.experts.{expert}.{linear}" for linear in linears]
            ours = torch.cat([stored[f"{name}.weight_packed"].flatten() for name in names])
            assert torch.equal(theirs.flatten(), ours)
