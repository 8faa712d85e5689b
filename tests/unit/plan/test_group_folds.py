"""Which groups take formats whose factors are folded, and which menus are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from autoquant_ray.errors import AutoQuantError, ConfigError, FormatError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.fold import folds_of_summary
from autoquant_ray.plan.plan import build_plan

AWQ = "wint4_g32_afp16:awq"
START = "model.layers.0"


def taking(model: Any, *names: str, **more: Any) -> set[str]:
    """Groups of the first layer and the head that take the first format."""
    plan = build_plan(model, resolve_formats(names, device="cpu"), **more)
    groups = {g.name for g in plan.searched if any(f.name == names[0] for f in plan.menu(g))}
    return {name.removeprefix(f"{START}.") for name in groups if ".1." not in name}


EVERY = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "lm_head"}
BY_NORMS = {"self_attn.q_proj", "mlp.gate_proj", "lm_head"}


@pytest.mark.parametrize(
    "name",
    ["wint4_g32_afp16:max", "wint8_afp16", "wint5_g32_afp16:weighted", "wint4_g32_afp16:gptq"],
)
def test_rows_are_divided_where_every_format_leaves_them_free(name: str, make_model: Any) -> None:
    assert taking(make_model("llama"), AWQ, name) == EVERY


@pytest.mark.parametrize("name", ["wfp8_afp16", "wfp4_afp16:weighted", "INT4_AWQ_CFG"])
def test_rows_are_left_alone_where_a_format_shares_scales_between_them(
    name: str, make_model: Any
) -> None:
    assert taking(make_model("llama"), AWQ, name) == BY_NORMS


@pytest.mark.parametrize("name", ["kv_fp8", "kv_nvfp4"])
def test_values_are_left_alone_where_a_cache_has_scales_for_them(
    name: str, make_model: Any
) -> None:
    """Divided values would exceed the largest one that calibration saw."""
    model = make_model("llama")
    assert taking(model, AWQ, name) == EVERY - {"self_attn.o_proj"}
    assert taking(model, AWQ, name, disable=("*.kv",)) == EVERY


def test_rows_of_layers_in_16_bits_are_free(make_model: Any) -> None:
    disabled = ("*.up_proj", "*.gate_proj")
    taken = taking(make_model("llama"), AWQ, "wfp8_afp16", disable=disabled)
    assert taken == BY_NORMS - {"mlp.gate_proj"} | {"mlp.down_proj"}


def test_tied_head_takes_factors_in_its_copy(make_model: Any) -> None:
    assert taking(make_model("qwen3"), AWQ) == EVERY


def test_routed_experts_take_none_and_the_log_says_so(make_model: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        taken = taking(make_model("qwen3_moe"), AWQ, "wint8_afp16")
    assert taken == {"self_attn.q_proj", "self_attn.o_proj", "lm_head"}
    line = "awq: 2 of 7 groups take no factors (their inputs cannot be folded): model.layers.0.mlp"
    assert line in caplog.text


def test_log_names_the_format_to_leave_out(make_model: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        taking(make_model("llama"), AWQ, "wint8_afp16", "wfp8_afp16", "kv_fp8")
    assert "awq: 2 of 9 groups take no factors (their caches are searched): " in caplog.text
    reason = "wfp8_afp16 scales the rows before them together: leave it out"
    assert f"awq: 2 of 9 groups take no factors ({reason}): model.layers.0.mlp" in caplog.text


def test_bytes_are_those_of_the_plain_format(make_model: Any) -> None:
    menu = resolve_formats((AWQ, "wint4_g32_afp16:max"), device="cpu")
    plan = build_plan(make_model("llama"), menu)
    for group in plan.searched:
        factored, plain = (group.weight_bytes(format_) for format_ in menu)
        assert factored == plain


def test_summary_keeps_the_folds_of_searched_groups_only(make_model: Any) -> None:
    model = make_model("llama")
    plan = build_plan(model, resolve_formats((AWQ,), device="cpu"), ("lm_head",))
    summary: Any = plan.summary()
    assert folds_of_summary(summary) == plan.folds
    assert len(summary["folds"]) == 8
    plain = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    assert "folds" not in plain.summary()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wint4_afp8:awq", "awq is for inputs in 16 bits"),
        ("wfp8_afp16:awq", "awq needs integers with stored scales"),
        ("wfp4_afp16:awq", "awq needs integers with stored scales"),
        ("kv_fp8:awq", "a KV cache has no stored scales"),
        ("wint4_afp16:awg", "'awg' is no method of rounding"),
    ],
)
def test_formats_that_cannot_take_factors_are_refused(name: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        resolve_formats((name,), device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_model_without_any_fold_is_refused(make_model: Any) -> None:
    model = make_model("llama")
    disabled = ("*self_attn*", "*mlp*")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: torch.empty(1, device="meta"))
    with pytest.raises(ConfigError, match="no layer of this model") as caught:
        build_plan(model, resolve_formats((AWQ,), device="cpu"), disabled)
    assert isinstance(caught.value, AutoQuantError)
    assert "weighted" in str(caught.value)
