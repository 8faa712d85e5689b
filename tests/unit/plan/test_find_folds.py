"""Inputs whose factors can be folded: the folded model gives the same logits, in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from small_models import DECODER, small_model

from autoquant_ray.models.quantizable import quantizable_modules
from autoquant_ray.plan.find_folds import find_folds
from autoquant_ray.plan.fold import NORM, ROWS, SHIFTED_NORM, Fold
from autoquant_ray.plan.group_key import group_key
from autoquant_ray.quantize.folding import fold_factors, producer_divisor

_OPT = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
MODELS: dict[str, Any] = {
    name: FAMILIES[name]
    for name in ("Llama", "Qwen3", "Gemma-3", "Phi-3", "Qwen3-MoE", "DeepSeek-V3", "Gemma-3n")
} | {
    "OPT": lambda: transformers.OPTConfig(**_OPT),
    "OPT with GELU": lambda: transformers.OPTConfig(**_OPT, activation_function="gelu"),
}


def loaded(name: str) -> Any:
    """A small random model in float32 whose norms and biases are random too."""
    torch.manual_seed(0)
    config = MODELS[name]()
    auto = transformers.AutoModelForCausalLM
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.2)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    return model


def folds_of(model: Any) -> dict[str, Fold]:
    """Folds of all groups of linears."""
    groups: dict[str, list[str]] = {}
    for planned in quantizable_modules(model):
        if planned.kind == "linear":
            groups.setdefault(group_key(planned.name), []).append(planned.name)
    return find_folds(model, groups.values())


def inputs_of(folds: dict[str, Fold]) -> list[Fold]:
    """Every fold once."""
    return list(dict.fromkeys(folds.values()))


def random_factors(fold: Fold, num_channels: int) -> torch.Tensor:
    """From 0.25 to 4, equal for the channels of a row."""
    rows = fold.rows(num_channels)
    return (4 ** (2 * torch.rand(max(rows) + 1) - 1))[torch.tensor(rows)]


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens."""
    result: torch.Tensor = model(torch.arange(1, 25)[None], use_cache=False).logits
    return result


@pytest.mark.parametrize("name", MODELS)
def test_folded_model_gives_the_same_logits(name: str) -> None:
    model = loaded(name)
    folds = inputs_of(folds_of(model))
    before = logits(model)
    for fold in folds:
        reader: Any = model.get_submodule(fold.readers[0])
        fold_factors(model, fold, random_factors(fold, reader.in_features))
    assert folds
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.std()))


FOUND = {
    "Llama": {"q_proj": NORM, "o_proj": ROWS, "gate_proj": NORM, "down_proj": ROWS, "": NORM},
    "Gemma-3": {
        "q_proj": SHIFTED_NORM,
        "o_proj": ROWS,
        "gate_proj": SHIFTED_NORM,
        "down_proj": ROWS,
        "": SHIFTED_NORM,
    },
    "Phi-3": {
        "qkv_proj": NORM,
        "o_proj": ROWS,
        "gate_up_proj": NORM,
        "down_proj": ROWS,
        "": NORM,
    },
    "Qwen3-MoE": {"q_proj": NORM, "o_proj": ROWS, "": NORM},  # routers and experts read the other
    "OPT": {"k_proj": NORM, "out_proj": ROWS, "fc1": NORM, "fc2": ROWS, "": NORM},
    "OPT with GELU": {"k_proj": NORM, "out_proj": ROWS, "fc1": NORM, "": NORM},
}


@pytest.mark.parametrize("name", FOUND)
def test_every_layer_has_the_inputs_that_can_be_folded(name: str) -> None:
    kinds: dict[str, set[str]] = {}
    folds = inputs_of(folds_of(loaded(name)))
    for fold in folds:
        layer, _, linear = fold.readers[0].rpartition(".")
        kinds.setdefault(linear if "layers" in layer else "", set()).add(fold.kind)
    assert kinds == {linear: {kind} for linear, kind in FOUND[name].items()}
    assert len(folds) == 2 * (len(kinds) - 1) + 1


def test_input_that_a_router_reads_too_is_left_alone() -> None:
    """In a model with a dense and a routed layer, only the dense one has the fold."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **DECODER, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    folds = folds_of(model)
    start = "model.layers"
    assert folds[f"{start}.0.mlp.gate_proj"].producer == f"{start}.0.post_attention_layernorm"
    assert not any(f.producer == f"{start}.1.post_attention_layernorm" for f in folds.values())


def test_values_that_layers_share_are_left_alone() -> None:
    folds = folds_of(small_model("gemma3n"))
    assert not any(fold.producer.endswith("v_proj") for fold in folds.values())


def test_skeleton_says_what_the_loaded_model_says() -> None:
    model = loaded("Llama")
    skeleton = copy.deepcopy(model).to("meta")
    assert folds_of(skeleton) == folds_of(model)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_model_that_needs_its_weights_has_no_folds(caplog: Any) -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any, **_: Any) -> Any:
            return input_ids @ self.model.embed_tokens.weight

    assert folds_of(Odd(transformers.LlamaConfig(**DECODER))) == {}
    assert "Odd does not run without its weights" in caplog.text


def test_channels_of_query_heads_share_the_row_of_their_key_head() -> None:
    fold = folds_of(loaded("Llama"))["model.layers.0.self_attn.o_proj"]
    assert (fold.width, fold.repeat) == (16, 2)
    assert fold.rows(64) == [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    assert Fold.from_json(fold.to_json()) == fold
    factors_I = random_factors(fold, 64)
    divisor_P = producer_divisor(fold, factors_I, 32)
    assert torch.equal(divisor_P[:16], factors_I[:16])
    assert torch.equal(divisor_P[16:], factors_I[32:48])
