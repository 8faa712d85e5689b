#!/bin/sh
# SGLang takes a mixed ModelOpt checkpoint without NVFP4 for another format, and finds no fused layers of
# a Llama in one.
#
# Package: sglang 0.5.23, seen 2026-11-29.
# Expected: `quant_algo: MIXED_PRECISION` with an algorithm per layer is read layer by layer, for every
#   model: its class for it handles FP8, MXFP8, block FP8, NVFP4 and W4A16_NVFP4.
# Seen: it is read so only if some layer has NVFP4 or W4A16_NVFP4; FP8 beside MXFP8 is read as `w4afp8`,
#   DeepSeek's format of int4 experts. And q, k and v, which it fuses into `qkv_proj`, are found only where
#   the model's class states `packed_modules_mapping`: Qwen3-MoE's does, Llama's and Qwen3's do not, so
#   there the fused layer is taken for unquantized.
# The functions are taken out of the wheel, because the whole package needs a GPU's libraries. Prints what
# is read; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --python-version 3.11 --platform manylinux_2_34_x86_64 --dest "$folder" sglang==0.5.23
python3 -W ignore - "$folder" <<'PYTHON'
import ast
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

(wheel,) = Path(sys.argv[1]).glob("sglang-*.whl")
archive = zipfile.ZipFile(wheel)


def read(path):
    return archive.read(f"sglang/srt/{path}").decode()


def take(path, *names):
    """Functions of a file, those of classes among them, without what stands around them."""
    nodes = [n for n in ast.walk(ast.parse(read(path))) if getattr(n, "name", "") in names]
    for node in nodes:
        node.decorator_list, node.returns = [], None
        for argument in node.args.args:
            argument.annotation = None
    theirs = {}
    exec(compile(ast.Module(nodes, []), path, "exec"), theirs)
    return theirs


config = take(
    "configs/model_config.py", "unwrap_modelopt_quantization_config", "_parse_modelopt_quant_config"
)
mixed = take(
    "layers/quantization/modelopt_quant.py",
    "_resolve_quant_algo",
    "_quantized_layer_prefix_candidates",
)


def method_of(*algorithms):
    layers = {f"model.layers.{n}.mlp.down_proj": {"quant_algo": a} for n, a in enumerate(algorithms)}
    content = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return config["_parse_modelopt_quant_config"](None, content)["quant_method"]


def algorithm_of(name, model):
    """Of a fused layer of a model, all of whose layers have FP8 in the checkpoint."""
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    mapping = {}
    if "packed_modules_mapping = {" in read(f"models/{model}.py"):
        mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    checkpoint = SimpleNamespace(
        quantized_layers={layer: {"quant_algo": "FP8"} for layer in names},
        packed_modules_mapping=mapping,
        _quantized_layer_prefix_candidates=mixed["_quantized_layer_prefix_candidates"],
    )
    return mixed["_resolve_quant_algo"](checkpoint, name)


for algorithms in (("FP8", "MXFP8"), ("FP8", "MXFP8", "W4A16_NVFP4")):
    print(f"{' and '.join(algorithms)}: read as {method_of(*algorithms)}")
assert method_of("FP8", "MXFP8") == "w4afp8", "no longer taken for W4AFP8: changed"
assert method_of("FP8", "MXFP8", "W4A16_NVFP4") == "modelopt_mixed", "not read as mixed: changed"
qkv = "model.layers.0.self_attn.qkv_proj"
served = {model: algorithm_of(qkv, model) for model in ("qwen3_moe", "llama", "qwen3")}
for model, algorithm in served.items():
    print(f"q, k and v in FP8, {model}: served as {algorithm or '16 bits'}")
assert served == {"qwen3_moe": "FP8", "llama": None, "qwen3": None}, "fused layers: changed"
assert algorithm_of(qkv.replace("qkv", "o"), "llama") == "FP8", "plain layers: changed"
PYTHON
