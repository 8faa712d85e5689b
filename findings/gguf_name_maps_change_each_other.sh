#!/bin/sh
# gguf: asking for the tensor names of one architecture changes those of all others in the process.
#
# Packages: gguf 0.19.0, transformers 5.14.1, torch 2.13.0, seen 2026-11-30.
# Expected: `gguf.get_tensor_name_map(arch, blocks)` is a look-up; what it gives for "llama" does not depend
#   on what was asked before.
# Seen: the map of "arctic" writes its names into a table of the class that all later maps are read from, so
#   that "llama" has no tensor for `post_attention_layernorm` any more. transformers asks the same table:
#   a Llama GGUF file that loaded right before is loaded afterwards with these norms left at their initial
#   ones, without an error. A program that looks through all architectures (to name a tensor) does that.
# Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 transformers==5.14.1 \
    torch==2.13.0 accelerate
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import gguf
import numpy as np
import torch
import transformers

writer = gguf.GGUFWriter("llama.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_vocab_size(16)
numbers = np.random.default_rng(0)
shapes = {
    "token_embd": (16, 32), "output_norm": (32,), "output": (16, 32), "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32),
    "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", numbers.standard_normal(shape, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def name_of_norm():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    return names.get_name("model.layers.0.post_attention_layernorm")


def load():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        ".", gguf_file="llama.gguf", output_loading_info=True
    )
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits, sorted(info["missing_keys"])


print("gguf 0.19.0, transformers", transformers.__version__)
logits, missing = load()
print("before: Llama's norm is", name_of_norm(), "; missing after loading:", missing)
gguf.get_tensor_name_map(gguf.MODEL_ARCH.ARCTIC, 1)
later, missing_later = load()
print("after asking for arctic:", name_of_norm(), "; missing after loading:", missing_later)
print("largest change of a logit of the same file:", float((later - logits).abs().max()))
assert missing == [] and len(missing_later) == 1, "changed"
assert name_of_norm() is None and not torch.equal(later, logits), "changed"
PYTHON
