"""Checkpoints that are quantized already give the weights that other libraries make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder
from click.testing import CliRunner
from quantized_checkpoints import (
    FP8_BLOCKS,
    MODELOPT_FP8,
    block_fp8,
    repacked,
    tensor_fp8,
    with_config,
)
from safetensors.torch import load_file, save_file
from small_models import DECODER

from autoquant_ray.cli.main import main
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.models.find import find_model, fingerprint_model
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.plan.make import make_plan
from autoquant_ray.plan.plan import Plan
from autoquant_ray.score.loading import load_placed

IDS = torch.arange(3, 43).reshape(2, 20)
PROJECTION = "model.layers.0.mlp.down_proj"


def load(folder: Path, dtype: str = "float32") -> Any:
    return load_model(find_model(str(folder)), dtype=dtype, device="cpu")


def plan_of(folder: Path) -> Plan:
    space = SearchSpace(model=str(folder), formats=("wint8_afp16",))
    return make_plan(space, find_model(str(folder)), device="cpu")


def twin(folder: Path, **config: Any) -> Any:
    """The model as transformers dequantizes it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **config
    ).eval()


def assert_same(model: Any, other: Any) -> None:
    """The same weights to the bit, hence the same scores; and the same logits."""
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_block_fp8_equals_the_model_that_transformers_dequantizes(
    family: str, model_folder: Any, tmp_path: Path
) -> None:
    config = FP8_BLOCKS | {"weight_block_size": [16, 16]}
    folder = repacked(model_folder(family), tmp_path / "m", block_fp8(16, 16), config)
    dequantize = transformers.FineGrainedFP8Config(dequantize=True)
    assert_same(load(folder), twin(folder, quantization_config=dequantize))
    plan, plain = plan_of(folder), plan_of(model_folder(family))
    assert plan.rows() == plain.rows()
    assert plan.other_bytes == plain.other_bytes
    assert plan.source_format == "FP8 in blocks of 16x16"


