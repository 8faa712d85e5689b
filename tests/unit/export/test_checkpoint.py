"""Exported checkpoints: read back from their files, compared with what the scan measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    CUSTOM,
    FORMATS,
    fake_weight,
    largest_of_fused,
    load_folder,
    logits_of_solution,
    unpack_modelopt,
)
from families import family_model
from safetensors.torch import save_file
from small_models import make_tokenizer

from autoquant_ray import Run
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.calibrate.files import read_calibration
from autoquant_ray.errors import (
    CheckpointError,
    ConfigError,
    StoreError,
)
from autoquant_ray.export.check import check_checkpoint
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.source import read_source
from autoquant_ray.formats import menu as formats
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.quantize.quantizers import fake_quantize_weight, quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.solve import solve_run

MIXED = {
    "*self_attn.q_proj": "wint8_aint8",
    "*self_attn.o_proj": "int4_g32",
    "model.layers.0.mlp.*": "wfp8_afp8",
    "model.layers.1.mlp.gate_proj": "none",
    "model.layers.1.mlp.down_proj": "wint8_afp16",
    "lm_head": "wfp8_afp8",
}
MIXED_WEIGHTS = {
    "*self_attn.*": "int4_g32",
    "*mlp.down_proj": "wint8_afp16",
    "model.layers.0.mlp.gate_proj": "none",
    "model.layers.1.mlp.gate_proj": "wfp8_afp16",
    "lm_head": "none",
}
MIXED_INPUTS = {
    "*self_attn.*": "wint8_aint8",
    "*mlp.*": "wfp8_afp8",
    "lm_head": "wfp8_afp8",
}
ALGORITHMS = {
    "wint8_aint8": "W8A8_SQ_PER_CHANNEL",
    "int4_g32": "W4A16_AWQ",
    "wfp8_afp8": "FP8",
    "wint8_afp16": "W8A16",
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_modelopt_folder_holds_the_weights_that_were_measured(
    family: str, solved_run: Any, tmp_path: Path
) -> None:
    directory, folder, maxima = solved_run(family, MIXED)
    out = tmp_path / "out"
    written = export_run(directory, str(out))
    tensors = load_folder(out)
    config = json.loads((out / "config.json").read_text())
    quantized = config["quantization_config"]
    assert quantized["quant_algo"] == "MIXED_PRECISION"
    assert quantized["quant_method"] == "modelopt"
    layers = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert layers["quantized_layers"] == quantized["quantized_layers"]
    menu = {f.name: f for f in resolve_formats(FORMATS, device="cpu", custom=CUSTOM)}
    rows = directory.read_table("manifest.parquet").to_pylist()
    # ModelOpt 0.47 lists nothing in a mixed checkpoint, 0.48 all that stays in 16 bits.
    in_16_bits = ["model.embed_tokens", *(r["module"] for r in rows if r["format"] not in menu)]
    assert quantized["ignore"] in ([], sorted(in_16_bits))
    source = load_folder(folder)
    for row in rows:
        name, format_ = row["module"], menu.get(row["format"])
        if format_ is None:
            assert name not in quantized["quantized_layers"]
            expected = source[f"{name}.weight"].bfloat16()
            assert torch.equal(tensors[f"{name}.weight"], expected)
            continue
        algo = ALGORITHMS[format_.name]
        assert quantized["quantized_layers"][name]["quant_algo"] == algo
        unpacked = unpack_modelopt(tensors, name, algo)
        tolerance = 2**-8 if algo == "W4A16_AWQ" else 1e-6  # its scales are stored in 16 bits
        head = "model.embed_tokens" if family == "qwen3" and name == "lm_head" else name
        torch.testing.assert_close(
            unpacked, fake_weight(folder, head, format_), rtol=tolerance, atol=1e-7
        )
        if format_.input is not None:
            largest = 448 if algo == "FP8" else 127
            scale = tensors[f"{name}.input_scale"]
            assert scale.item() == pytest.approx(maxima[name] / largest, rel=1e-6)
    assert torch.equal(
        tensors["model.embed_tokens.weight"], source["model.embed_tokens.weight"].bfloat16()
    )
    on_disk = sum(tensor.nbytes for tensor in tensors.values())
    assert written.bytes_on_disk == on_disk
    assert on_disk == pytest.approx(written.weight_bytes, rel=0.01)
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is False
    assert (out / "generation_config.json").exists()
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_every_expert_is_packed_by_itself(solved_run: Any, tmp_path: Path) -> None:
    choice = {"*": "none", "*experts": "wfp8_afp8"}
    directory, folder, _ = solved_run("qwen3_moe", choice, ("wfp8_afp8",))
    export_run(directory, str(tmp_path / "out"))
    tensors, source = load_folder(tmp_path / "out"), load_folder(folder)
    (format_,) = resolve_formats(("wfp8_afp8",), device="cpu")
    names = [name.removesuffix(".weight") for name in source if ".experts." in name]
    assert len(names) == 2 * 8 * 3
    for name in names:
        unpacked = unpack_modelopt(tensors, name, "FP8")
        # gate and up of one expert are one matrix in the model, quantized under one scale
        pair = [name.replace(a, b) for a, b in (("up_proj", "gate_proj"), ("gate_proj", "up_proj"))]
        together = torch.cat([source[f"{layer}.weight"] for layer in dict.fromkeys([name, *pair])])
        expected = fake_quantize_weight(format_.weight, together)[: len(unpacked)]
        torch.testing.assert_close(unpacked, expected, rtol=1e-6, atol=1e-7)
        assert tensors[f"{name}.weight_scale"].dtype == torch.float32
        assert tensors[f"{name}.input_scale"] > 0


def test_experts_chosen_apart_are_packed_where_those_of_a_layer_agree(
    solved_run: Any, tmp_path: Path
) -> None:
    choice = {"*": "none", "*0.mlp.experts*": "wfp4_afp16"}
    written = []
    for groups in ("layer", "expert"):
        more = {"expert_groups": groups, "name": groups}
        directory, *_ = solved_run("qwen3_moe", choice, ("wfp4_afp16",), **more)
        checkpoint = export_run(directory, str(tmp_path / f"out-{groups}"))
        written.append(load_folder(tmp_path / f"out-{groups}"))
        assert checkpoint.bytes_on_disk == pytest.approx(checkpoint.weight_bytes, rel=0.01)
    together, apart = written
    assert together.keys() == apart.keys()
    assert all(torch.equal(tensor, apart[name]) for name, tensor in together.items())
    mixed = choice | {"*0.mlp.experts.3": "none"}
    more = {"expert_groups": "expert", "name": "mixed"}
    directory, *_ = solved_run("qwen3_moe", mixed, ("wfp4_afp16",), **more)
    with pytest.raises(ConfigError, match=r"several in model.layers.0.mlp.experts; .*`engine`"):
        export_run(directory, str(tmp_path / "out-mixed"))
    assert not (tmp_path / "out-mixed").exists()


def test_formats_with_scales_of_their_own_are_packed_on_the_cpu(
    solved_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their fake quantization needs a GPU where there is no other backend; packing does not."""
    monkeypatch.setattr(formats, "check_device", lambda *_: None, raising=False)
    algorithms = {
        "NVFP4_DEFAULT_CFG": "NVFP4",
        "wfp4_afp16:max": "W4A16_NVFP4",
        "MXFP8_DEFAULT_CFG": "MXFP8",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG": "FP8_PER_CHANNEL_PER_TOKEN",
    }
    # Largest error as a share of the block's largest number: half a step at the top of e2m1 (1 of
    # 6) and e4m3 (16 of 448); MX scales are powers of two, and 512 becomes 448.
    errors = {
        "NVFP4": (16, 1 / 6),
        "W4A16_NVFP4": (16, 1 / 6),
        "MXFP8": (32, 1 / 8),
        "FP8_PER_CHANNEL_PER_TOKEN": (0, 16 / 448),
    }
    choice = dict(zip(["*attn*", "*0.mlp.*", "*1.mlp.*", "lm_head"], algorithms, strict=True))
    directory, folder, maxima = solved_run("llama", choice, tuple(algorithms))
    export_run(directory, str(tmp_path / "out"))
    tensors, weights = load_folder(tmp_path / "out"), load_folder(folder)
    for name, format_ in read_source(directory).formats.items():
        weight = weights[f"{name}.weight"]
        unpacked = unpack_modelopt(tensors, name, algorithms[format_.name])
        block, share = errors[algorithms[format_.name]]
        block = block or weight.shape[1]
        largest = weight.unflatten(1, (-1, block)).abs().amax(-1).repeat_interleave(block, 1)
        assert ((unpacked - weight).abs() <= 1.1 * share * largest).all(), name
        if format_.name == "NVFP4_DEFAULT_CFG":
            scale = tensors[f"{name}.input_scale"].item()
            assert scale == pytest.approx(maxima[name] / (6 * 448), rel=1e-6)


