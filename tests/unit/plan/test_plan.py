"""Groups, costs and coverage, against counts made by hand and ModelOpt's own grouping."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from autoquant_ray.allocate.manifest import manifest_rows
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import check_feasible, search
from autoquant_ray.errors import ConfigError, FormatError, InfeasibleBudgetError
from autoquant_ray.formats.checks import check_quantizers
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.formats.stored_size import stored_bits
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan

INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MXFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


@pytest.mark.parametrize(
    ("attributes", "shape", "bits"),
    [
        (INT4, (64, 256), 64 * 256 * 4.125),
        (INT4, (64, 192), 64 * 192 * 4 + 64 * 2 * 16),  # a partial block has its own scale
        (NVFP4, (64, 256), 64 * 256 * 4.5 + 32),
        (MXFP4, (64, 256), 64 * 256 * 4.25),
        ({"num_bits": 8, "axis": 0}, (64, 256), 64 * 256 * 8 + 64 * 32),
        ({"num_bits": (4, 3), "axis": None}, (64, 256), 64 * 256 * 8 + 32),
        ({"num_bits": 8, "axis": 0}, (5, 64, 256), 5 * (64 * 256 * 8 + 64 * 32)),
        ({"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}}, (200, 300), 480000 + 6 * 16),
    ],
)
def test_stored_bits_counts_scales(attributes: Any, shape: Any, bits: float) -> None:
    assert stored_bits(attributes, shape) == bits


def test_factors_of_input_channels_count_but_not_for_fused_experts(make_model: Any) -> None:
    names = (
        "INT4_AWQ_CFG",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT8_SMOOTHQUANT_CFG",
        "wint8_aint8",
    )
    plan = build_plan(make_model("qwen3_moe"), resolve_formats(names, device="cpu"))
    bytes_of = {(row["group"], row["format"]): row["weight_bytes"] for row in plan.rows()}
    start, inputs = "model.layers.0", 3 * 64  # q, k and v
    for smoothed, plain in (names[:2], names[2:]):
        for group, extra in (
            (f"{start}.self_attn.q_proj", 2 * inputs),
            (f"{start}.mlp.experts", 0),
        ):
            assert bytes_of[group, smoothed] == bytes_of[group, plain] + extra
    problem = Problem.from_plan(plan.rows(), plan.summary())
    chosen = {group.name: "INT4_AWQ_CFG" for group in plan.searched}
    scores = dict.fromkeys(plan.score_keys, 1.0)
    rows = manifest_rows(problem, chosen, scores, plan.summary())
    total = sum(bytes_of[group.name, "INT4_AWQ_CFG"] for group in plan.searched)
    assert sum(row["weight_bytes"] for row in rows) == pytest.approx(total)


def test_tied_head_takes_no_factors_of_input_channels(make_model: Any) -> None:
    names = ("INT4_AWQ_CFG", "wint8_afp16")
    plan = build_plan(make_model("qwen3"), resolve_formats(names, device="cpu"))
    menus = {group.name: [format_.name for format_ in plan.menu(group)] for group in plan.searched}
    assert menus.pop("lm_head") == ["wint8_afp16"]
    assert all(menu == list(names) for menu in menus.values())
    alone = build_plan(make_model("qwen3"), resolve_formats(names[:1], device="cpu"))
    assert alone.summary()["unsearched"] == {"lm_head": "takes no format of the menu"}
    untied = build_plan(make_model("llama"), resolve_formats(names, device="cpu"))
    assert ("lm_head", "INT4_AWQ_CFG") in untied.score_keys


@pytest.mark.parametrize(
    ("weight", "inputs", "method", "reason"),
    [
        (INT4, {"num_bits": 8, "axis": None}, "smoothquant", "needs 8-bit integer weights"),
        ({"num_bits": 8, "axis": 0}, None, "smoothquant", "needs 8-bit integer inputs"),
        (
            {"num_bits": 8, "axis": 0},
            {"num_bits": (4, 3), "axis": None},
            "smoothquant",
            "needs 8-bit integer inputs",
        ),
        (
            {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}},
            None,
            "awq_lite",
            r"blocks of the last axis \(-1\).*\[-1, -2\]",
        ),
    ],
)
def test_quantizers_that_an_algorithm_cannot_calibrate_are_refused(
    weight: Any, inputs: Any, method: str, reason: str
) -> None:
    format_ = Format(
        name="mine",
        weight=weight,
        input=inputs,
        modelopt_compression=0.5,
        algorithm={"method": method},
    )
    with pytest.raises(FormatError, match=f"format mine: {method} needs") as caught:
        check_quantizers(format_)
    assert re.search(reason, str(caught.value))


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "qwen3_vl"])
def test_plan_every_matrix_is_searched_or_listed(family: str, make_model: Any) -> None:
    model = make_model(family)
    plan = build_plan(model, resolve_formats(("wfp8_afp8",), device="cpu"))
    covered = {module.name for group in plan.groups for module in group.modules}
    listed = {name.split(" ")[0] for name in plan.other_modules}
    embeddings = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.dim() >= 2:
            assert owner in covered | listed | embeddings, name
    assert all(group.reason for group in plan.groups if not group.is_searched)
    sizes = {id(p): p.numel() for p in model.parameters()}
    groups = sum(group.num_weights for group in plan.groups if not group.is_tied)
    assert plan.other_bytes == 2 * (sum(sizes.values()) - groups)


def test_plan_vision_tower_is_unsearched_with_the_reason(make_model: Any) -> None:
    plan = build_plan(make_model("qwen3_vl"), resolve_formats(("wfp8_afp8",), device="cpu"))
    vision = [group for group in plan.groups if group.name.startswith("model.visual")]
    assert vision
    assert all("no images" in str(group.reason) for group in vision)
    assert not any(group.name.startswith("model.visual") for group in plan.searched)


def test_plan_disabled_member_disables_its_group(make_model: Any) -> None:
    formats = resolve_formats(("wfp8_afp8",), device="cpu")
    plan = build_plan(make_model("llama"), formats, ["*layers.0.self_attn.k_proj"])
    (group,) = [g for g in plan.groups if not g.is_searched]
    assert group.name == "model.layers.0.self_attn.q_proj"
    assert "k_proj" in str(group.reason)


def test_plan_pattern_without_match_is_refused(make_model: Any) -> None:
    formats = resolve_formats(("wfp8_afp8",), device="cpu")
    with pytest.raises(ConfigError, match=r"nothing_like_it"):
        build_plan(make_model("llama"), formats, ["nothing_like_it"])


def test_plan_tied_head_counts_the_embedding_once_or_both(make_model: Any) -> None:
    model = make_model("qwen3")
    plan = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    problem = Problem.from_plan(plan.rows(), plan.summary())
    everything = sum(p.numel() for p in model.parameters())
    head = problem.groups["lm_head"]
    assert head.is_tied
    in_16_bits = problem.other_bytes + sum(
        group.cost("none", "storage") for group in problem.groups.values()
    )
    assert in_16_bits == 2 * everything
    assert head.cost("wint8_afp16", "storage") == head.num_weights + 4 * 256
    assert head.cost("none", "storage") == 0, "its bytes are the embedding's"
    assert head.rows["none"]["weight_bytes"] == 2 * head.num_weights
    assert (head.weights("storage"), head.weights("modelopt")) == (0, head.num_weights)
    low, high = plan.bits_range()
    stored = [group for group in problem.searched if group.name != "lm_head"]
    cheapest = sum(group.cost("wint8_afp16", "storage") for group in stored)
    assert low == cheapest * 8 / sum(group.num_weights for group in stored)
    assert high == 16


def test_budget_bytes_of_the_whole_model_is_met_exactly_at_16_bits(make_model: Any) -> None:
    model = make_model("qwen3")
    plan = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    problem = Problem.from_plan(plan.rows(), plan.summary())
    num_bytes = 2 * sum(p.numel() for p in model.parameters())
    scores = {(group.name, "wint8_afp16"): 1.0 for group in plan.searched}
    allocation = search(problem, scores, SolveOptions(bytes=num_bytes))
    assert set(allocation.formats.values()) == {"none"}
    smaller = search(problem, scores, SolveOptions(bytes=num_bytes - 1))
    assert sum(f != "none" for f in smaller.formats.values()) == 1


def test_budget_below_the_reachable_range_names_it(make_model: Any) -> None:
    plan = build_plan(make_model("llama"), resolve_formats(("wint4_afp16",), device="cpu"))
    low, high = plan.bits_range()
    assert high == 16
    with pytest.raises(InfeasibleBudgetError, match=f"{low:.2f}"):
        check_feasible(Problem.from_plan(plan.rows(), plan.summary()), SolveOptions(bits=3))


def test_budget_over_all_weights_counts_unsearched_ones(make_model: Any) -> None:
    formats = resolve_formats(("wint8_afp16",), device="cpu")
    plan = build_plan(make_model("llama"), formats, ["lm_head"])
    problem = Problem.from_plan(plan.rows(), plan.summary())
    scores = {(group.name, "wint8_afp16"): 1.0 for group in plan.searched}
    total = sum(group.num_weights for group in plan.groups)
    allocation = search(problem, scores, SolveOptions(bits=12, bits_over="all"))
    stored = allocation.costs["storage"] + 2 * problem.groups["lm_head"].num_weights
    assert stored * 8 / total <= 12
    searched_only = search(problem, scores, SolveOptions(bits=12))
    assert searched_only.costs["storage"] > allocation.costs["storage"]


_MEASURE = """
import json, resource, subprocess, sys
out = subprocess.run([sys.executable, "-m", "autoquant_ray", "plan", sys.argv[1], "--json",
                      "--formats", "wint4_afp16,wfp8_afp8,wint8_aint8"],
                     capture_output=True, text=True, check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"plan": json.loads(out.stdout), "peak": peak}))
