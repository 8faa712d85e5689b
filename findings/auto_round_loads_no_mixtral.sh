#!/bin/sh
# AutoRound cannot load Mixtral by its default way of loading; with AR_DISABLE_META_LOAD=1 it can.
#
# Packages: auto-round 0.16.1 (torch 2.13.0, transformers 5.14.1), seen 2026-11-30.
# Expected: `AutoRound(folder, iters=0)` quantizes the experts of a Mixtral as it does those of a Qwen3-MoE: both are
#   families of mixtures that transformers loads.
# Seen: Qwen3-MoE is quantized, all linears of its experts packed; Mixtral ends in "Failed to materialize ... checkpoint
#   tensor(s), still on meta: mlp.experts.0.down_proj.weight": its files say `block_sparse_moe.experts.0.w2`. With
#   AR_DISABLE_META_LOAD=1, which the message names, it is quantized too.
# Prints how many linears of experts are packed, or the error; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    auto-round==0.16.1 torch==2.13.0 transformers==5.14.1
cd "$folder"
cat > packed.py <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import tokenizers
import torch
import transformers
from auto_round import AutoRound
from safetensors import safe_open

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, intermediate_size=64, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=96, moe_intermediate_size=64, num_experts=4
    ),
}
INT4 = {"bits": 4, "group_size": 64, "sym": True, "data_type": "int"}


def make_model(family):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.bfloat16).save_pretrained(family)
    words = {f"w{number}": number for number in range(64)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(family)


def outcome(family, out):
    """How many linears of the four experts are packed, or what is raised."""
    rounding = AutoRound(
        family, layer_config={"model.layers.0.mlp.experts": INT4}, iters=0, disable_opt_rtn=True,
        disable_model_free=True, enable_torch_compile=False, device_map="cpu",
    )
    rounding.quantize_and_save(out, format="auto_round")
    (file,) = Path(out).rglob("model*.safetensors")
    names = safe_open(file, "pt").keys()
    return sum("experts" in name and name.endswith("qweight") for name in names)


family, out = sys.argv[1:]
make_model(family)
try:
    result = outcome(family, out)
except RuntimeError as error:
    result = str(error)
print("auto-round", version("auto-round"), family, "packed linears of experts:", str(result)[:120])
sys.exit(0 if result == 12 else 3 if "still on meta: mlp.experts" in str(result) else 1)
PYTHON
export HF_HUB_OFFLINE=1
venv/bin/python -W ignore packed.py qwen3_moe qwen3 2> log || { tail -20 log; exit 1; }
AR_DISABLE_META_LOAD=1 venv/bin/python -W ignore packed.py mixtral apart 2> log || { tail -20 log; exit 1; }
code=0
venv/bin/python -W ignore packed.py mixtral default 2> log || code=$?
test "$code" = 3 || { echo "Mixtral is loaded by default: changed"; tail -5 log; exit 1; }