KEPT = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder_16_bits(make_model: Any, model_folder: Any, tmp_path: Path) -> Any:
    """Save a small model as most checkpoints are: in 16 bits."""

    def save(family: str) -> Path:
        folder = tmp_path / f"{family}-16"
        shutil.copytree(model_folder(family), folder)
        make_model(family).to(torch.float16).save_pretrained(folder)
        weights = load_folder(folder)
        weights[KEPT] = weights[KEPT].float() * (1 + 2**-20)  # some layers' parameters are float32
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return save


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("choice", [MIXED_WEIGHTS, MIXED_INPUTS], ids=["weights", "inputs"])
def test_compressed_tensors_folder_is_read_by_transformers_alone(
    choice: dict[str, str], family: str, solved_run: Any, folder_16_bits: Any, tmp_path: Path
) -> None:
    """The reader is transformers with compressed-tensors. A random model is chaotic: where inputs
    are rounded, a last bit that differs spreads to all later positions, so samples are short."""
    directory, _, _ = solved_run(family, choice, folder=folder_16_bits(family))
    out = tmp_path / "out"
    written = export_run(directory, str(out), layout="compressed-tensors")
    assert written.bytes_on_disk == pytest.approx(written.weight_bytes, rel=0.01)
    ids = torch.randint(0, 256, (250, 8), generator=torch.Generator().manual_seed(1))
    expected = logits_of_solution(directory, "", ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    assert (expected.argmax(-1) == logits.argmax(-1)).float().mean() >= 0.99
    assert (expected - logits).abs().mean() < 0.002 * expected.std()
    types = {str(load_folder(out)[f"{name}.weight"].dtype) for name in ("model.norm", KEPT[:-7])}
    assert types == {"torch.float16", "torch.float32"}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert len(targets) == len(set(targets))
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(targets) | set(config["ignore"]) == linears
    assert not set(targets) & set(config["ignore"])


@pytest.mark.parametrize(
    ("in_files", "stated", "expected"),
    [
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float16, None, torch.float16),
        (torch.float16, "float32", torch.float16),
        (torch.bfloat16, "float16", torch.bfloat16),
    ],
)
def test_what_is_not_quantized_has_the_16_bit_type_of_the_files(
    in_files: torch.dtype,
    stated: str | None,
    expected: torch.dtype,
    solved_run: Any,
    model_folder: Any,
    tmp_path: Path,
) -> None:
    """Whatever the config says: scripts write one of the two without the other."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    source = {name: tensor.to(in_files) for name, tensor in load_folder(folder).items()}
    save_file(source, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "dtype"}
    config |= {} if stated is None else {"dtype": stated}
    (folder / "config.json").write_text(json.dumps(config))
    choice = {"*": "none", "*mlp*": "wint8_afp16"}
    directory, _, _ = solved_run("llama", choice, ("wint8_afp16",), folder=folder)
    out = tmp_path / "out"
    written = export_run(directory, str(out), layout="compressed-tensors")
    assert written.bytes_on_disk == pytest.approx(written.weight_bytes, rel=0.01)
    tensors = load_folder(out)
    for name in [name for name in source if "mlp" not in name]:
        assert tensors[name].dtype == expected
        assert torch.equal(tensors[name], source[name].to(expected)), name


def test_one_format_is_stated_once_and_the_rest_is_ignored(solved_run: Any, tmp_path: Path) -> None:
    choice = {"model.layers.0.*": "wfp8_afp8", "model.layers.1.*": "none", "lm_head": "none"}
    directory, _, _ = solved_run("qwen3", choice)
    export_run(directory, str(tmp_path / "out"), engine="vllm", gpu="h100")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8"
    assert "model.layers.1*" in config["quantization_config"]["ignore"]
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_folder(tmp_path / "out")


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_layer_that_a_reader_would_take_for_another_is_found(
    layout: str, solved_run: Any, tmp_path: Path
) -> None:
    directory, _, _ = solved_run("llama", MIXED)
    out = tmp_path / "out"
    export_run(directory, str(out), layout=layout)
    source = read_source(directory)
    file = out / "config.json"
    config = json.loads(file.read_text())
    quantized = config["quantization_config"]
    if layout == "modelopt":
        del quantized["quantized_layers"]["model.layers.0.mlp.up_proj"]
    else:
        quantized["config_groups"]["group_0"]["targets"].remove("model.layers.0.self_attn.k_proj")
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.\S+ as 16 bits instead of"):
        check_checkpoint(out, source, layout)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_folder_of_another_size_than_the_manifest_says_is_not_kept(
    layout: str, solved_run: Any, tmp_path: Path
) -> None:
    directory, _, _ = solved_run("llama", MIXED)
    file = Path(directory.path("manifest.json"))
    manifest = json.loads(file.read_text())
    manifest["solution"]["weight_bytes"] *= 1.02
    file.write_text(json.dumps(manifest))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"bytes of weights, -\d\.\d+% from the") as caught:
        export_run(directory, str(tmp_path / "out"), layout=layout)
    assert caught.value.exit_code == 1
    assert set(tmp_path.rglob("*")) == before


def test_model_that_changed_since_the_run_is_refused(
    solved_run: Any, folder_16_bits: Any, tmp_path: Path
) -> None:
    folder = folder_16_bits("llama")
    directory, _, _ = solved_run("llama", MIXED, folder=folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(StoreError, match="changed since"):
        Run.open(directory.uri).export(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", ["wfp8_afp8", "wfp8_afp8:mse"])
def test_fused_fp8_layers_have_one_scale_and_loading_changes_nothing(
    name: str, layout: str, solved_run: Any, tmp_path: Path
) -> None:
    """vLLM dequantizes fused layers and rounds them again to the largest of their scales."""
    directory, *_ = solved_run("llama", {"*": name}, (name,))
    export_run(directory, str(tmp_path / "out"), layout=layout)
    tensors = load_folder(tmp_path / "out")
    for parts in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        names = [f"model.layers.1.{parts[0]}.{part}_proj" for part in parts[1]]
        for kind in ("weight_scale", "input_scale"):
            scales = {tensors[f"{layer}.{kind}"].item() for layer in names}
            assert len(scales) == 1, (kind, scales)
        scale = tensors[f"{names[0]}.weight_scale"].float().reshape(())
        stored = [tensors[f"{layer}.weight"].float() for layer in names]
        loaded = [(w * scale / scale).to(torch.float8_e4m3fn).float() for w in stored]
        assert all(torch.equal(a, b) for a, b in zip(stored, loaded, strict=True))
        if name == "wfp8_afp8":
            assert max(float(w.abs().max()) for w in stored) == 448


def test_fused_nvfp4_layers_have_one_second_scale_and_others_their_own(
    solved_run: Any, tmp_path: Path
) -> None:
    """ModelOpt's exporter alone gives all linears that read one input the largest: here those of
    the linear attention, and the shared expert's beside its gate."""
    name, folder = "NVFP4_DEFAULT_CFG", tmp_path / "model"
    family_model("Qwen3-Next").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    parts = ("in_proj_qkvz", "in_proj_ba", "q_proj", "shared_expert.gate_proj")
    choice = {f"*{part}": name for part in parts}
    directory, *_ = solved_run("llama", choice, (name,), folder=folder)
    export_run(directory, str(tmp_path / "out"))
    tensors, source = load_folder(tmp_path / "out"), load_folder(folder)
    second = {n.rpartition(".")[0]: t.item() for n, t in tensors.items() if "weight_scale_2" in n}
    assert {layer.rpartition(".")[2] for layer in second} >= {
        "in_proj_qkvz",
        "in_proj_ba",
        "q_proj",
    }
    for layer, value in second.items():
        largest = float(largest_of_fused(source, layer))
        assert value == pytest.approx(largest / (6 * 448), rel=1e-6), layer


