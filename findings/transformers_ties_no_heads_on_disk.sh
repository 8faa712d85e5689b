#!/bin/sh
# transformers does not tie a head that was saved twice when weights stay on disk, and says nothing.
#
# Packages: transformers 5.14.1 (torch 2.13.0, accelerate 1.15.0), seen 2026-11-30.
# Expected: of a checkpoint whose config ties the head, and whose files hold the same weight for the head and for the
#   embedding, both are one parameter, wherever `device_map` puts them. That is so on a CPU: equal weights are tied,
#   different ones are kept with a warning.
# Seen: with `device_map={"": "disk"}` the weights are on the meta device and are not compared. Head and embedding are
#   two parameters, without a warning, though the config still ties them.
# Prints for each place whether the head is tied and whether a warning came; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.14.1 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import contextlib
import io
import logging

import torch
import transformers
from safetensors.torch import load_file, save_file

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True,
)
torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained("model")
tensors = load_file("model/model.safetensors")
assert "lm_head.weight" not in tensors
tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})

seen = {}
for place in ("cpu", "disk"):
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("transformers").addHandler(handler)
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            "model", device_map={"": place}, offload_folder="offloaded"
        )
    logging.getLogger("transformers").removeHandler(handler)
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    seen[place] = is_tied, "tie" in log.getvalue(), model.config.tie_word_embeddings
    print(f"on {place}: tied {is_tied}, warned {seen[place][1]}, the config ties {seen[place][2]}")
assert seen == {"cpu": (True, False, True), "disk": (False, False, True)}, seen
PYTHON