"""


def test_plan_4b_vision_language_model_stays_small(tmp_path: Path) -> None:
    text = {
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True
    ).save_pretrained(tmp_path)
    measured = json.loads(
        subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    plan = measured["plan"]
    assert measured["peak"] < 2 * 2**30
    assert plan["num_searched"] == 36 * 4 + 1
    rows = [row for row in plan["groups"] if row["group"].startswith("model.visual.blocks")]
    assert len(rows) == 24 * 4
    assert not any(row["is_searched"] for row in rows)
    assert all("no images" in plan["unsearched"][row["group"]] for row in rows)


def test_skeleton_needs_only_the_config(tmp_path: Path, make_model: Any) -> None:
    model = make_model("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    skeleton = build_skeleton(find_model(str(tmp_path)))
    assert {n: tuple(p.shape) for n, p in skeleton.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize(
    ("input_", "words"),
    [
        ({"num_bits": 8, "axis": -1}, "per channel or block"),
        ({"num_bits": 8, "block_sizes": {-1: 16, "type": "static"}}, "per channel or block"),
        ({"num_bits": 8, "axis": None, "type": "dynamic"}, "how samples are batched"),
        ({"num_bits": 8, "axis": None, "unsigned": True}, "signed"),
        ({"num_bits": 8, "axis": None, "calibrator": "histogram"}, "calibrated by 'max'"),
        ({"num_bits": 8, "axis": None, "enable": True}, "'enable' is implied"),
    ],
)
def test_format_with_an_input_that_cannot_be_scored_is_refused(input_: Any, words: str) -> None:
    custom = {"mine": {"weight": {"num_bits": 8, "axis": 0}, "input": input_}}
    with pytest.raises(FormatError, match=words):
        resolve_formats(("mine",), device="cpu", custom=custom)


def test_budget_bytes_below_the_reachable_range_counts_everything(make_model: Any) -> None:
    plan = build_plan(make_model("llama"), resolve_formats(("wint8_afp16",), device="cpu"))
    problem = Problem.from_plan(plan.rows(), plan.summary())
    low = problem.other_bytes + sum(g.weight_bytes(plan.formats[0]) for g in plan.groups)
    with pytest.raises(InfeasibleBudgetError, match=f"{round(low)} bytes"):
        check_feasible(problem, SolveOptions(bytes=round(low) - 1))
    check_feasible(problem, SolveOptions(bytes=round(low)))