def test_block_fp8_whose_last_block_is_not_full_is_cut_at_the_edge(
    model_folder: Any, tmp_path: Path
) -> None:
    """160 rows are 3 blocks of 48 and one of 16; 4 divides 160, so transformers takes 40."""
    config = FP8_BLOCKS | {"weight_block_size": [48, 48]}
    folder = repacked(model_folder("llama"), tmp_path / "m", block_fp8(48, 48), config)
    tensors, weights = load_folder(folder), load(folder).state_dict()
    for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.k_proj"):
        name = f"model.layers.1.{name}.weight"
        numbers, grid = tensors[name].float(), tensors[f"{name}_scale_inv"]
        for (i, j), number in dict(_elements(numbers, 7)).items():
            assert weights[name][i, j] == number * grid[i // 48, j // 48]


def _elements(matrix: torch.Tensor, step: int) -> list[tuple[tuple[int, int], torch.Tensor]]:
    rows, columns = matrix.shape
    return [((i, j), matrix[i, j]) for i in range(0, rows, step) for j in range(0, columns, step)]


@pytest.mark.parametrize(
    ("algo", "preset"),
    [
        ("FP8", "FP8_DEFAULT_CFG"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        ("W8A8_SQ_PER_CHANNEL", "INT8_DEFAULT_CFG"),
        ("W4A16_AWQ", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ],
)
def test_modelopt_layout_equals_the_weights_that_modelopt_quantized(
    algo: str, preset: str, tmp_path: Path
) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **DECODER | {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256},
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    mtq.quantize(model, getattr(mtq, preset), lambda m: m(IDS))
    expected = {
        name: module.weight_quantizer(module.weight).detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "m")
    assert f'"{algo}"' in (tmp_path / "m/hf_quant_config.json").read_text()
    weights = load(tmp_path / "m").state_dict()
    assert plan_of(tmp_path / "m").source_format == f"ModelOpt's {algo}"
    for name, weight in expected.items():
        assert (weights[f"{name}.weight"] - weight).norm() <= 1e-6 * weight.norm(), name


@pytest.mark.parametrize("algo", ["NVFP4", "MXFP8"])
def test_modelopt_blocks_equal_what_its_own_tensors_dequantize(
    algo: str, model_folder: Any, tmp_path: Path
) -> None:
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    expected = []

    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if algo == "MXFP8":
            packed, scale = MXFP8QTensor.quantize(weight)
            expected.append(packed.dequantize(scale=scale))
            return {"weight": packed._quantized_data, "weight_scale": scale}
        packed, scale, second = NVFP4QTensor.quantize(weight, 16)
        arguments = {"scale": scale, "double_scale": second, "block_sizes": {-1: 16}}
        expected.append(packed.dequantize(**arguments))
        parts = {"weight": packed._quantized_data, "weight_scale": scale}
        return parts | {"weight_scale_2": second}

    config = {"quant_method": "modelopt", "quant_algo": algo}
    folder = repacked(model_folder("llama"), tmp_path / "m", pack, config)
    names = [n for n in load_folder(model_folder("llama")) if n.endswith("_proj.weight")]
    loaded = load(folder).state_dict()
    for name, weight in zip(names, expected, strict=True):
        assert torch.allclose(loaded[name], weight, rtol=1e-6), name


COMPRESSED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "float tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
    ),
    "int channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int group, zero points": (
        "naive-quantized",
        {
            "num_bits": 8,
            "type": "int",
            "strategy": "group",
            "group_size": 32,
            "symmetric": False,
        },
    ),
    "packed int4": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    ),
    "packed int4, zero points": (
        "pack-quantized",
        {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": 16,
            "symmetric": False,
        },
    ),
    "packed int8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors_equal_what_its_own_library_decompresses(
    case: str, dtype: torch.dtype, model_folder: Any, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    format_, weights = COMPRESSED[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=format_)
    compressor = BaseCompressor.get_value_from_registry(format_)
    expected = []

    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        arguments = scheme.weights
        blocks = _blocks(weight.to(dtype), weights)
        low, high = blocks.amin((-3, -1)), blocks.amax((-3, -1))
        extra = {}
        if case == "nvfp4":
            extra["weight_global_scale"] = (448 * 6 / weight.abs().amax()).reshape(1)
        scale, zero_point = calculate_qparams(
            low, high, arguments, global_scale=extra.get("weight_global_scale")
        )
        parts = {"weight": weight.to(dtype), "weight_scale": scale, **extra}
        if weights.get("symmetric") is False:
            parts["weight_zero_point"] = zero_point
        packed = compressor.compress(parts, scheme)
        expected.append(compressor.decompress(packed, scheme)["weight"])
        return {name: tensor for name, tensor in packed.items() if tensor is not None}

    group = {"targets": ["Linear"], "weights": weights, "format": format_}
    config = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    folder = repacked(model_folder("llama"), tmp_path / "m", pack, config)
    packed_names = [n for n in load_folder(model_folder("llama")) if n.endswith("_proj.weight")]
    loaded = load(folder).state_dict()
    is_fp4 = weights["num_bits"] == 4 and weights["type"] == "float"
    for name, weight in zip(packed_names, expected, strict=True):
        # The library multiplies FP4 in bfloat16.
        limit = 2**-7 * weight.float().abs() if is_fp4 else torch.zeros(())
        assert ((loaded[name] - weight.float()).abs() <= limit).all(), name


def _blocks(weight: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """A weight as ``(rows of scales, rows of one, columns of scales, columns of one)``."""
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": tuple(arguments.get("block_structure", (1, 1))),
    }.get(arguments["strategy"], (1, arguments.get("group_size", 1)))
    return weight.reshape(rows // height, height, columns // width, width)


def test_packed_experts_and_several_groups_of_compressed_tensors_are_told_apart(
    model_folder: Any, tmp_path: Path
) -> None:
    """Experts in 4 bits, the rest in FP8 under a pattern; transformers reads the same."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    scheme = QuantizationScheme(targets=["Linear"], weights=int4)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    plain = load_file(model_folder("qwen3_moe") / "model.safetensors")

    def pack(weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        is_expert = any(weight.equal(t) for n, t in plain.items() if ".experts." in n)
        if not is_expert:
            return {k: t for k, t in tensor_fp8(weight).items() if k != "input_scale"}
        scale = weight.reshape(len(weight), -1, 16).abs().amax(-1) / 7
        parts: Mapping[str, torch.Tensor] = compressor.compress(
            {"weight": weight, "weight_scale": scale}, scheme
        )
        return parts

    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": fp8, "format": "float-quantized"},
            "group_1": {"targets": [r"re:.*\.experts\.\d+\..*"], "weights": int4},
        },
    }
    folder = repacked(model_folder("qwen3_moe"), tmp_path / "m", pack, config)
    name = "mlp.experts.3.down_proj"
    loaded = load(folder).model.layers[1].mlp.experts.down_proj[3]
    stored = {
        part: tensor
        for part in ("weight_packed", "weight_scale", "weight_shape")
        for tensor in [load_folder(folder)[f"model.layers.1.{name}.{part}"]]
    }
    assert torch.equal(loaded, compressor.decompress(stored, scheme)["weight"])
    off = loaded - plain[f"model.layers.1.{name}.weight"]
    assert off.norm() < 0.2 * loaded.norm()


def test_mxfp4_of_gpt_oss_equals_the_model_that_transformers_dequantizes(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        **DECODER | {"intermediate_size": 96, "num_hidden_layers": 1},
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = model.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape[:-1], dtype=torch.uint8)
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    dequantize = transformers.Mxfp4Config(dequantize=True)
    # transformers leaves the experts in bfloat16, whatever type the model is loaded in.
    assert_same(load(tmp_path), twin(tmp_path, quantization_config=dequantize).float())
    assert plan_of(tmp_path).source_format == "MXFP4 experts"


def test_quantized_checkpoint_is_offloaded_as_the_same_model(
    model_folder: Any, tmp_path: Path
) -> None:
    folder = repacked(model_folder("llama"), tmp_path / "m", tensor_fp8, MODELOPT_FP8)
    ref = find_model(str(folder))
    model, residence = load_placed(ref, dtype="float32", device="cpu", placement="offload")
    expected = load(folder)
    for index, layer in enumerate(expected.model.layers):
        with residence.visit(index, None):
            for name, tensor in layer.named_parameters():
                read = model.model.layers[index].get_parameter(name)
                assert torch.equal(read, tensor), name


def test_config_and_fingerprint_of_a_quantized_checkpoint(
    model_folder: Any, tmp_path: Path
) -> None:
    """The description may stand in ModelOpt's file alone, or in a part of the config."""
    folder = repacked(model_folder("llama"), tmp_path / "m", tensor_fp8, None)
    bare = fingerprint_model(find_model(str(folder)))
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    expected = load(folder)
    assert not hasattr(expected.config, "quantization_config")
    assert fingerprint_model(find_model(str(folder))) != bare
    (folder / "hf_quant_config.json").unlink()
    with_config(folder, language={"quantization_config": MODELOPT_FP8})
    assert_same(load(folder), expected)
    name = f"{PROJECTION}.weight"
    tensors = load_folder(folder)
    assert torch.equal(
        expected.get_parameter(name), tensors[name].float() * tensors[f"{name}_scale"]
    )


def test_quantized_head_of_a_tied_config_is_compared_dequantized(
    model_folder: Any, tmp_path: Path
) -> None:
    """A head in FP8 that the config ties: its numbers alone differ from the embedding."""
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    plain = tmp_path / "plain"
    shutil.copytree(model_folder("qwen3"), plain)
    tensors = load_file(plain / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    scale = embedding.abs().amax() / 448
    numbers = (embedding / scale).to(torch.float8_e4m3fn)
    for rounded, is_tied in ((numbers.float() * scale, True), (embedding, False)):
        head = {"lm_head.weight": numbers, "lm_head.weight_scale": scale}
        tensors["model.embed_tokens.weight"] = rounded
        save_file(tensors | head, plain / "model.safetensors", metadata={"format": "pt"})
        with_config(plain, quantization_config=config)
        for model in (build_skeleton(find_model(str(plain))), load(plain)):
            shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert shared == is_tied


@pytest.mark.parametrize("config", [FP8_BLOCKS | {"weight_block_size": [16, 16]}, MODELOPT_FP8])
def test_files_in_16_bits_whose_config_was_left_over_are_a_plain_model(
    config: dict[str, Any], model_folder: Any, tmp_path: Path
) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "m")
    with_config(tmp_path / "m", quantization_config=config)
    assert_same(load(tmp_path / "m"), load(model_folder("llama")))
    assert plan_of(tmp_path / "m").source_format is None


def plan_fails(folder: Path) -> str:
    """The one line that ``plan`` ends with."""
    result = CliRunner().invoke(main, ["plan", str(folder), "--formats", "wint8_afp16"])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(line.replace(str(folder), "m")) <= 400
    return line


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "AWQ, 4 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": False}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"quant_method": "of-tomorrow"}, "'of-tomorrow'"),
        ({"group_size": 64, "bits": 4}, "MLX, 4 bits"),
        ({"config": "of no method"}, "by a method that they do not name"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}, "NVFP4_SVD is not read"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {PROJECTION: {"quant_algo": "W4A8_AWQ"}},
            },
            "W4A8_AWQ",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "marlin-24"}},
            "sparse",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"u": {}}},
            },
            "transform_config",
        ),
    ],
)
def test_methods_that_are_not_read_are_refused_by_plan(
    config: dict[str, Any], says: str, model_folder: Any, tmp_path: Path
) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "m")
    with_config(tmp_path / "m", quantization_config=config)
    line = plan_fails(tmp_path / "m")
    assert "is quantized already" in line
    assert says in line
    assert "give the 16-bit model" in line


