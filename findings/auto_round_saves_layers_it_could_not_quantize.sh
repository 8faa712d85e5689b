#!/bin/sh
# AutoRound without iterations saves layers in 16 bits which its config says are quantized.
#
# Packages: auto-round 0.16.1 (torch 2.13.0, transformers 5.14.1), seen 2026-11-30.
# Expected: `AutoRound(folder, layer_config=..., iters=0, disable_opt_rtn=True)` quantizes each layer as
#   its entry says, as it does with `disable_model_free=True`, or raises an error.
# Seen: it takes another path ("model-free"), which cannot do 8 bits per channel (a group size of -1) nor
#   3 bits: a warning for each, the weights stay as they are, the call ends well, and `extra_config` of the
#   saved config still says 8 and 3 bits. On the other path the tensors are those of the config.
# Prints what was saved; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    auto-round==0.16.1 torch==2.13.0 transformers==5.14.1
cd "$folder"
cat > saved.py <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors import safe_open

LAYER = "model.layers.0."
ENTRIES = {
    "self_attn.q_proj": {"bits": 4, "group_size": 64, "sym": True, "data_type": "int"},
    "self_attn.o_proj": {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"},
    "mlp.down_proj": {"bits": 3, "group_size": 64, "sym": True, "data_type": "int"},
}
OTHERS = ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def make_model():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained("model")
    words = {f"w{number}": number for number in range(64)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained("model")


def saved(is_model_free):
    """Layer -> whether its weights are packed, and the bits that the saved config says."""
    from auto_round import AutoRound

    layers = {LAYER + name: dict(entry) for name, entry in ENTRIES.items()}
    layers |= {LAYER + name: {"bits": 16} for name in OTHERS}
    rounding = AutoRound(
        "model", layer_config=layers, iters=0, disable_opt_rtn=True, device_map="cpu",
        disable_model_free=not is_model_free, enable_torch_compile=False,
    )
    out = f"out-{is_model_free}"
    rounding.quantize_and_save(out, format="auto_round")
    (file,) = Path(out).rglob("model.safetensors")
    names = set(safe_open(file, "pt").keys())
    config = json.loads(file.with_name("config.json").read_text())["quantization_config"]
    return {
        name: (
            f"{LAYER}{name}.qweight" in names,
            config["extra_config"].get(LAYER + name, {}).get("bits", config["bits"]),
        )
        for name in ENTRIES
    }


if __name__ == "__main__":
    make_model()
    free, regular = saved(True), saved(False)
    print("auto-round", version("auto-round"))
    for name in ENTRIES:
        print(f"{name}: (packed, bits of the config) model-free {free[name]}, otherwise {regular[name]}")
    assert all(packed for packed, _ in regular.values()), "not all are quantized otherwise: changed"
    assert {name: bits for name, (_, bits) in free.items()} == {
        name: entry["bits"] for name, entry in ENTRIES.items()
    }, "the config says otherwise: changed"
    packed = {name for name, (is_packed, _) in free.items() if is_packed}
    assert packed == {"self_attn.q_proj"}, "8 bits per channel or 3 bits are quantized: changed"
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python -W ignore saved.py 2> log || { tail -20 log; exit 1; }
