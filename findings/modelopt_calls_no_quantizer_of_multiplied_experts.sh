#!/bin/sh
# ModelOpt takes experts for its own by the shapes of their weights, and quantizes none of them where
# their code does not call torch.nn.functional.linear.
#
# Packages: nvidia-modelopt 0.48.0rc1, transformers 5.18.0 (torch 2.13.0), seen 2026-11-30.
# Expected: `mtq.quantize` with a config that quantizes a model's experts changes what the model gives,
#   and leaves each enabled quantizer with a calibrated maximum, or says that it cannot.
# Seen: Aria's experts multiply by `@` in transformers 5.18. ModelOpt says "Detected fused MoE experts",
#   puts quantizers of 4 bits on every expert, and calls none: the logits are bit for bit those before,
#   and the quantizers of inputs have no maximum. Qwen3-MoE's, which call it, change the logits.
# Prints both; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports requests and does not require it.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 nvidia-modelopt==0.48.0rc1 transformers==5.18.0 requests==2.34.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import modelopt
import modelopt.torch.quantization as mtq
import torch
import transformers

print("nvidia-modelopt", modelopt.__version__, "transformers", transformers.__version__)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
CONFIGS = {
    "aria_text": transformers.AriaTextConfig(
        **SIZES, intermediate_size=32, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
}
ENTRIES = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*mlp.experts*weight_quantizer*", "cfg": {"num_bits": 4, "axis": None}},
    {"quantizer_name": "*mlp.experts*input_quantizer*", "cfg": {"num_bits": 8, "axis": None}},
]
ids = torch.arange(1, 33)[None]
changed = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        mtq.quantize(model, {"quant_cfg": ENTRIES, "algorithm": "max"}, lambda m: m(ids))
        changed[name] = float((model(ids, use_cache=False).logits - before).abs().max())
    inputs = [m for n, m in model.named_modules() if n.endswith("experts.down_proj_input_quantizer")]
    enabled = [m for m in inputs if m.is_enabled]
    calibrated = sum(getattr(m, "amax", None) is not None for m in enabled)
    print(
        f"{name}: largest change of a logit {changed[name]:.3g}; {len(enabled)} quantizer of inputs "
        f"enabled, {calibrated} with a maximum"
    )
assert changed["qwen3_moe"] > 0.01, "Qwen3-MoE's experts are not quantized: changed"
assert changed["aria_text"] == 0.0, "Aria's experts are quantized: changed"
PYTHON
