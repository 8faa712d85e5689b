"""What a plan knows without asking ModelOpt is what ModelOpt says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from families import FAMILIES, family_model
from modelopt.torch.quantization import _auto_quantize_cost as costs
from modelopt.torch.quantization import config as algorithm_configs
from modelopt.torch.quantization.algorithms import (
    AutoQuantizeGradientSearcher,
    estimate_quant_compression,
)
from modelopt.torch.quantization.config import QuantizeConfig

from autoquant_ray.formats.algorithms import ARGUMENTS, METHODS, checked_algorithm
from autoquant_ray.formats.menu import BLOCK_INTEGERS, PAIRS, resolve_formats
from autoquant_ray.modelopt_api import experts_layout
from autoquant_ray.models.quantizable import quantizable_modules
from autoquant_ray.plan.decode_step import NUM_EXPERTS, step_facts
from autoquant_ray.plan.group_key import group_key

NAMES = (
    *(f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"),
    *(f"model.layers.3.mlp.experts.7.{part}_proj" for part in ("gate", "up", "down")),
    *(f"backbone.layers.3.mixer.experts.7.{part}_proj" for part in ("up", "down")),
    *(f"decoder.layers.1.mlp.experts.local_experts.2.linear_fc{n}" for n in (1, 2)),
    *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
    *(f"model.layers.0.block_sparse_moe.experts.5.w{n}" for n in (1, 2, 3)),
    *(f"transformer.blocks.0.ffn.experts.mlp.w{n}_linear.4" for n in (1, 2, 3)),
    *(f"model.layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z", "a", "b", "ba")),
    *("lm_head", "q_proj", "model.layers.0.mlp.gate_proj.extra", "a\n.q_proj", ".q_proj"),
)
OURS = re.compile(r"\.w[13]$|\.w[123]_linear\.\d+$")
"""Names that fit rules of ours; the latter is ModelOpt's too until 0.47."""


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: family_model(name) for name in FAMILIES}


def key_by_modelopt(name: str) -> str | None:
    """The first rule of the searcher that fits, applied by the searcher."""
    searcher: Any = AutoQuantizeGradientSearcher()
    searcher.model = None
    keys = (searcher._apply_quant_group_rule(name, rule) for rule in searcher.quant_grouping_rules)
    return next((key for key in keys if key is not None), None)


def test_groups_are_those_of_the_searcher(models: dict[str, Any]) -> None:
    of_models = {name for model in models.values() for name, _ in model.named_modules()}
    fitting = 0
    for name in {*NAMES, *of_models}:
        key = key_by_modelopt(name)
        fitting += key is not None
        if key is not None:
            assert group_key(name) == key, name
        elif not OURS.search(name):
            assert group_key(name) == name
    assert fitting > len(NAMES)


def test_fused_experts_are_those_that_modelopt_wraps(models: dict[str, Any]) -> None:
    num_fused = 0
    for model in models.values():
        planned = {m.name: m for m in quantizable_modules(model) if m.kind == "experts"}
        wrapped = {n: layout for n, m in model.named_modules() if (layout := experts_layout(m))}
        assert {n: (m.parameters, m.is_transposed) for n, m in planned.items()} == wrapped
        num_fused += len(planned)
    assert num_fused > 10


def test_share_of_active_experts_is_modelopts(models: dict[str, Any]) -> None:
    assert NUM_EXPERTS == costs._ACTIVE_MOE_NUM_EXPERTS_ATTRS
    ratios = {}
    for name, model in models.items():
        ratios[name] = costs.infer_active_moe_expert_ratio(model)
        facts = step_facts(model, list(quantizable_modules(model)), lambda _: False)
        assert facts["active_expert_ratio"] == ratios[name], name
    assert ratios["Llama"] is None
    assert len(set(ratios.values())) > 2


@pytest.mark.parametrize("name", [*PAIRS, *BLOCK_INTEGERS])
def test_compression_is_modelopts_estimate(name: str) -> None:
    weight, input_ = (PAIRS | BLOCK_INTEGERS)[name]
    entries = [{"quantizer_name": "*weight_quantizer", "cfg": weight}]
    if input_ is not None:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": input_})
    (format_,) = resolve_formats((name,), device="cpu")
    expected = estimate_quant_compression(QuantizeConfig(quant_cfg=entries))  # type: ignore[arg-type]
    assert format_.modelopt_compression == expected


@pytest.mark.parametrize("method", [method for method in METHODS if method != "max"])
def test_method_without_arguments_has_modelopts_defaults(method: str) -> None:
    """A method of which an argument is given is completed and checked by ModelOpt's classes."""
    bare = checked_algorithm("a format", method)
    assert bare is not None
    given = {name: value for name, value in bare.items() if name != "method"}
    assert set(given) <= set(ARGUMENTS[method])
    if method in ("awq", "awq+gptq"):
        default = algorithm_configs.AWQLiteCalibConfig.model_fields["alpha_step"].default
        assert given == {"alpha_step": default}
    if given:
        assert checked_algorithm("a format", {"method": method, **given}) == bare
