#!/bin/sh
# transformers drops the attention biases of a GGUF file of architecture llama, without a word of it.
#
# Packages: transformers 5.14.1, gguf 0.19.0, torch 2.13.0, seen 2026-11-30.
# Expected: a Llama with `attention_bias=True`, written with llama.cpp's names of tensors (`blk.0.attn_q.bias`;
#   llama.cpp reads them where they are there), gives the same logits when it is read again with `gguf_file`.
# Seen: the metadata has no key for biases, so that the config says `attention_bias=False`; the model is built
#   without them, the file's biases are dropped, and the loading report (`output_loading_info`) lists neither
#   missing nor unexpected keys. The logits are finite, plausible and wrong. Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 transformers==5.14.1 \
    torch==2.13.0 accelerate
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import gguf
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)


def write(path, model):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours: the halves of a head interleave
            shape = tensor.shape
            tensor = tensor.reshape(2, 2, 16, *shape[1:]).transpose(1, 2).reshape(shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ids = torch.arange(1, 17)[None]
apart = {}
for has_bias in (False, True):
    config.attention_bias = has_bias
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    write("model.gguf", model)
    held = [t.name for t in gguf.GGUFReader("model.gguf").tensors if t.name.endswith("bias")]
    read, report = transformers.AutoModelForCausalLM.from_pretrained(
        ".", gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        apart[has_bias] = (model(ids).logits - read.eval()(ids).logits).abs().max().item()
    print("biases in the file:", held)
    print("  attention_bias:", read.config.attention_bias, "report:", report)
    print("  logits apart by at most", apart[has_bias])
assert apart[False] < 1e-4, "the file without biases is misread too: the case is not valid"
assert len(held) == 4, "the file holds no biases: the case is not valid"
assert not read.config.attention_bias and apart[True] > 1e-2, "the biases are read: changed"
assert not report["missing_keys"] and not report["unexpected_keys"], "the report names them: changed"
PYTHON
