#!/bin/sh
# mlx-lm leaves layers in 16 bits, without a word, that a predicate names or would name.
#
# Package: mlx-lm 0.32.2 (mlx 0.32.2 on CPU), seen 2026-11-29.
# Expected: `mlx_lm.utils.quantize_model(..., quant_predicate=f)` asks `f` for every layer with a weight
#   matrix, under the names of the checkpoint: `lm_head` among them, tied or not; parameters that `f` returns
#   for a layer, such as a group size of 32, are those that the layer is tried with.
# Seen: a model whose head is tied is asked for `model.embed_tokens` and never for `lm_head`; a layer whose
#   rows the *default* group size (64) does not divide is not asked for, so the 32 that would fit is never heard.
# Prints the names that are asked for; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.2' mlx-lm==0.32.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import quantize_model


def layers_asked(is_tied, **arguments):
    """Names that the predicate sees, which gives every layer groups of 32."""
    asked = set()

    def choose(path, module):
        asked.add(path)
        return {"group_size": 32, "bits": 4, "mode": "affine"}

    args = ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=1, intermediate_size=96,
        num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=64, tie_word_embeddings=is_tied,
    )
    model, _ = quantize_model(Model(args), {}, bits=4, quant_predicate=choose, **arguments)
    return asked, model


print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))
tied, _ = layers_asked(True, group_size=32)
untied, _ = layers_asked(False, group_size=32)
default, model = layers_asked(False, group_size=None)
down = "model.layers.0.mlp.down_proj"
print("tied, asked for:  ", sorted(name for name in tied if "layers" not in name))
print("untied, asked for:", sorted(name for name in untied if "layers" not in name))
print("rows of 96 weights, groups of 32 by default:", down in untied)
print("rows of 96 weights, no default given:       ", down in default, type(model.model.layers[0].mlp.down_proj))
assert "lm_head" not in tied and "model.embed_tokens" in tied, "a tied head is asked for: changed"
assert {"lm_head", "model.embed_tokens"} <= untied, "an untied head is not asked for: changed"
assert down in untied and down not in default, "layers of another group size are asked for: changed"
PYTHON
