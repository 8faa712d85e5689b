#!/bin/sh
# transformers loads quantized checkpoints with other weights than they hold, and no error.
#
# Packages: transformers 5.14.1 (torch 2.13.0, accelerate 1.15.0), seen 2026-11-29.
# Expected: `from_pretrained` gives the dequantized weights (numbers times scales), or an error.
# Seen: 1. ModelOpt's FP8 layout (`quant_method: modelopt`, as vendors publish it): FP8 numbers are loaded without
#   their scales; a log line says that the method is unknown.
#   2. Block FP8 (`weight_block_size`) whose last block is not full: with `dequantize=True` the size of a block is
#   taken from the number of scales. 200 rows in blocks of 128 are 2 scales, so rows 100 to 127 get the second one.
#   3. MXFP4 (GPT-OSS) with `dequantize=True, dtype=torch.float32`: the experts are bfloat16 among float32.
# Prints the largest relative error of a weight; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.14.1 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

NAME = "model.layers.0.mlp.down_proj.weight"
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=200, intermediate_size=256, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)
torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained("plain")
plain = load_file("plain/model.safetensors")


def write(folder, pack, **entries):
    """Save the model with one weight packed, and the weight that it stands for."""
    pathlib.Path(folder).mkdir()
    tensors = dict(plain)
    parts, expected = pack(tensors.pop(NAME))
    tensors |= {NAME + end: part for end, part in parts.items()}
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    content = json.loads(pathlib.Path("plain/config.json").read_text()) | entries
    pathlib.Path(folder, "config.json").write_text(json.dumps(content))
    return expected


def per_tensor(weight):
    scale = weight.abs().max() / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"": numbers, "_scale": scale}, numbers.float() * scale


def in_blocks(weight):
    """200 rows and 256 columns in blocks of 128: 2 x 2 scales."""
    grid = torch.tensor([[1.0, 1.0], [4.0, 4.0]]) * weight.abs().max() / 448
    scales = grid.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    numbers = (weight / scales).to(torch.float8_e4m3fn)
    return {"": numbers, "_scale_inv": grid}, numbers.float() * scales


def load(folder, **arguments):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)
    return model.state_dict()


def error(weight, expected):
    return ((weight.float() - expected).abs().max() / expected.abs().max()).item()


print("transformers", transformers.__version__)
modelopt = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
expected = write("modelopt", per_tensor, quantization_config=modelopt)
off = error(load("modelopt")[NAME], expected)
print(f"1. ModelOpt FP8: off by {off:.0f} times the largest weight")
assert off > 100, "scales are applied: changed"

blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
expected = write("blocks", in_blocks, quantization_config=blocks)
weight = load("blocks", quantization_config=transformers.FineGrainedFP8Config(dequantize=True))[NAME]
wrong = (weight - expected).abs().amax(1).nonzero().flatten()
print(f"2. block FP8: rows {wrong.min()} to {wrong.max()} of 200 are wrong, in blocks of 128")
assert (wrong.min(), wrong.max()) == (100, 127), "the config's block size is taken: changed"

small = transformers.GptOssConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, num_local_experts=2, num_experts_per_tok=1,
    layer_types=["full_attention"], architectures=["GptOssForCausalLM"],
)
tensors = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32).state_dict()
for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
    experts, columns, rows = tensors.pop(name).shape
    tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 120, dtype=torch.uint8)
pathlib.Path("mxfp4").mkdir()
save_file(tensors, "mxfp4/model.safetensors", metadata={"format": "pt"})
content = small.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
pathlib.Path("mxfp4/config.json").write_text(json.dumps(content))
state = load("mxfp4", quantization_config=transformers.Mxfp4Config(dequantize=True))
types = {name.split(".")[-1]: tensor.dtype for name, tensor in state.items() if "experts" in name}
print("3. MXFP4 experts loaded in float32:", types)
assert types["down_proj"] == torch.bfloat16, "in the type that was asked for: changed"
PYTHON