FLOATS = {"num_bits": 8, "type": "float", "strategy": "block"}


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": [1]},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "sparsity_config": "dense"},
        {"quant_method": "compressed-tensors", "transform_config": "none"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": "W8"}}},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": None}}},
        },
    ],
)
def test_descriptions_of_other_types_are_refused_by_plan(
    config: dict[str, Any], model_folder: Any, tmp_path: Path
) -> None:
    folder = repacked(model_folder("llama"), tmp_path / "m", tensor_fp8, config)
    line = plan_fails(folder)
    assert "is quantized already" in line
    assert "what its files say of that cannot be read" in line


def test_blocks_may_be_written_as_a_text(model_folder: Any, tmp_path: Path) -> None:
    """As compressed-tensors' own reader takes them."""
    from compressed_tensors.quantization import QuantizationArgs

    weights = FLOATS | {"block_structure": "48x40"}
    assert QuantizationArgs(**weights).block_structure == [48, 40]
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
    }

    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = dict(block_fp8(48, 40)(weight))
        return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}

    folder = repacked(model_folder("llama"), tmp_path / "ct", pack, config)
    blocks = FP8_BLOCKS | {"weight_block_size": [48, 40]}
    other = repacked(model_folder("llama"), tmp_path / "fp8", block_fp8(48, 40), blocks)
    assert_same(load(folder), load(other))


