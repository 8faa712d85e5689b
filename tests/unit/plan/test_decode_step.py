"""What the plan knows of a decode step: bytes outside the groups, attention, experts."""

from __future__ import annotations

from typing import Any

import pytest
from step_by_hand import card, plan_of

from autoquant_ray.allocate.load import Latency
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.formats.format import NONE


def test_step_facts_of_a_plain_decoder(make_model: Any) -> None:
    model = make_model("llama")
    facts = plan_of(model).summary()["step"]
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert facts["other_bytes"] == 2 * norms
    assert facts["other_expert_bytes"] == 0
    assert facts["active_expert_ratio"] is None
    assert facts["head"] == "lm_head"
    # Two heads of 16 kept for keys and for values, in 16 bits; four heads attended.
    kinds = [{"layers": 2, "kv_bytes": 2 * 2 * 2 * 16, "width": 4 * 16, "window": None}]
    assert facts["attention"] == kinds


def test_step_facts_know_windows_and_leave_fused_projections_out(make_model: Any) -> None:
    windows = {k["window"]: k["layers"] for k in plan_of(make_model("gemma3n")).step["attention"]}
    config = make_model("gemma3n").config.get_text_config()
    assert windows == {config.sliding_window: 2, None: 2}
    fused = plan_of(make_model("falcon")).step
    assert (fused["layers"], fused["attention"]) == (2, [])


def test_tied_head_is_read_and_vision_tower_is_not(make_model: Any) -> None:
    hardware = card(1e9, _16x16=1e15)
    plan = plan_of(make_model("qwen3"))
    problem = Problem.from_plan(plan.rows(), plan.summary()).timed(Latency(hardware=hardware))
    head = problem.groups["lm_head"]
    assert head.is_tied
    assert head.cost(NONE, "latency") == pytest.approx(1000 * 2 * head.num_weights / 1e9)
    plan = plan_of(make_model("qwen3_vl"))
    problem = Problem.from_plan(plan.rows(), plan.summary()).timed(Latency(hardware=hardware))
    times = {g.name: g.cost(NONE, "latency") for g in problem.groups.values()}
    assert {name for name, ms in times.items() if ms == 0} == {
        name for name in times if "visual" in name
    }
    text = [
        p.numel() for name, p in make_model("qwen3_vl").named_parameters() if "visual" not in name
    ]
    embedding = make_model("qwen3_vl").get_input_embeddings().weight.numel()
    weights = sum(g.num_weights for g in problem.groups.values() if not g.is_idle)
    assert plan.step["other_bytes"] == 2 * (sum(text) - embedding - weights)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.experts.3.gate_proj",
        "model.layers.0.mlp.shared_experts.gate_proj",
        "model.layers.0.mlp.shared_expert.up_proj",
        "model.layers.0.mlp.gate_proj",
        "transformer.blocks.1.ffn.experts.mlp.w1_linear.2",
        "model.layers.0.experts_gate",
    ],
)
def test_routed_expert_is_modelopts_rule(name: str) -> None:
    from modelopt.torch.quantization._auto_quantize_cost import is_routed_moe_module_name

    from autoquant_ray.plan.decode_step import is_routed_expert

    assert is_routed_expert(name) == is_routed_moe_module_name(name)