def test_checkpoint_for_sglang_lists_fused_layers_by_its_names_too(
    solved_run: Any, tmp_path: Path
) -> None:
    """Many of its model classes do not state what they fuse."""
    menu = ("wfp8_afp8", "wfp4_afp16")
    choice = {"*attn*": menu[0], "*mlp*": menu[1], "*o_proj": "none", "lm_head": menu[0]}
    directory, *_ = solved_run("llama", choice, menu)
    export_run(directory, str(tmp_path / "out"), engine="sglang", gpu="hopper")
    quantized = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    file = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    for layers in (quantized["quantized_layers"], file["quantized_layers"]):
        for layer in range(2):
            start = f"model.layers.{layer}"
            assert layers[f"{start}.self_attn.qkv_proj"]["quant_algo"] == "FP8"
            assert layers[f"{start}.mlp.gate_up_proj"] == layers[f"{start}.mlp.gate_proj"]
            assert f"{start}.self_attn.o_proj" not in layers
    export_run(directory, str(tmp_path / "plain"))
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert not any("qkv_proj" in name for name in plain["quantized_layers"])


@pytest.mark.parametrize("given", ["export", "solve", "nothing"])
def test_layout_is_the_one_in_which_the_engine_serves_the_solution(
    given: str, solved_run: Any, tmp_path: Path
) -> None:
    """int4, int8 and FP8 together: vLLM reads them by compressed-tensors alone."""
    menu = ("int4_g32", "wint8_aint8", "wfp8_afp8")
    choice = {"*attn*": menu[0], "*gate_proj": menu[1], "*down_proj": menu[2], "lm_head": "none"}
    directory, *_ = solved_run("llama", choice, menu)
    solution = ""
    if given == "solve":
        rows = directory.read_table("manifest.parquet").to_pylist()
        pins = {row["group"]: row["format"] for row in rows}
        options = SolveOptions(bytes=10**9, pins=pins, engine="vllm", gpu="hopper")
        solution = solve_run(directory, options).name
    engine = {"engine": "vllm", "gpu": "h100"} if given == "export" else {}
    written = export_run(directory, str(tmp_path / "out"), solution=solution, **engine)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layout = "modelopt" if given == "nothing" else "compressed-tensors"
    assert written.layout == config["quant_method"] == layout
    assert written.served_layouts == ["compressed-tensors"]
    if given == "nothing":
        assert config["quant_algo"] == "MIXED_PRECISION"
        return
    formats = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert set(formats) == {"pack-quantized", "int-quantized", "float-quantized"}
    assert sum(map(len, formats.values())) == 14


