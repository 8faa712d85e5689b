#!/bin/sh
# mlx-lm 0.32.2 quantizes experts that it cannot run with the mlx that it asks for, 0.32.2.
#
# Packages: mlx-lm 0.32.2, mlx 0.32.2 and 0.32.4 on CPU, seen 2026-11-30.
# Expected: mlx-lm 0.32.2, which asks for mlx 0.32.2 or later (on macOS), runs a model with experts whether these are quantized or
#   not. It can give each expert's weight a scale with nvfp4 (`global_scale`), which runs as well.
# Seen: with mlx 0.32.2 the model is quantized, and its first call ends in a TypeError: `gather_qmm` has no argument
#   `global_scale`. With mlx 0.32.4 it runs; with a scale of each expert it stops on a CPU: "Global scale is
#   only supported on the GPU".
# Prints what a call gives; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/calls.py" <<'PYTHON'
import sys
from importlib.metadata import requires, version

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_moe import Model, ModelArgs
from mlx_lm.utils import quantize_model

mx.set_default_device(mx.cpu)
ARGS = ModelArgs(
    model_type="qwen3_moe", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=64,
    rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=2, head_dim=32, rope_theta=1e4,
    tie_word_embeddings=False, max_position_embeddings=64, norm_topk_prob=True,
)


def called(entry):
    """What the first call of a model gives whose experts alone are quantized; None: 16-bit ones."""
    mx.random.seed(0)
    model = Model(ARGS)
    if entry:
        model, _ = quantize_model(
            model, {}, group_size=16, bits=4, quant_predicate=lambda path, _: entry if "switch_mlp" in path else False
        )
    try:
        logits = model(mx.arange(8)[None])
        mx.eval(logits)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"logits up to {float(mx.abs(logits).max()):.3f}"


AFFINE, NVFP4 = {"group_size": 64, "bits": 8, "mode": "affine"}, {"group_size": 16, "bits": 4, "mode": "nvfp4"}
print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"), [r for r in requires("mlx-lm") if r.startswith("mlx")][0])
plain, affine, nvfp4, scaled = map(called, (None, AFFINE, NVFP4, {**NVFP4, "global_scale": True}))
print("16 bits:               ", plain)
print("int8:                  ", affine)
print("nvfp4:                 ", nvfp4)
print("nvfp4, a scale of each:", scaled)
assert plain.startswith("logits"), "experts in 16 bits: changed"
if version("mlx") == "0.32.2":
    assert all("TypeError: gather_qmm()" in said for said in (affine, nvfp4, scaled)), "0.32.2 runs them: changed"
else:
    assert affine.startswith("logits") and nvfp4.startswith("logits"), "0.32.4 does not run them: changed"
    assert "only supported on the GPU" in scaled, "a scale of each expert runs on a CPU: changed"
PYTHON
for release in 0.32.2 0.32.4; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$release" mlx-lm==0.32.2
    "$folder/venv/bin/python" -W ignore "$folder/calls.py"
done
