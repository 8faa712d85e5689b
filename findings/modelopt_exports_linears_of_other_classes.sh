#!/bin/sh
# ModelOpt's exporter leaves linears unpacked whose class is not named Linear, and parts scales from
# weights whose whole names change on loading.
#
# Package: nvidia-modelopt 0.47.0 (torch 2.13.0, transformers 5.14.1), seen 2026-11-30.
# Expected: `export_hf_checkpoint` packs each linear that its `quantization_config` does not ignore, and
#   writes a layer's tensors under one name.
# Seen: it packs a module whose class has "QuantLinear" in its name. Falcon's linears are of a class
#   `FalconLinear`, so they are in no 8 bits and have no scale, and the config says FP8 of them.
#   It takes transformers' names back tensor by tensor. DeepSeek-V4's rule is for `lm_head.weight` as a
#   whole: the weight becomes `head.weight`, and its scales stay with `lm_head`.
# Prints what stands in the checkpoints; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports requests and does not require it.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.14.1 requests==2.34.2
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


def exported(model: torch.nn.Module, quantization: dict) -> tuple[dict[str, torch.Tensor], dict]:
    model.config.architectures = [type(model).__name__]
    mtq.quantize(model.eval(), quantization, lambda m: m(torch.arange(1, 33)[None]))
    out = f"{sys.argv[1]}/{model.config.model_type}"
    with torch.no_grad():
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out)
    config = json.load(open(f"{out}/config.json"))["quantization_config"]
    return load_file(f"{out}/model.safetensors"), config


torch.manual_seed(0)
falcon = transformers.FalconConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
)
tensors, config = exported(transformers.FalconForCausalLM(falcon), mtq.FP8_DEFAULT_CFG)
name = "transformer.h.0.mlp.dense_h_to_4h"
dtype, has_scale = tensors[f"{name}.weight"].dtype, f"{name}.weight_scale" in tensors
print(f"falcon: quant_algo {config['quant_algo']}, ignore {config['ignore']}")
print(f"falcon: {name}.weight has type {dtype}; a scale: {has_scale}")
assert name not in config["ignore"], "Falcon's linears are ignored: changed"
assert dtype == torch.float32 and not has_scale, "Falcon's linears are packed: changed"

config = transformers.DeepseekV4Config(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=8,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    index_n_heads=2,
    index_head_dim=16,
    hc_mult=2,
)
transformers.DeepseekV4ForCausalLM(config).save_pretrained(f"{sys.argv[1]}/own")
model = transformers.DeepseekV4ForCausalLM.from_pretrained(f"{sys.argv[1]}/own")
entries = [{"quantizer_name": "*", "enable": False}]
entries += [
    {"quantizer_name": f"lm_head.{kind}_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
    for kind in ("weight", "input")
]
tensors, _ = exported(model, {"quant_cfg": entries, "algorithm": "max"})
head = sorted(name for name in tensors if name.startswith(("head.", "lm_head.")))
print("deepseek_v4:", ", ".join(head))
assert head == ["head.weight", "lm_head.input_scale", "lm_head.weight_scale"], "the head: changed"
PYTHON
