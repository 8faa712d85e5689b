"""What is not searched because text does not reach it, against autograd on a real model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from every_family import small_model
from tiny_configs import tiny_config

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.layers import require_gradient
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.plan.reach import IDLE, NO_GRADIENT, UNCALLED

TOWERS = (
    "fuyu",
    "idefics3",
    "kimi_k25",
    "lighton_ocr",
    "minicpmv4_6",
    "paddleocr_vl",
    "smolvlm",
    "video_llama_3",
    "video_llava",
)
UNREACHED = ("deepseek_v32", "glm_moe_dsa", "longcat_flash", "ernie4_5_vl_moe", "bart", "zamba2")


def skeleton(family: str, **changes: Any) -> Any:
    """A family's model without weights."""
    kind = transformers.CONFIG_MAPPING[family]
    config = tiny_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    auto = transformers.AutoModelForCausalLM
    if kind in transformers.AutoModelForImageTextToText._model_mapping:
        auto = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16).eval()


def plan_of(model: Any, **options: Any) -> Plan:
    return build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"), **options)


def with_gradient(model: Any, names: Sequence[str], num_tokens: int) -> set[str]:
    """The modules at whose output a gradient of the logits arrives, by autograd."""
    outputs: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
                outputs.setdefault(name, []).append(output)

        return hook

    handles = [model.get_input_embeddings().register_forward_hook(require_gradient)]
    handles += [model.get_submodule(n).register_forward_hook(note(n)) for n in names]
    ids_BS = torch.arange(3, 3 + num_tokens)[None] % 190
    model(input_ids=ids_BS, use_cache=False).logits.square().sum().backward()
    for handle in handles:
        handle.remove()
    return {n for n, seen in outputs.items() if any(s.grad is not None for s in seen)}


@pytest.mark.parametrize("family", [*TOWERS, *UNREACHED])
def test_searched_groups_are_those_that_autograd_gives_a_gradient(family: str) -> None:
    groups = plan_of(skeleton(family)).groups
    model = small_model(family)
    names = [m.name for group in groups for m in group.modules if m.kind != "convolution"]
    reached = with_gradient(model, names, num_tokens=20)
    weights = {n: id(getattr(model.get_submodule(n), "weight", None)) for n in names}
    used = {weights[n] for n in reached}  # by whatever layer, of those that share them
    reached |= {n for n, weight in weights.items() if weight in used - {id(None)}}
    searched = {m.name for group in groups if group.is_searched for m in group.modules}
    assert searched <= reached
    left_out = {g.name for g in groups if any(m.name in reached for m in g.modules)} - {
        g.name for g in groups if g.is_searched
    }
    assert all("gate" in name or "router" in name for name in left_out)


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("smolvlm", "model.connector.modality_projection.proj", IDLE),
        ("fuyu", "model.vision_embed_tokens", IDLE),
        ("deepseek_v32", "model.layers.0.self_attn.indexer.wq_b", NO_GRADIENT),
        ("longcat_flash", "model.layers.0.mlp.router.classifier", UNCALLED),
    ],
)
def test_what_text_does_not_reach_is_left_out_with_the_reason(
    family: str, name: str, reason: str
) -> None:
    plan = plan_of(skeleton(family))
    (group,) = (g for g in plan.groups if name in [m.name for m in g.modules])
    assert plan.summary()["unsearched"][group.name] == reason
    idle = plan.summary()["idle_groups"]
    assert (group.name in idle) == (reason == IDLE)


def test_what_joins_a_tower_to_the_text_is_searched_with_full_coverage() -> None:
    plan = plan_of(skeleton("smolvlm"), coverage="full")
    searched = {group.name for group in plan.searched}
    assert "model.connector.modality_projection.proj" in searched
    assert any("vision_model" in name for name in searched)
    with pytest.raises(ConfigError, match="has no vision tower"):
        plan_of(skeleton("longcat_flash"), coverage="full")


def test_what_many_tokens_reach_is_searched() -> None:
    """DeepSeek-V4 compresses blocks of 128 tokens, so that fewer do not reach its compressor."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    model = skeleton("deepseek_v4", compress_rates=rates)
    searched = {m.name for group in plan_of(model).searched for m in group.modules}
    compressors = [n for n, m in model.named_modules() if n.endswith("compressor.kv_proj")]
    assert len(compressors) == 2
    assert searched.issuperset(compressors)


def test_linear_that_takes_groups_is_named_and_not_searched() -> None:
    """DeepSeek-V4's ``o_a_proj`` is a torch linear with a product of its own for each group."""
    plan = plan_of(skeleton("deepseek_v4"))
    assert not any("o_a_proj" in m.name for group in plan.groups for m in group.modules)
    assert any("o_a_proj (DeepseekV4GroupedLinear)" in name for name in plan.other_modules)


def test_model_that_does_not_run_without_weights_is_told_by_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = skeleton("gemma3")
    expected = plan_of(model)

    def refuse(**_: Any) -> None:
        raise TypeError("missing 1 required positional argument: 'pixel_values'")

    monkeypatch.setattr(type(model), "forward", refuse)
    assert plan_of(model) == expected
