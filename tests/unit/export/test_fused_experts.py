"""Fused experts in the layout of compressed-tensors: linears of each expert, as in the files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder, unpacked_by_the_library
from moe_models import LINEARS, write_moe
from safetensors.torch import save_file

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.calibrate.files import read_calibration
from autoquant_ray.errors import ConfigError, FormatError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.source import read_source
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.quantize.quantizers import quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.serving.menus import served_sets
from autoquant_ray.solve import solve_run

FORMATS = (
    "int4_g32",
    "int4_g32_gptq",
    "int8_per_token",
    "wint8_afp16",
    "wfp8_afp8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "NVFP4_DEFAULT_CFG",
    "wfp4_afp16:weighted",
    "MXFP8_DEFAULT_CFG",
)


def scored_experts(
    directory: Any, folder: Path, module: str, names: tuple[str, tuple[str, ...], str]
) -> Mapping[str, torch.Tensor]:
    """Linear of the files -> weight as the scan quantizes it, with its part of a fused one."""
    source = read_source(directory)
    format_ = source.formats[module]
    model = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    scales = WeightScales(model, read_calibration(directory, [format_]))
    experts = model.get_submodule(module)
    holder, gate_up, down = names
    scored = {}
    for expert in range(len(experts.down_proj)):
        for parameter, linears in (("gate_up_proj", gate_up), ("down_proj", (down,))):
            weight = getattr(experts, parameter)[expert].detach()
            made = quantized_weight(format_, weight, scales, module, parameter, str(expert))
            for linear, rows in zip(linears, made.float().chunk(len(linears)), strict=True):
                scored[f"model.layers.0.{holder}.experts.{expert}.{linear}"] = rows
    return scored


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *itertools.product(("qwen3_moe", "mixtral"), FORMATS),
        *itertools.product(("qwen3_5_moe", "deepseek_v3"), ("int4_g32", "NVFP4_DEFAULT_CFG")),
    ],
)
def test_the_library_unpacks_the_experts_that_were_scored(
    family: str, name: str, solved_run: Any, tmp_path: Path
) -> None:
    folder = write_moe(tmp_path / family, family)
    choice = {"*": "none", "*0.mlp.experts": name, "*0.self_attn.o_proj": name}
    directory, *_ = solved_run("qwen3_moe", choice, (name,), folder=folder)
    out = tmp_path / "out"
    written = export_run(directory, str(out), layout="compressed-tensors")
    tensors, source = load_folder(out), load_folder(folder)
    unpacked = unpacked_by_the_library(out)
    scored = scored_experts(directory, folder, "model.layers.0.mlp.experts", LINEARS[family])
    assert unpacked.keys() == {*scored, "model.layers.0.self_attn.o_proj"}
    assert {f"{linear}.weight" for linear in scored} <= source.keys()  # named as in the files
    # Scales of integers' blocks have 16 bits; those of NVFP4 are multiplied in bfloat16.
    tolerance = 2**-8 if "int4" in name else 2**-7 if "fp4" in name.lower() else 1e-6
    for linear, weight in scored.items():  # blocks of floats are unpacked in bfloat16
        expected = weight.to(unpacked[linear].dtype)
        torch.testing.assert_close(unpacked[linear], expected, rtol=tolerance, atol=1e-7)
    others = {n: t for n, t in source.items() if n.rpartition(".")[0] not in unpacked}
    assert all(torch.equal(tensors[n], tensor) for n, tensor in others.items())
    assert written.bytes_on_disk == pytest.approx(written.weight_bytes, rel=0.01)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    expert_linears = {n.removesuffix(".weight") for n in source if ".experts." in n}
    assert expert_linears - unpacked.keys() <= set(config["ignore"])
    inputs = {float(tensors[f"{n}.input_scale"]) for n in scored if f"{n}.input_scale" in tensors}
    assert len(inputs) == (2 if name == "wfp8_afp8" else 0)  # one for gate and up, one for down


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_what_the_files_hold_in_float32_stays_so_under_its_name_there(
    layout: str, dtype: str, solved_run: Any, tmp_path: Path
) -> None:
    """Mixtral's router is ``block_sparse_moe.gate`` in its files and ``mlp.gate`` in memory; on
    GPUs runs compute in bfloat16. With the head it is more than a file may differ in size."""
    folder = write_moe(tmp_path / "model", "mixtral")
    source = load_folder(folder)
    in_float32 = [name for name in source if name.endswith("block_sparse_moe.gate.weight")]
    in_float32.append("lm_head.weight")
    for name in in_float32:
        source[name] = source[name].float() * (1 + 2**-20)
    save_file(source, folder / "model.safetensors", metadata={"format": "pt"})
    choice = {"*": "none", "*self_attn*": "wint8_aint8"}
    directory, *_ = solved_run("qwen3_moe", choice, ("wint8_aint8",), folder=folder)
    record = directory.read_json("run.json")
    directory.write_json("run.json", record | {"config": record["config"] | {"dtype": dtype}})
    written = export_run(directory, str(tmp_path / "out"), layout=layout)
    tensors = load_folder(tmp_path / "out")
    assert len(in_float32) == 3
    assert all(torch.equal(tensors[name], source[name]) for name in in_float32)
    wider = sum(2 * source[name].numel() for name in in_float32)
    assert written.wider_bytes == wider > 0.01 * written.weight_bytes
    assert written.bytes_on_disk - wider == pytest.approx(written.weight_bytes, rel=0.01)
    assert any(f"{wider:,} bytes more" in line for line in written.lines())


def test_transformers_unpacks_experts_beside_linears_of_other_formats(
    solved_run: Any, tmp_path: Path
) -> None:
    """It takes those of the first group for the numbers of all experts."""
    folder = write_moe(tmp_path / "model", "qwen3_moe")
    choice = {"*": "none", "*.self_attn.*": "wint8_aint8", "*.mlp.experts": "int4_g32"}
    formats = ("int4_g32", "wint8_aint8")
    directory, *_ = solved_run("qwen3_moe", choice, formats, folder=folder)
    export_run(directory, str(tmp_path / "out"), layout="compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )
    name = "model.layers.0.mlp.experts"
    scored = scored_experts(directory, folder, name, LINEARS["qwen3_moe"])
    experts = model.get_submodule(name)
    for number in range(len(experts.down_proj)):
        gate, up, down = (scored[f"{name}.{number}.{part}_proj"] for part in ("gate", "up", "down"))
        for read, weight in (
            (experts.gate_up_proj[number], torch.cat([gate, up])),
            (experts.down_proj[number], down),
        ):
            # Unpacked in bfloat16, whatever type is asked for.
            torch.testing.assert_close(read.detach().float(), weight, rtol=2**-7, atol=1e-7)


def test_all_experts_in_16_bits_are_those_of_the_files(solved_run: Any, tmp_path: Path) -> None:
    for family in (*LINEARS, "gpt_oss"):
        folder = write_moe(tmp_path / family, family)
        choice = {"*": "none", "*o_proj": "int4_g32"}
        directory, *_ = solved_run(
            "qwen3_moe", choice, ("int4_g32",), folder=folder, name=f"{family}-run"
        )
        export_run(directory, str(tmp_path / f"out-{family}"), layout="compressed-tensors")
        tensors, source = load_folder(tmp_path / f"out-{family}"), load_folder(folder)
        experts = {name: tensor for name, tensor in source.items() if "experts" in name}
        assert experts
        assert all(torch.equal(tensors[name], tensor) for name, tensor in experts.items())


def test_transposed_experts_are_refused(solved_run: Any, tmp_path: Path) -> None:
    choice = {"*": "none", "*0.mlp.experts": "wint8_afp16"}
    folder = write_moe(tmp_path / "gpt_oss", "gpt_oss")
    directory, *_ = solved_run("qwen3_moe", choice, ("wint8_afp16",), folder=folder)
    with pytest.raises(FormatError, match=r"files keep fused \(model\.layers\.0\.mlp\.experts\)"):
        export_run(directory, str(tmp_path / "out"), layout="compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_experts_whose_inputs_were_never_seen_are_refused(solved_run: Any, tmp_path: Path) -> None:
    choice = {"*": "none", "*0.mlp.experts": "wfp8_afp8"}
    folder = write_moe(tmp_path / "mixtral", "mixtral")
    directory, *_ = solved_run("qwen3_moe", choice, ("wfp8_afp8",), folder=folder)
    rows = directory.read_table("calibration.parquet").to_pylist()
    seen = [row for row in rows if row["statistic"] != "down_proj_input_amax"]
    directory.write_table("calibration.parquet", seen)
    with pytest.raises(FormatError, match=r"0\.mlp\.experts saw no input in the scan's calib"):
        export_run(directory, str(tmp_path / "out"), layout="compressed-tensors")


@pytest.mark.parametrize("groups", ["layer", "expert"])
def test_integers_of_experts_are_solved_for_vllm_and_exported_in_its_layout(
    groups: str, solved_run: Any, tmp_path: Path
) -> None:
    folder = write_moe(tmp_path / "mixtral", "mixtral")
    menu = ("int4_g32", "wint8_afp16", "wfp8_afp16", "wint8_aint8")
    more = {"folder": folder, "expert_groups": groups}
    directory, *_ = solved_run("qwen3_moe", {"*": "none"}, menu, **more)
    solved = solve_run(directory, SolveOptions(bits=7, engine="vllm", gpu="hopper"))
    name = solved.name
    written = export_run(directory, str(tmp_path / "out"), solution=name)
    assert (written.layout, written.engine) == ("compressed-tensors", "vllm")
    formats = read_source(directory, name).formats
    experts = {formats[module].name for module in formats if module.endswith("experts")}
    assert experts <= {"int4_g32", "wint8_afp16"}
    assert len(experts) > 0
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    for layer in range(2):
        start = f"model.layers.{layer}.block_sparse_moe.experts."
        holders = [
            sum(target.startswith(start) for target in group["targets"])
            for group in config["config_groups"].values()
        ]
        assert sorted(holders)[-1] in (0, 12)
        assert sum(holders) == max(holders)


def test_experts_without_a_gate_stay_in_16_bits_where_vllm_would_not_find_them() -> None:
    groups = {"experts": ["model.layers.0.mlp.experts"], "o": ["model.layers.0.self_attn.o_proj"]}
    menu = resolve_formats(("wint8_afp16", "wfp8_afp8"), device="cpu")
    for rows, is_found in ((128, True), (64, False)):
        shapes = {"model.layers.0.mlp.experts": [[4, rows, 128], [4, 128, 64]]}
        arguments = (groups, list(groups), menu, "vllm", "hopper", shapes)
        served = {entry.layout: entry.permitted["experts"] for entry in served_sets(*arguments)}
        assert served["compressed-tensors"] == {NONE, *([f.name for f in menu] if is_found else [])}
        assert served["modelopt"] == {NONE, "wfp8_afp8"}


def test_only_engines_that_are_known_to_read_experts_of_this_layout_serve_them(
    solved_run: Any, tmp_path: Path
) -> None:
    folder = write_moe(tmp_path / "mixtral", "mixtral")
    choice = {"*": "none", "*0.mlp.experts": "wint8_afp16"}
    directory, *_ = solved_run("qwen3_moe", choice, ("wint8_afp16",), folder=folder)
    with pytest.raises(ConfigError, match=r"no source says that sglang serves quantized experts"):
        export_run(directory, str(tmp_path / "out"), layout="compressed-tensors", engine="sglang")