@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "wfp4_afp16", "MXFP8_DEFAULT_CFG"])
def test_blocks_of_floats_in_compressed_tensors_are_those_that_were_scored(
    name: str, solved_run: Any, tmp_path: Path
) -> None:
    """Unpacked by the layout's rules alone: a byte per scale, two numbers of four bits in one."""
    choice = {"*": name, "lm_head": "none", "*v_proj": name}
    directory, folder, _ = solved_run("llama", choice, (name,))
    out = tmp_path / "out"
    export_run(directory, str(out), layout="compressed-tensors")
    tensors, source = load_folder(out), read_source(directory)
    model = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    scales = WeightScales(model, read_calibration(directory, list(source.formats.values())[:1]))
    for module, format_ in source.formats.items():
        scored = quantized_weight(format_, model.get_submodule(module).weight, scales, module)
        scale = tensors[f"{module}.weight_scale"]
        if name == "MXFP8_DEFAULT_CFG":
            assert scale.dtype == torch.uint8
            numbers = tensors[f"{module}.weight"].float()
            factors = torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
        else:
            assert scale.dtype == torch.float8_e4m3fn
            packed = tensors[f"{module}.weight_packed"]
            codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).long()
            numbers = E2M1[codes & 7] * torch.where(codes > 7, -1, 1)
            whole = tensors[f"{module}.weight_global_scale"]  # inverted there
            factors = scale.float().repeat_interleave(16, dim=1) / whole
        torch.testing.assert_close(numbers * factors, scored, rtol=1e-5, atol=1e-9)
        inputs = tensors.get(f"{module}.input_global_scale")
        assert (inputs is not None) == (name == "NVFP4_DEFAULT_CFG")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert len(group["targets"]) == 14


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