def test_scales_of_inputs_and_caches_are_left_out_without_a_word(
    model_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return tensor_fp8(weight) | {"k_scale": torch.tensor(0.5)}

    folder = repacked(model_folder("llama"), tmp_path / "m", pack, MODELOPT_FP8)
    load(folder)
    assert caplog.text == ""
    assert "UNEXPECTED" not in capfd.readouterr().err


def as_float8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight.to(torch.float8_e4m3fn)}


def as_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": (weight * 100).to(torch.int8)}


def as_gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"qweight": torch.ones(8, 8, dtype=torch.int32), "scales": torch.ones(8)}


def with_scale(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight, "weight_scale": torch.ones(())}


def as_bitsandbytes(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {"weight": packed, "weight.absmax": torch.ones(8)}


@pytest.mark.parametrize("pack", [as_float8, as_int8, as_gptq, with_scale, as_bitsandbytes])
def test_files_that_look_quantized_and_do_not_say_how_are_refused(
    pack: Any, model_folder: Any, tmp_path: Path
) -> None:
    folder = repacked(model_folder("llama"), tmp_path / "m", pack, None)
    assert "does not say how" in plan_fails(folder)


@pytest.mark.parametrize(
    ("pack", "config", "says"),
    [
        (as_float8, FP8_BLOCKS | {"weight_block_size": [16, 16]}, "lack a scale of"),
        (as_float8, MODELOPT_FP8, "not clear what"),
        (as_int8, MODELOPT_FP8, "not clear what"),
        (with_scale, MODELOPT_FP8, "is stored as F32, which FP8 is not"),
        (block_fp8(16, 16), FP8_BLOCKS | {"weight_block_size": [32, 16]}, "do not fit numbers"),
        (block_fp8(16, 16), FP8_BLOCKS, "the size of its blocks, None, is no pair"),
        (block_fp8(16, 16), FP8_BLOCKS | {"weight_block_size": ["a", 1]}, "that cannot be read"),
        (block_fp8(16, 16), MODELOPT_FP8, "not clear what"),
        (tensor_fp8, MODELOPT_FP8 | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "do not fit"),
    ],
)
def test_files_that_are_not_as_their_config_says_are_refused(
    pack: Any, config: dict[str, Any], says: str, model_folder: Any, tmp_path: Path
) -> None:
    folder = repacked(model_folder("llama"), tmp_path / "m", pack, config)
    assert says in plan_fails(folder)


def test_two_descriptions_that_differ_are_refused(model_folder: Any, tmp_path: Path) -> None:
    folder = repacked(model_folder("llama"), tmp_path / "m", tensor_fp8, FP8_BLOCKS)
    described = {"quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    assert "in several places" in plan_fails(folder)


def test_model_whose_files_lack_a_weight_is_refused(model_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_folder("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{PROJECTION}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=f"hold no weights for {PROJECTION}.weight"):
        load(folder)
