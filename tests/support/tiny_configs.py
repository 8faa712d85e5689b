"""A small config of any family that the installed transformers knows, from the family's defaults.

A config's fields are read for what they mean by their names: a width, a depth, a number of heads,
a token. What a family needs beside that, because its fields depend on each other, is a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VOCABULARY = 256
TEXT_TOKENS = 200
"""Ids below it stand for no image, audio or end of a text."""

_SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd dim model_dim embed_dim hidden_dim embedding_size"
    " projection_dim word_embed_proj_dim embedding_dim out_hidden_size text_hidden_size"
    " attention_hidden_size"
    " vision_feature_dim projector_hidden_size lm_hidden_size query_dim output_dim proj_dim"
    " cross_attention_hidden_size connector_hidden_size",
    96: "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"
    " intermediate_size_mlp feed_forward_size mlp_hidden_size dense_intermediate_size block_ff_dim"
    " dff feed_forward_length dim_ff",
    48: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
    " moe_shared_expert_intermediate_size expert_ffn_hidden_size moe_latent_size"
    " expert_intermediate_size shared_expert_intermediate",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers depth"
    " num_decoder_layers num_encoder_layers encoder_num_layers num_blocks"
    " num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads n_kv_heads"
    " num_global_key_value_heads linear_num_key_heads"
    " num_experts_per_tok num_experts_per_token moe_k moe_topk num_selected_experts"
    " experts_per_token moe_top_k top_k_experts",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads"
    " decoder_attention_heads attention_heads num_query_heads encoder_num_heads index_n_heads"
    " swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts"
    " num_moe_experts n_experts num_routed_experts mamba_n_heads mamba_num_heads"
    " linear_num_value_heads n_mamba_heads",
    16: "head_dim attention_head_dim d_kv kv_channels global_head_dim swa_head_dim index_head_dim"
    " v_head_dim swa_v_head_dim qk_nope_head_dim query_pre_attn_scalar attention_value_channels"
    " mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size d_state"
    " hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim",
    8: "qk_rope_head_dim sliding_window attention_window_size local_attention_window window_size"
    " attention_chunk_size sliding_window_size",
    32: "base_channels q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace"
    " moe_num_shared_experts mamba_n_groups n_groups mamba_ngroups num_nextn_predict_layers"
    " mtp_num_hidden_layers",
    VOCABULARY: "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size"
    " decoder_vocab_size text_vocab_size n_words"
    " max_position_embeddings n_positions max_seq_len max_sequence_length max_source_positions"
    " max_target_positions n_ctx seq_length original_max_position_embeddings",
    56: "image_size crop_size input_size",
    14: "patch_size",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_SPREAD = ("initializer_range", "init_std")
_PER_LAYER = _words(
    "num_attention_heads_per_layer layers_block_type mlp_layer_types no_rope_layers moe_layers"
    " mlp_only_layers full_attn_idxs attn_layer_indices hybrid_override_pattern hybrid_layer_ids"
    " compress_ratios block_types attention_types attention_layers indexer_types moe_layer_freq"
    " first_kv_shared_layer_idx activation_sparsity_pattern hybrid_layer_pattern per_layer_config"
)
"""Lists that the default makes for its own number of layers."""
_NOT_CARRIED = _words(
    "architectures chunk_size_feed_forward dtype id2label is_encoder_decoder label2id model_type"
    " output_attentions output_hidden_states problem_type qk_head_dim return_dict rope_scaling"
    " torch_dtype transformers_version"
)
"""What every config has, and what is derived from others."""
_SPECIAL = {"bos_token_id": 251, "eos_token_id": 252, "pad_token_id": 0}

_THREE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_HALF_AXES = _THREE_AXES | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_UNEVEN_AXES = _THREE_AXES | {"mrope_section": [3, 3, 2]}
_LATENT_ATTENTION = _words(
    "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash youtu kimi_k25"
    " minicpm3 mistral4 axk1 axk2 glm5_next kimi_linear"
)
"""Every head has its keys, and their width is made of two others."""
_NO_IMAGE_TOKENS = {"<image>": 249}
_WITHOUT_KERNELS = {"use_mamba_kernels": False}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_CHANGES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _THREE_AXES}},
    "cosmos3_edge_text": {"rope_parameters": _UNEVEN_AXES},
    "glm5_next": {"qk_rope_head_dim": 0},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 64, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64}
    | {"hc_lowrank": 16, "split_ngram_parts": 2},
    "step3p5": {"sliding_window": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": _THREE_AXES}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": _NO_IMAGE_TOKENS},
    "emu3": {"vocabulary_map": _NO_IMAGE_TOKENS},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"d_head": 16},
    "xlm": {"emb_dim": 64},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "decoder_config": {"hidden_size_global": 64},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}}
    | {"ffn_config": {"ffn_hidden_size": 64}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]}
        | {"num_experts_per_tok": 2, "topk_method": "greedy"}
    },
    "florence2": {"vision_config": {"num_groups": [4, 4], "depths": [1, 1]}},
    "granite4_vision": {"text_config": {"model_type": "granite"}, "deepstack_layer_map": []}
    | {"downsample_rate": "2/4", "spatial_target_layers": [0, 0, 1, 1]},
    "zamba": {"layer_types": _HYBRID, "num_hidden_layers": 4, "attention_head_dim": 32}
    | {"attention_hidden_size": 128}
    | _WITHOUT_KERNELS,
    "jamba": _WITHOUT_KERNELS,
    "ernie4_5_vl_moe": {"text_config": {"head_dim": 16, "rope_parameters": _UNEVEN_AXES}},
    "llama4": {"vision_config": {"vision_output_dim": 64, "projector_input_dim": 64}},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "zaya": {"num_experts_per_tok": 1},
    "minimax": {"block_size": 16},
    "mistral4": {"qk_nope_head_dim": 8},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "qwen2_vl": {"text_config": {"rope_parameters": _THREE_AXES}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _THREE_AXES}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _THREE_AXES}},
    "glm4v": {"text_config": {"rope_parameters": _HALF_AXES}},
    "glm4v_moe": {"text_config": {"rope_parameters": _HALF_AXES}},
    "glm46v": {"text_config": {"rope_parameters": _HALF_AXES}},
    "glm_ocr": {"text_config": {"rope_parameters": _HALF_AXES}},
    "glmga": {"text_config": {"rope_parameters": _HALF_AXES}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _THREE_AXES}},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8}
    | {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": [96] * 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "layer_types": _HYBRID,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_headdim": 32,
        "adapter_rank": 8,
        "use_shared_attention_adapter": True,
    },
}
"""Family, also inside of another -> fields that must fit together."""


def tiny_config(kind: type[Any]) -> Any:
    """A small config.

    Args:
        kind: Class of the config.
    """
    return kind(**_fields(kind, _next_tokens()))


def _next_tokens() -> Iterator[int]:
    """Ids of special tokens, all above those of plain text."""
    return iter(range(249, TEXT_TOKENS, -1))


def _fields(kind: type[Any], tokens: Iterator[int]) -> dict[str, Any]:
    default = kind()
    fields: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in _PER_LAYER or name in _NOT_CARRIED or name.startswith("_"):
            continue
        part = default.__dict__.get(name)
        if isinstance(part, transformers.PreTrainedConfig):
            fields[name] = _fields(type(part), tokens) | {"model_type": part.model_type}
        elif isinstance(value, Mapping) and name.endswith("_config"):
            fields[name] = {key: _small(key, part, tokens) for key, part in value.items()}
        else:
            fields[name] = _small(name, value, tokens)
    _shorten_layer_types(fields)
    return _with_changes(kind.model_type, fields)


def _small(name: str, value: Any, tokens: Iterator[int]) -> Any:
    """A field's value in a small model."""
    if name in _SPECIAL:
        return _SPECIAL[name] if isinstance(value, int) else None
    if name.endswith(("token_id", "token_index", "token_idx")):
        return next(tokens) if isinstance(value, int) else value
    if "drop" in name and isinstance(value, float):  # ModelOpt scores some families in training
        return 0.0
    if name in _SPREAD and isinstance(value, float):
        return 0.2
    size = _SIZE_OF.get(name)
    if size is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return size
    is_list = isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
    return [size] * min(2, len(value)) if is_list and value else value


def _shorten_layer_types(fields: dict[str, Any]) -> None:
    """One layer of each kind, two at least."""
    kinds = list(dict.fromkeys(fields.get("layer_types") or ()))
    if not kinds:
        fields.pop("layer_types", None)
        return
    fields["layer_types"] = kinds + kinds[-1:] * (2 - len(kinds))
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in fields:
            fields[name] = len(fields["layer_types"])


def _with_changes(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    if family.removesuffix("_text") in _LATENT_ATTENTION:
        fields.pop("head_dim", None)
        if "num_key_value_heads" in fields:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name, value in _CHANGES.get(family, {}).items():
        before = fields.get(name)
        fields[name] = (
            before | value if isinstance(before, dict) and name[-7:] == "_config" else value
        )
    return fields
