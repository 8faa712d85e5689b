"""Metadata of GGUF files beside rotary embeddings: logits of the model that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import refusal, run
from gguf_files import random_llama, write_family, write_llama

from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ATTENTION = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
}
APART = {
    **ATTENTION,
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    **{f"self_attn.{name}_norm": f"attn_{name}_norm" for name in "qk"},
}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_exps+ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
PHI3 = {
    **ATTENTION,
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def require_same(file: Path, twin: Any) -> None:
    """The loaded file's logits, on a sample that is longer than a window, are those of the twin."""
    loaded = load_model(find_model(str(file)), dtype="float32", device="cpu")
    tokens = torch.arange(200)[None]
    with torch.no_grad():
        expected, logits = twin(tokens).logits, loaded(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_window_is_that_of_the_file(tmp_path: Path) -> None:
    # The family's padding token, which it takes without one in the file, is 32000.
    sizes = SIZES | {"vocab_size": 32064}
    model = model_of(transformers.Phi3Config(**sizes, sliding_window=16))
    metadata = {"attention.sliding_window": 16, "rope.dimension_count": 16}
    require_same(write_family(tmp_path / "x.gguf", model, "phi3", metadata, PHI3), model)


def test_sizes_of_heads_and_experts_are_those_of_the_file(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **SIZES,
        head_dim=32,
        moe_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    metadata = {
        "attention.key_length": 32,
        "attention.value_length": 32,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 40,
    }
    model, names = model_of(config), APART | EXPERTS
    require_same(write_family(tmp_path / "x.gguf", model, "qwen3moe", metadata, names), model)


def test_size_of_heads_of_a_dense_model_is_that_of_the_file(tmp_path: Path) -> None:
    model = model_of(transformers.Qwen3Config(**SIZES, head_dim=32))
    names = APART | {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    metadata = {"attention.key_length": 32, "attention.value_length": 32}
    require_same(write_family(tmp_path / "x.gguf", model, "qwen3", metadata, names), model)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"llama.expert_count": 8}, "expert_count is 8, which llama of transformers"),
        ({"llama.logit_scale": 0.25}, "logit_scale is 0.25"),
        ({"llama.residual_scale": 0.25}, "residual_scale is 0.25"),
        ({"llama.embedding_scale": 12.0}, "embedding_scale is 12.0"),
        ({"llama.attention.scale": 0.25}, "attention.scale is 0.25"),
        ({"llama.attention.sliding_window": 16}, "attention.sliding_window is 16"),
        ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"llama.attention.causal": 0}, "attention.causal is 0"),
        ({"split.no": 0, "split.count": 2}, "part 1 of 2 of a GGUF model"),
    ],
)
def test_what_the_family_does_not_have_is_refused_by_plan(
    metadata: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = write_llama(tmp_path / "x.gguf", random_llama(), metadata)
    assert says in refusal(run("plan", file))


def test_values_that_say_nothing_are_fine(tmp_path: Path) -> None:
    model = random_llama()
    scale = model.config.head_dim**-0.5
    metadata = {"logit_scale": 1.0, "expert_count": 0, "attention.scale": scale}
    metadata |= {"attention.key_length": 32, "attention.sliding_window": 256}
    named = {f"llama.{name}": value for name, value in metadata.items()}
    require_same(write_llama(tmp_path / "x.gguf", model, named), model)


def test_tensors_that_transformers_skips_are_refused(tmp_path: Path) -> None:
    tensors = {f"blk.{layer}.attn_q_norm.weight": [2.0] * 32 for layer in range(2)}
    file = write_llama(tmp_path / "x.gguf", random_llama(), tensors=tensors)
    assert "holds 64 more numbers than the llama that transformers" in refusal(run("plan", file))


def test_damaged_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "x.gguf", random_llama())
    file.write_bytes(file.read_bytes()[:-1000])
    assert "get the GGUF file anew" in refusal(run("plan", file))


def test_weights_of_other_shapes_are_refused_in_a_line(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "x.gguf", random_llama(), {"llama.vocab_size": 300})
    with pytest.raises(Exception, match=r"have other shapes than its config says") as caught:
        load_model(find_model(str(file)), dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)
