#!/bin/sh
# ModelOpt exports a weight that is all zeros as NaN, in FP8 and in NVFP4.
#
# Package: nvidia-modelopt 0.47.0 (torch 2.13.0, transformers 5.14.1), seen 2026-11-29.
# Expected: `export_hf_checkpoint` writes a linear whose weight is 0 (pruned, or initialized so) as zeros.
# Seen: 0 / 0 is packed, as numbers (FP8) or as the scales of blocks (NVFP4), so that the layer of the
#   checkpoint gives NaN. Weights with a scale per channel (int8) are written as zeros.
# Prints what stands in the checkpoints; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports requests and does not require it.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.14.1 requests==2.34.2
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import modelopt
import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file

NAME = "model.layers.0.self_attn.o_proj"
config = transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
)
print("nvidia-modelopt", modelopt.__version__, "transformers", transformers.__version__)
num_nan = {}
for preset in ("FP8_DEFAULT_CFG", "W4A16_NVFP4_CFG", "INT8_DEFAULT_CFG"):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.get_submodule(NAME).weight.data.zero_()
    loop = None if "NVFP4" in preset else lambda m: m(torch.arange(32)[None])
    mtq.quantize(model, getattr(mtq, preset), loop)
    out = f"{sys.argv[1]}/{preset}"
    with torch.no_grad():
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out)
    tensors = load_file(f"{out}/model.safetensors")
    parts = {part: tensors[f"{NAME}.{part}"].float() for part in ("weight", "weight_scale")}
    num_nan[preset] = sum(int(tensor.isnan().sum()) for tensor in parts.values())
    print(f"{preset}: {num_nan[preset]} NaN in {' and '.join(parts)} of a weight of zeros")
assert num_nan["FP8_DEFAULT_CFG"] and num_nan["W4A16_NVFP4_CFG"], "zeros are exported: changed"
assert not num_nan["INT8_DEFAULT_CFG"], "int8 zeros are NaN: changed"
PYTHON
