"""Small GGUF files, written with the package gguf as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from autoquant_ray.models.find import find_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer

WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(253))]
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a file, as a scan loads it."""
    return load_tokenizer(TokenizerRef.of(find_model(str(file)), ""))


def random_llama(**changes: Any) -> transformers.LlamaForCausalLM:
    """A random Llama of two layers and 256 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        **changes,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def write_llama(
    file: Path,
    model: transformers.LlamaForCausalLM,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Write a Llama, with further metadata of floats, ints and texts, and further tensors."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(number) for number in range(len(WORDS))])
    writer.add_token_types([2, 3, 3, *[1] * (len(WORDS) - 3)])
    for role, number in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{role}_token_id")(number)
    adders = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    for name, value in (metadata or {}).items():
        adders[type(value)](name, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    for name, weight in model.state_dict().items():
        writer.add_tensor(*_as_stored(name, weight.numpy(), config))
    finish(writer)
    return file


def write_family(
    file: Path, model: Any, architecture: str, metadata: Mapping[str, Any], names: Mapping[str, str]
) -> Path:
    """Write a model of another family, whose tensors are stored as transformers has them.

    Args:
        file: Where to.
        model: Of transformers; each layer's experts are stacked.
        architecture: As llama.cpp names it.
        metadata: Name without the architecture -> value, beside the sizes that all have.
        names: Tensor of a layer, without ``.weight`` -> its name in the file.
    """
    config = model.config
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    writer = gguf.GGUFWriter(file, architecture)
    adders = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
    for name, value in {**sizes, **metadata}.items():
        adders[type(value)](f"{architecture}.{name}", value)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in whole:
            writer.add_tensor(f"{whole[stem]}.weight", weight.numpy())
            continue
        _, _, layer, rest = stem.split(".", 3)
        parts = zip(
            names[rest].split("+"),
            np.split(
                weight.numpy(), names[rest].count("+") + 1, axis=-2 if weight.dim() > 1 else 0
            ),
            strict=True,
        )
        for part, values in parts:
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ascontiguousarray(values))
    finish(writer)
    return file


def _as_stored(name: str, weight: Any, config: Any) -> tuple[str, Any]:
    """Name and values of a tensor; rotary halves of query and key stand interleaved."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight", weight
    if name == "model.norm.weight":
        return "output_norm.weight", weight
    if name == "lm_head.weight":
        return "output.weight", weight
    _, _, layer, rest = name.split(".", 3)
    kind = _NAMES[rest.removesuffix(".weight")]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if kind in heads:
        halves = weight.reshape(heads[kind], 2, -1, weight.shape[1])
        weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
    return f"blk.{layer}.{kind}.weight", weight
