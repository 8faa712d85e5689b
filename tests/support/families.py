"""Model families that are tested: a small random model of each, from its transformers config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 256
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_UNGROUPED = {"n_group": 1, "topk_group": 1}  # all experts compete
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


def _decoder(name: str, **changes: Any) -> Any:
    return getattr(transformers, name)(**(_DECODER | changes))


def _with_vision(name: str, text: dict[str, Any], vision: dict[str, Any], **changes: Any) -> Any:
    decoder = {key: value for key, value in _DECODER.items() if key != "tie_word_embeddings"}
    return getattr(transformers, name)(
        text_config=decoder | text, vision_config=vision, tie_word_embeddings=False, **changes
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: _decoder("LlamaConfig"),
    "Qwen2": lambda: _decoder("Qwen2Config"),
    "Qwen3": lambda: _decoder("Qwen3Config", **_HEADS, tie_word_embeddings=True),
    "Qwen3-MoE": lambda: _decoder("Qwen3MoeConfig", **_HEADS, **_EXPERTS),
    "Qwen3-Next": lambda: _decoder(
        "Qwen3NextConfig",
        **_HEADS,
        **_EXPERTS,
        **_LINEAR_ATTENTION,
        shared_expert_intermediate_size=48,
    ),
    "Qwen3.5": lambda: _with_vision(
        "Qwen3_5Config", _HEADS | _LINEAR_ATTENTION, _VISION | {"num_position_embeddings": 16}
    ),
    "Mixtral": lambda: _decoder("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "GPT-OSS": lambda: _decoder(
        "GptOssConfig",
        **_HEADS,
        **_SLIDING,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "DeepSeek-V3": lambda: _decoder(
        "DeepseekV3Config",
        **_ROUTED,
        **_UNGROUPED,
        num_key_value_heads=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "DeepSeek-V4": lambda: _decoder(
        "DeepseekV4Config",
        **_ROUTED,
        num_key_value_heads=1,
        n_shared_experts=1,
        head_dim=16,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        o_lora_rank=8,
        o_groups=2,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=8,
        num_nextn_predict_layers=0,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    ),
    "Gemma-3": lambda: _with_vision(
        "Gemma3Config",
        _HEADS | _SLIDING | {"query_pre_attn_scalar": 16},
        _SIGLIP,
        mm_tokens_per_image=4,
    ),
    "Phi-3": lambda: _decoder("Phi3Config"),
    "Nemotron-H": lambda: _decoder(
        "NemotronHConfig",
        **_HEADS,
        **_ROUTED,
        **_UNGROUPED,
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "moe", "mlp"],
        moe_shared_expert_intermediate_size=48,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        use_mamba_kernels=False,
    ),
    "Mamba-2": lambda: transformers.Mamba2Config(
        **{
            key: _DECODER[key]
            for key in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "initializer_range",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
                "tie_word_embeddings",
            )
        },
        num_heads=4,
        head_dim=32,
        state_size=16,
        n_groups=2,
        chunk_size=16,
    ),
    "Qwen2.5-VL": lambda: _with_vision(
        "Qwen2_5_VLConfig",
        {"rope_parameters": _MROPE},
        _VISION | {"fullatt_block_indexes": [1], "window_size": 56},
    ),
    "Qwen3-VL": lambda: _with_vision(
        "Qwen3VLConfig",
        _HEADS | {"rope_parameters": _MROPE},
        _VISION | {"deepstack_visual_indexes": [0]},
    ),
    "Qwen3-VL-MoE": lambda: _with_vision(
        "Qwen3VLMoeConfig",
        _HEADS | _EXPERTS | {"rope_parameters": _MROPE},
        _VISION | {"deepstack_visual_indexes": [0]},
    ),
    "Llama-4": lambda: _with_vision(
        "Llama4Config",
        _HEADS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 1,
        },
        _SIGLIP | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "Mistral-3": lambda: _with_vision(
        "Mistral3Config", _HEADS | {"model_type": "mistral"}, _SIGLIP | {"model_type": "pixtral"}
    ),
    "GLM-4.5": lambda: _decoder(
        "Glm4MoeConfig",
        **_HEADS,
        **_ROUTED,
        **_UNGROUPED,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "MiniMax-M2": lambda: _decoder(
        "MiniMaxM2Config", **_HEADS, num_local_experts=4, num_experts_per_tok=2
    ),
    "Granite-4": lambda: _decoder(
        "GraniteMoeHybridConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=16,
    ),
    "Gemma-3n": lambda: transformers.Gemma3nTextConfig(
        **(_DECODER | _HEADS | {"num_hidden_layers": 4, "intermediate_size": [96] * 4}),
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "GPT-2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "Falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    ),
}
"""Name of the family -> its config."""


def family_model(family: str) -> Any:
    """A random model of a family in float32, evaluation mode; nothing in it is all zeros."""
    config = FAMILIES[family]()
    return random_model(config, sees_images=hasattr(config, "vision_config"))


def random_model(config: Any, *, sees_images: bool) -> Any:
    """The same of a config."""
    auto = transformers.AutoModelForCausalLM
    if sees_images:
        auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # biases, and scales that would hide a module from the loss
            parameter.normal_(std=0.2)
    return model
