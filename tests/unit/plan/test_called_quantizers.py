"""Experts and caches whose code does not call ModelOpt's quantizers stay in 16 bits."""

from __future__ import annotations

import copy
import re
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import transformers
from every_family import small_model
from packaging.version import Version
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from autoquant_ray.config.expert_groups import EXPERT
from autoquant_ray.errors import ConfigError, ModelError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.reach import PAST_QUANTIZERS
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.score.scorer import Scorer

EXPERTS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


class MultiplyingExperts(Qwen3MoeExperts):  # type: ignore[misc]
    """Multiplies as Aria does from transformers 5.18 on."""

    def forward(
        self, states_TH: torch.Tensor, routes_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        output_TH = torch.zeros_like(states_TH)
        for expert in routes_TK.unique():
            rows, places = torch.where(routes_TK == expert)
            gate, up = (states_TH[rows] @ self.gate_up_proj[expert].mT).chunk(2, dim=-1)
            output = self.act_fn(gate) * up @ self.down_proj[expert].mT
            output_TH = output_TH.index_add(0, rows, output * weights_TK[rows, places, None])
        return output_TH


@pytest.fixture(scope="module")
def multiplying(make_model: Any) -> Any:
    return multiplied(make_model("qwen3_moe"))


def multiplied(model: Any) -> Any:
    """The same model with such experts."""
    model = copy.deepcopy(model)
    for name in EXPERTS:
        model.get_submodule(name).__class__ = MultiplyingExperts
    return model


def test_modelopt_does_not_quantize_such_experts(make_model: Any, multiplying: Any) -> None:
    """What the reason says, by ModelOpt itself."""
    ids_BS = torch.arange(1, 25)[None]
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*experts*weight_quantizer*", "cfg": {"num_bits": 4, "axis": None}},
    ]
    changes = []
    for model in (make_model("qwen3_moe"), multiplying):
        with torch.no_grad():
            exact = model(input_ids=ids_BS).logits
            quantized = mtq.quantize(
                copy.deepcopy(model),
                {"quant_cfg": entries, "algorithm": "max"},
                lambda m: m(input_ids=ids_BS),
            )
            changes.append(float((quantized(input_ids=ids_BS).logits - exact).abs().max()))
    assert changes[0] > 0.01
    assert changes[1] == 0.0


def test_plan_leaves_such_experts_in_16_bits_and_says_why(
    make_model: Any, multiplying: Any
) -> None:
    formats = resolve_formats(("wint8_afp16",), device="cpu")
    plan = build_plan(multiplying, formats)
    left_out = [g for g in plan.groups if ".experts" in g.name]
    assert {group.reason for group in left_out} == {PAST_QUANTIZERS}
    assert {module.path for group in left_out for module in group.modules} == {*EXPERTS}
    others = build_plan(make_model("qwen3_moe"), formats).searched
    assert [g.name for g in plan.searched] == [g.name for g in others if ".experts" not in g.name]


def test_such_experts_cannot_be_told_apart(multiplying: Any) -> None:
    formats = resolve_formats(("wint8_afp16",), device="cpu")
    refused = re.escape(f"no routed expert is searched ({PAST_QUANTIZERS}); leave it out")
    with pytest.raises(ConfigError, match=refused):
        build_plan(multiplying, formats, expert_groups=EXPERT)


def test_other_groups_of_such_a_model_have_the_scores_of_the_same_model(
    make_scorer: Any, make_model: Any, multiplying: Any, make_samples: Any
) -> None:
    samples = make_samples([24, 16], seed=3)
    sums = []
    for model in (make_model("qwen3_moe"), multiplying):
        prepared = make_scorer(model, ("wint8_aint8",))
        calibration = prepared.scorer.calibrate(samples)
        sums_GF = prepared.scorer.score(samples, 0, calibration).sums.elementwise_GF
        sums.append(dict(zip(prepared.names, sums_GF[:, 0], strict=True)))
    assert sums[1] == pytest.approx({n: s for n, s in sums[0].items() if n in sums[1]}, rel=1e-4)


@pytest.mark.parametrize("format_", ["wint8_aint8", "wint8_afp16"])
def test_worker_refuses_such_experts_that_a_plan_searches(
    format_: str, make_spec: Any, make_model: Any, multiplying: Any, make_samples: Any
) -> None:
    """Where the plan could not run the model: stands for code of a model's own."""
    model = make_model("qwen3_moe")
    plan = build_plan(model, resolve_formats((format_,), device="cpu"))
    assert {*EXPERTS} <= {module.planned.name for module in scored_modules(plan)}
    scorer = Scorer(make_spec(plan), model=multiplying)
    samples = make_samples([12], seed=3)
    with pytest.raises(ModelError, match=f"{PAST_QUANTIZERS}; `disable` {EXPERTS[0]}") as caught:
        scorer.score(samples, 0, scorer.calibrate(samples))
    assert len(str(caught.value)) <= 400


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="needs transformers 5.18"
)
def test_aria_of_transformers_5_18_is_such_a_model() -> None:
    plan = build_plan(small_model("aria_text"), resolve_formats(("wint8_afp16",), device="cpu"))
    assert {g.name for g in plan.groups if g.reason == PAST_QUANTIZERS} == {*EXPERTS}


def test_caches_are_of_the_attentions_whose_quantizers_modelopt_calibrates() -> None:
    """MiniMax has linear attentions, whose class is in one file with that of the others."""
    model = small_model("minimax")
    plan = build_plan(model, resolve_formats(("kv_fp8", "wint8_aint8"), device="cpu"))
    planned = {m.name for group in plan.groups for m in group.modules if m.is_cache}
    entry = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
    ids_BS = torch.arange(1, 25)[None]
    mtq.quantize(
        model,
        {"quant_cfg": [{"quantizer_name": "*", "enable": False}, entry], "algorithm": "max"},
        lambda m: m(input_ids=ids_BS, use_cache=False),
    )
    quantizers = {n: m for n, m in model.named_modules() if n.endswith("k_bmm_quantizer")}
    assert len(quantizers) == 2
    seen = {n for n, m in quantizers.items() if getattr(m, "amax", None) is not None}
    assert planned == {name.removesuffix(".k_bmm_quantizer") for name in seen}
    assert len(planned) == 1
