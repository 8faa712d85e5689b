#!/bin/sh
# ModelOpt 0.48 writes which KV caches are quantized only where their formats differ.
#
# Package: nvidia-modelopt 0.48.0rc1 (torch 2.13.0, transformers 5.18.0), seen 2026-11-30.
# Expected: a checkpoint whose attentions do not all have the same KV cache says of each what it has, in
#   `kv_cache_quantized_layers`.
# Seen: it does where two formats are used, 16 bits beside them or not. Where one is used and other caches stay
#   in 16 bits, it writes `kv_cache_quant_algo: FP8` alone, as for a model with all caches in FP8; so a reader
#   quantizes all of them, those that have no scale under one of 1. Beside weights in 16 bits it names the layers.
# Prints what is written; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports requests and does not require it.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 nvidia-modelopt==0.48.0rc1 transformers==5.18.0 requests==2.34.2
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import json
import sys

import modelopt
import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file

print("nvidia-modelopt", modelopt.__version__, "transformers", transformers.__version__)
FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
}


def said_of_caches(name: str, *caches: dict | None, weights: bool = True) -> tuple[dict, int]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=len(caches),
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(config).eval()
    entries = [{"quantizer_name": "*", "enable": False}]
    for kind in ("weight", "input") if weights else ():
        entries.append({"quantizer_name": f"*mlp*{kind}_quantizer", "cfg": FP8})
    for layer, attributes in enumerate(caches):
        if attributes is not None:
            quantizers = f"*layers.{layer}.self_attn.[kv]_bmm_quantizer"
            entries.append({"quantizer_name": quantizers, "cfg": attributes})
    mtq.quantize(
        model, {"quant_cfg": entries, "algorithm": "max"}, lambda m: m(torch.arange(1, 33)[None])
    )
    out = f"{sys.argv[1]}/{name}"
    with torch.no_grad():
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)
    content = json.load(open(f"{out}/hf_quant_config.json"))["quantization"]
    said = {key: value for key, value in content.items() if key.startswith("kv_cache")}
    scales = [key for key in load_file(f"{out}/model.safetensors") if key.endswith("k_scale")]
    print(f"{name}: {said}; scales of keys: {scales}")
    return said, len(scales)


layers = "kv_cache_quantized_layers"
said, num_scales = said_of_caches("two formats and 16 bits", FP8, NVFP4, None)
assert said["kv_cache_quant_algo"] == "MIXED_PRECISION" and len(said[layers]) == num_scales == 2
said, num_scales = said_of_caches("one format and 16 bits", FP8, None, None)
assert said == {"kv_cache_quant_algo": "FP8"} and num_scales == 1, "one format: changed"
said, num_scales = said_of_caches("the same, weights in 16 bits", FP8, None, None, weights=False)
assert list(said[layers]) == ["model.layers.0.self_attn"], "weights in 16 bits: changed"
PYTHON
