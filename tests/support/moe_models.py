"""Small random mixtures of experts, in the form of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

LINEARS = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    "mixtral": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "qwen3_5_moe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}
"""Family -> what holds the experts in its files, what is gate and up there, and what is down."""
_DECODER: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}


def moe_config(family: str, num_layers: int = 2) -> Any:
    """Config of a small model whose shapes vLLM's kernels on GPUs take."""
    sizes = _DECODER | {"num_hidden_layers": num_layers}
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **sizes, intermediate_size=96, moe_intermediate_size=64, num_experts=4
        )
    if family == "qwen3_5_moe":
        return transformers.Qwen3_5MoeTextConfig(
            **sizes,
            moe_intermediate_size=64,
            num_experts=4,
            shared_expert_intermediate_size=64,
            layer_types=["full_attention"] * num_layers,
        )
    if family == "deepseek_v3":
        del sizes["head_dim"]
        return transformers.DeepseekV3Config(
            **(sizes | {"num_key_value_heads": 4}),
            intermediate_size=96,
            moe_intermediate_size=64,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            topk_method="noaux_tc",
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
        )
    kinds = {"mixtral": transformers.MixtralConfig, "gpt_oss": transformers.GptOssConfig}
    return kinds[family](**sizes, intermediate_size=64, num_local_experts=4)


def write_moe(folder: Path, family: str, num_layers: int = 2) -> Path:
    """Write such a model in bfloat16."""
    torch.manual_seed(0)
    config = moe_config(family, num_layers)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder
