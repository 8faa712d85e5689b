"""Small random models, a word tokenizer and random samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

VOCABULARY = 256
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

IMAGE_TOKENS = {
    "image_token_id": 250,
    "video_token_id": 249,
    "vision_start_token_id": 251,
    "vision_end_token_id": 252,
}


def small_config(family: str) -> Any:
    """Config of a small random model, by family."""
    if family == "llama":
        return transformers.LlamaConfig(**DECODER, tie_word_embeddings=False)
    if family == "qwen3":
        return transformers.Qwen3Config(**DECODER, tie_word_embeddings=True)
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **DECODER,
            tie_word_embeddings=False,
            moe_intermediate_size=48,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
        )
    if family == "falcon":  # adds to a linear's output in place
        return transformers.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    if family == "gemma3n":  # layers share keys and values, and take inputs of their own
        return transformers.Gemma3nTextConfig(
            **(DECODER | {"num_hidden_layers": 4, "intermediate_size": [160] * 4}),
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
            tie_word_embeddings=True,
        )
    if family == "qwen2_5_vl":
        text = DECODER | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
        vision = VISION | {"fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, **IMAGE_TOKENS
        )
    assert family == "qwen3_vl"
    text = DECODER | {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
    vision = VISION | {"deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **IMAGE_TOKENS
    )


def small_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A small random model in float32, evaluation mode."""
    torch.manual_seed(seed)
    config = small_config(family)
    is_vision = family.endswith("_vl")
    auto = (
        transformers.AutoModelForImageTextToText if is_vision else transformers.AutoModelForCausalLM
    )
    model: torch.nn.Module = auto.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def random_samples(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token ids of the given lengths."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, size=length).tolist() for length in lengths]


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word tokenizer: the token of the word ``w17`` is 17."""
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
