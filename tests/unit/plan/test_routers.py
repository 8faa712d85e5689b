"""Routers that are plain linears stay in 16 bits, unless asked for."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_configs import tiny_config

from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.routers import ROUTER


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("afmoe", {"mlp.router.gate"}),
        ("hunyuan_v1_moe", {"mlp.gate.wg"}),
        ("jamba", {"feed_forward.router"}),
        ("jetmoe", {"mlp.router.layer", "self_attention.experts.router.layer"}),
        ("qwen2_moe", {"mlp.shared_expert_gate"}),
        ("mixtral", set()),
        ("llama", set()),
        ("xlnet", set()),
    ],
)
def test_routers_are_left_out_and_named_unless_asked_for(family: str, names: set[str]) -> None:
    config = tiny_config(transformers.CONFIG_MAPPING[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    formats = resolve_formats(("wint8_afp16",), device="cpu")
    plan = build_plan(model, formats)
    left_out = {g.name for g in plan.groups if g.reason == ROUTER}
    assert {name.split(".", 3)[-1] for name in left_out} == names
    asked = build_plan(model, formats, search_routers=True)
    assert {g.name for g in asked.searched} == {g.name for g in plan.searched} | left_out


def test_gate_and_up_of_lfm2_share_a_format() -> None:
    config = tiny_config(transformers.CONFIG_MAPPING["lfm2"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plan = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    groups = [[m.name.rpartition(".")[2] for m in group.modules] for group in plan.groups]
    assert groups.count(["w1", "w3"]) == 2
    assert groups.count(["w2"]) == 2
