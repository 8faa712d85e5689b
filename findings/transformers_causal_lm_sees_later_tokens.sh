#!/bin/sh
# Models of AutoModelForCausalLM whose answer for a token depends on the tokens after it.
#
# Packages: transformers 5.14.1, torch 2.13.0, seen 2026-11-29.
# Expected: what a class of `AutoModelForCausalLM` answers at a position depends on the tokens up to it,
#   under every attention; and a text without images is a text like any other to PaliGemma.
# Seen: Doge under sdpa, the default, is given no mask for samples without padding, and makes of that a
#   mask that hides nothing: it sees all later tokens (under eager it does not). CPM-Ant takes every
#   token for context, which sees everything. PaliGemma without `token_type_ids` sees everything.
# A loss on text of such a model is finite, far too low, and says nothing of how it writes.
# Prints how far the answers for the same eight tokens are apart; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.14.1 torch==2.13.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import torch
import transformers

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
GEMMA = SIZES | {"head_dim": 16, "model_type": "gemma"}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
NO_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def difference(config, attention="sdpa"):
    torch.manual_seed(0)
    with_images = type(config) in transformers.AutoModelForImageTextToText._model_mapping
    auto = transformers.AutoModelForImageTextToText if with_images else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    begin, ends = [5, 6, 7, 8, 9, 10, 11, 12], ([13, 14, 15, 16], [23, 24, 25, 26])
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.tensor([begin + end]), use_cache=False).logits[0, :8] for end in ends
        )
    return float((first - second).norm() / first.norm())


paligemma = transformers.PaliGemmaConfig(
    text_config=GEMMA, vision_config=VISION, image_token_index=127, projection_dim=64
)
cpmant = transformers.CpmAntConfig(
    vocab_size=128, hidden_size=64, dim_head=16, num_attention_heads=4, dim_ff=96, num_hidden_layers=2,
    prompt_length=4,
)
doge = transformers.DogeConfig(**SIZES, **NO_IDS)
print("transformers", transformers.__version__, "torch", torch.__version__)
seen = {
    "Llama, sdpa": difference(transformers.LlamaConfig(**SIZES, **NO_IDS)),
    "Doge, sdpa": difference(doge),
    "Doge, eager": difference(doge, "eager"),
    "CPM-Ant": difference(cpmant, "eager"),
    "PaliGemma": difference(paligemma),
}
for name, value in seen.items():
    print(f"{name:12} answers for the same 8 tokens before other endings differ by {value:.1%}")
assert seen["Llama, sdpa"] < 1e-5, "the reference is not causal"
for name in ("Doge, sdpa", "CPM-Ant", "PaliGemma"):
    assert seen[name] > 0.01, f"{name} is causal: changed"
assert seen["Doge, eager"] < 1e-5, "Doge under eager is not causal either: changed"
PYTHON
