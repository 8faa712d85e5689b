"""Time of a decode step as a cost: by hand, by chance, and against every allocation there is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from autoquant_ray.allocate.cards import Hardware
from autoquant_ray.allocate.group_choices import GroupChoices
from autoquant_ray.allocate.latency import StepTime, numeric_class, touched_share
from autoquant_ray.allocate.load import Latency, four_digits, latency_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import load_problem, solution_options
from autoquant_ray.allocate.search import search
from autoquant_ray.cli.main import main
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.swaps import Swaps
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solution_name, solve_run

FORMATS = ("wint4_afp16", "wfp8_afp8")


def card(bandwidth: float, **rates: float) -> Hardware:
    """A made-up card."""
    figures = {
        pair.removeprefix("_"): {"value": rate, "source": "made up"} for pair, rate in rates.items()
    }
    return Hardware.model_validate(
        {
            "name": "made up",
            "memory_bandwidth": {"value": bandwidth, "source": "made up"},
            "matmul_rates": figures,
        }
    )


PLAN: dict[str, Any] = {
    "formats": [
        {"name": "int4", "weight": {"num_bits": 4}, "input": None},
        {"name": "fp8", "weight": {"num_bits": [4, 3]}, "input": {"num_bits": [4, 3]}},
        {"name": "fp8 weights", "weight": {"num_bits": [4, 3]}, "input": None},
        {"name": "int8", "weight": {"num_bits": 8}, "input": {"num_bits": 8}},
    ],
    "step": {
        "active_expert_ratio": 0.25,
        "other_bytes": 0,
        "other_expert_bytes": 0,
        "head": "head",
        "layers": 3,
        "attention": [],
    },
}


def group(**changes: Any) -> GroupChoices:
    """A group of 1e9 weights."""
    sizes = {"int4": 0.5e9, "fp8": 1e9, "fp8 weights": 1e9, "int8": 1e9, NONE: 2e9}
    values: dict[str, Any] = {
        "name": "g",
        "module_names": ["g"],
        "num_weights": 10**9,
        "is_searched": True,
        "is_tied": False,
        "is_idle": False,
        "active_share": 1.0,
        "rows": {name: {"weight_bytes": size} for name, size in sizes.items()},
    }
    return GroupChoices(**values | changes)


def step_time(batch: int = 1, context: int = 1, **facts: Any) -> StepTime:
    """1e12 bytes per second, 1e15 operations per second in 16 bits, twice that in FP8."""
    hardware = card(1e12, _16x16=1e15, fp8xfp8=2e15)
    plan = PLAN | {"step": PLAN["step"] | facts}
    return StepTime(Latency(hardware=hardware, batch=batch, context=context), plan)


@pytest.mark.parametrize(
    ("format_", "batch", "ms"),
    [
        (NONE, 1, 2.0),  # 2e9 bytes at 1e12 per second
        ("fp8", 1, 1.0),
        ("int4", 1, 0.5),
        (NONE, 4096, 8.192),  # 2 * 1e9 * 4096 operations at 1e15 per second
        ("fp8", 4096, 4.096),  # at twice the rate
        ("int4", 4096, 8.192),  # 16-bit activations: at the 16-bit rate
        ("fp8 weights", 4096, 8.192),
        ("int8", 4096, 8.192),  # the card has no units for it
        ("int8", 1, 1.0),  # but it reads fewer bytes
    ],
)
def test_group_takes_the_longer_of_traffic_and_operations(
    format_: str, batch: int, ms: float
) -> None:
    assert step_time(batch).group_ms(group(), format_) == pytest.approx(ms, rel=1e-12)


def test_achievable_share_lengthens_traffic_alone() -> None:
    hardware = card(1e12, _16x16=1e15)
    slow = hardware.model_dump() | {"bandwidth_share": {"value": 0.8, "source": "made up"}}
    for batch, ms in ((1, 2.5), (4096, 8.192)):
        latency = Latency(hardware=Hardware.model_validate(slow), batch=batch)
        assert StepTime(latency, PLAN).group_ms(group(), NONE) == pytest.approx(ms, rel=1e-12)


def test_routed_experts_scale_traffic_and_operations() -> None:
    experts = group(active_share=0.25)
    assert step_time(1).group_ms(experts, "fp8") == pytest.approx(0.25, rel=1e-12)
    assert step_time(2).group_ms(experts, "fp8") == pytest.approx(1 - 0.75**2, rel=1e-12)
    # 2 * 1e9 * 0.25 * 8000 operations at 2e15 per second
    assert step_time(8000).group_ms(experts, "fp8") == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(("experts", "visited", "tokens"), [(8, 2, 1), (8, 2, 3), (64, 6, 16)])
def test_touched_share_is_that_of_random_routers(experts: int, visited: int, tokens: int) -> None:
    random = np.random.default_rng(experts + tokens)
    num_trials = 4000
    drawn = random.random((num_trials, tokens, experts)).argsort(axis=2)[:, :, :visited]
    shares = [len(np.unique(trial)) / experts for trial in drawn]
    error = max(np.std(shares) / math.sqrt(num_trials), 1e-12)
    assert abs(np.mean(shares) - touched_share(visited / experts, tokens)) < 4 * error


def test_idle_group_takes_no_time_and_unknown_share_is_refused() -> None:
    assert step_time().group_ms(group(is_idle=True), NONE) == 0
    with pytest.raises(ConfigError, match="share of the experts of g"):
        step_time().group_ms(group(active_share=None), NONE)


def test_time_outside_the_groups() -> None:
    # Norms and routers: 1e6 bytes. Experts that no group holds: 4e9 bytes, of which a quarter.
    step = step_time(other_bytes=1e6, other_expert_bytes=4e9)
    assert step.other_ms == pytest.approx(1e-3 + 1.0, rel=1e-12)
    # 10 layers: 2 sequences of 1000 tokens, 4096 bytes each; 3 layers look back 100 tokens.
    attention = [
        {"layers": 10, "kv_bytes": 4096, "width": 4096, "window": None},
        {"layers": 3, "kv_bytes": 4096, "width": 4096, "window": 100},
    ]
    step = step_time(2, 1000, attention=attention)
    read = 10 * 2 * 1000 * 4096 + 3 * 2 * 100 * 4096
    assert step.other_ms == pytest.approx(1000 * read / 1e12, rel=1e-12)


def test_prefill_counts_every_token_but_one_for_the_head() -> None:
    head, body = group(name="head", module_names=["head"]), group()
    attention = [{"layers": 1, "kv_bytes": 1, "width": 10**6, "window": None}]
    step = step_time(2, 5000, attention=attention)
    found = step.prediction([head, body], {"head": NONE, "g": "fp8"})
    # Body 2e9 * 10000 / 2e15 s, head 2e9 bytes at 1e12, attention 4 * 2 * 5000 * 5001 / 2 * 1e6.
    by_hand = 10.0 + 2.0 + 1000 * 4 * 2 * 5000 * 5001 / 2 * 1e6 / 1e15
    assert found["prefill_ms"] == pytest.approx(by_hand, rel=1e-12)


def test_prediction_sums_groups_and_names_formats_without_units() -> None:
    groups = [group(name=name, module_names=[name]) for name in "abc"]
    found = step_time(4).prediction(groups, {"a": "int4", "b": "int8", "c": NONE})
    assert found["ms_per_token"] == pytest.approx(0.5 + 1.0 + 2.0, rel=1e-12)
    assert found["tokens_per_second"] == pytest.approx(4000 / 3.5, rel=1e-12)
    assert found["formats_without_units"] == ["int8"]
    assert found["kind"] == "roofline bound, not a measurement"
    assert found["uncounted_layers"] == 3


@pytest.mark.parametrize(
    ("value", "nearest", "up", "down"),
    [
        (12.3456, "12.35", "12.35", "12.34"),
        (0.0012341, "0.001234", "0.001235", "0.001234"),
        (1234567, "1235000", "1235000", "1234000"),
        (9.99999, "10.000", "10.000", "9.999"),
    ],
)
def test_numbers_are_told_with_four_digits(value: float, nearest: str, up: str, down: str) -> None:
    assert four_digits(value) == nearest
    assert four_digits(value, math.ceil) == up
    assert four_digits(value, math.floor) == down


def test_numeric_classes_of_the_menu() -> None:
    menu = {
        "wint4_afp16": ("int4", "16"),
        "wfp8_afp8": ("fp8", "fp8"),
        "wfp4_afp8": ("fp4", "fp8"),
        "wint8_aint8": ("int8", "int8"),
    }
    for format_ in resolve_formats(tuple(menu), device="cuda"):
        entry = json.loads(json.dumps(format_.to_json()))
        classes = numeric_class(entry["weight"]), numeric_class(entry["input"])
        assert classes == menu[format_.name]


# --- what the plan tells


def plan_of(model: Any) -> Plan:
    return build_plan(model, resolve_formats(FORMATS, device="cpu"))


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
    problem = Problem(plan.rows(), plan.summary()).timed(Latency(hardware=hardware))
    head = problem.groups["lm_head"]
    assert head.is_tied
    assert head.cost(NONE, "latency") == pytest.approx(1000 * 2 * head.num_weights / 1e9)
    plan = plan_of(make_model("qwen3_vl"))
    problem = Problem(plan.rows(), plan.summary()).timed(Latency(hardware=hardware))
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


# --- ModelOpt's cost of routed experts


def test_active_moe_cost_is_modelopts(make_model: Any) -> None:
    from modelopt.torch.quantization._auto_quantize_cost import (
        _get_module_weight_numel,
        get_auto_quantize_cost_model,
        normalize_auto_quantize_constraints,
    )

    model = make_model("qwen3_moe")
    plan = plan_of(model)
    problem = Problem(plan.rows(), plan.summary())
    constraints = normalize_auto_quantize_constraints(
        model, {"effective_bits": 6.0, "cost_model": "active_moe"}
    )
    theirs = get_auto_quantize_cost_model("active_moe")
    modules = dict(model.named_modules())
    weighted = set()
    for one in problem.groups.values():
        factor = theirs.module_cost_weight(one.module_names, constraints["cost"])
        weighted.add(factor)
        numel = sum(_get_module_weight_numel(modules[name]) for name in one.module_names)
        assert one.weights("active_moe") == numel * factor
        for format_ in [*plan.formats, None]:
            name = NONE if format_ is None else format_.name
            compression = 1.0 if format_ is None else format_.modelopt_compression
            expected = numel * factor * compression
            assert one.cost(name, "active_moe") == pytest.approx(expected, rel=1e-12)
    assert weighted == {1.0, 0.25}


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


def test_active_moe_budget_is_met_and_tight(make_run: Any) -> None:
    directory = make_run("qwen3_moe", formats=FORMATS)
    problem, scores = load_problem(RunState.open(directory))
    options = SolveOptions(bits=8.5, bits_over="all", cost="active_moe")
    found = search(problem, scores, options)
    total = sum(g.weights("active_moe") for g in problem.groups.values())
    outside = sum(g.cost(NONE, "active_moe") for g in problem.unsearched)
    assert (found.costs["active_moe"] + outside) * 16 / total <= 8.5 * (1 + 1e-9)
    best = min(
        math.fsum(0.0 if f == NONE else scores[g.name, f] for g, f in chosen)
        for chosen in _allocations(problem)
        if (math.fsum(g.cost(f, "active_moe") for g, f in chosen) + outside) * 16 / total <= 8.5
    )
    assert found.score == pytest.approx(best, rel=1e-9)
    solution = solve_run(directory, options)
    assert solution.summary["active_moe_effective_bits"] <= 8.5
    assert solution.summary["active_moe_effective_bits"] != pytest.approx(
        solution.summary["modelopt_effective_bits"]
    )


def test_active_moe_without_experts_is_refused(make_run: Any) -> None:
    with pytest.raises(ConfigError, match="--cost active_moe needs the share of the experts"):
        solve_run(make_run(), SolveOptions(bits=8, cost="active_moe"))


# --- budgets against brute force


def _allocations(problem: Problem) -> Any:
    """Every allocation, as (group, format) of the searched groups."""
    groups = problem.searched
    for formats in itertools.product(*(list(g.rows) for g in groups)):
        yield list(zip(groups, formats, strict=True))


def _choices_ms(directory: Any, latency: Latency) -> tuple[dict[tuple[str, str], float], float]:
    """Time of every (group, format), and of the rest, from the run's files.

    By the formulas of the docstring, and by nothing of ours.
    """
    plan = RunState.open(directory).values["plan"]
    batch, bandwidth = latency.batch, latency.hardware.memory_bandwidth.value
    rates = {pair: figure.value for pair, figure in latency.hardware.matmul_rates.items()}
    pairs = {"wint4_afp16": "16x16", "wfp8_afp8": "fp8xfp8", NONE: "16x16"}
    times = {}
    for row in directory.read_table("plan.parquet", "plan").to_pylist():
        share = plan["step"]["active_expert_ratio"] if "experts" in row["group"] else 1.0
        num_bytes = row["weight_bytes"] * (1 - (1 - share) ** batch)
        operations = 2 * row["num_weights"] * batch * share
        seconds = max(num_bytes / bandwidth, operations / rates[pairs[row["format"]]])
        times[row["group"], row["format"]] = 1000 * seconds
    other = plan["step"]["other_bytes"]
    rest = max(other / bandwidth, other * batch / rates["16x16"])
    for kind in plan["step"]["attention"]:
        cached = batch * latency.context
        traffic, operations = cached * kind["kv_bytes"], 4 * cached * kind["width"]
        rest += kind["layers"] * max(traffic / bandwidth, operations / rates["16x16"])
    return times, 1000 * rest


def _step_ms(directory: Any, formats: Mapping[str, str], latency: Latency) -> float:
    times, rest = _choices_ms(directory, latency)
    groups = dict.fromkeys(group for group, _ in times)
    return rest + math.fsum(times[group, formats.get(group, NONE)] for group in groups)


def _everything(directory: Any, latency: Latency) -> tuple[Any, Any, Any]:
    """Times, bytes of the model and losses of all allocations, in one order."""
    problem, scores = load_problem(RunState.open(directory))
    groups = problem.searched
    ms, rest = _choices_ms(directory, latency)
    rest += sum(ms[g.name, NONE] for g in problem.unsearched)
    times = rest + _every_sum([[ms[g.name, f] for f in g.rows] for g in groups])
    fixed = problem.other_bytes + sum(g.cost(NONE, "model") for g in problem.unsearched)
    sizes = fixed + _every_sum([[g.cost(f, "model") for f in g.rows] for g in groups])
    losses = _every_sum([[0.0 if f == NONE else scores[g.name, f] for f in g.rows] for g in groups])
    return times, sizes, losses


def _every_sum(rows: list[list[float]]) -> Any:
    """Sums over all combinations of one number per row."""
    total = np.zeros(1)
    for row in rows:
        total = np.add.outer(total, row).ravel()
    return total


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("llama", 48), ("qwen3_moe", 4)])
@pytest.mark.parametrize("with_bytes", [False, True])
def test_limits_on_time_and_bytes_give_the_best_allocation(
    family: str, batch: int, with_bytes: bool, make_run: Any
) -> None:
    directory = make_run(family, formats=FORMATS)
    # 24 operations in the time of a byte: at batch 48 FP8 computes and INT4 reads fewer bytes.
    latency = Latency(hardware=card(1e9, _16x16=48e9, fp8xfp8=96e9), batch=batch, context=64)
    problem, scores = load_problem(RunState.open(directory))
    times, sizes, losses = _everything(directory, latency)
    for share in (0.02, 0.3, 0.55, 0.9):
        limit_ms = times.min() + share * (times.max() - times.min())
        limit_bytes = round(sizes.min() + (1.02 - share) * (sizes.max() - sizes.min()))
        is_within = times <= limit_ms * (1 + 1e-12)
        if with_bytes:
            is_within &= sizes <= limit_bytes
        within = losses[is_within].tolist()
        options = SolveOptions(
            bytes=limit_bytes if with_bytes else None,
            latency=dataclasses.replace(latency, ms_per_token=float(limit_ms)),
        )
        if not within:
            with pytest.raises(InfeasibleBudgetError):
                search(problem, scores, options)
            continue
        solution = solve_run(directory, options)
        assert solution.summary["predicted_kl_nats"] == pytest.approx(min(within), rel=1e-9)
        found = solution.summary["latency"]
        assert found["ms_per_token"] <= limit_ms * (1 + 1e-9)
        recomputed = _step_ms(directory, solution.formats, latency)
        assert found["ms_per_token"] == pytest.approx(recomputed, rel=1e-9)


def test_throughput_counts_the_whole_batch(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    hardware = card(1e9, _16x16=48e9, fp8xfp8=96e9)
    fast = solve_run(directory, SolveOptions(bits=8, latency=Latency(hardware=hardware, batch=8)))
    speed = fast.summary["latency"]
    assert speed["tokens_per_second"] == pytest.approx(8000 / speed["ms_per_token"])
    by_speed, by_time = (
        solve_run(directory, SolveOptions(latency=Latency(hardware=hardware, batch=8, **limit)))
        for limit in (
            {"tokens_per_second": speed["tokens_per_second"] * (1 - 1e-9)},
            {"ms_per_token": speed["ms_per_token"] * (1 + 1e-9)},
        )
    )
    assert by_speed.formats == by_time.formats
    assert by_speed.summary["latency"]["tokens_per_second"] >= speed["tokens_per_second"] * 0.999999


def test_without_a_limit_the_plan_is_that_of_the_other_budget(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    plain = solve_run(directory, SolveOptions(bits=7))
    told = solve_run(directory, SolveOptions(bits=7, latency=latency_of("h100")))
    assert told.formats == plain.formats
    assert "latency" not in plain.summary
    assert {plain.name, told.name} >= {"bits-7.00"}
    assert told.name != plain.name


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"ms_per_token": 1e-9}, r"--ms-per-token 1e-09 on NVIDIA H100 SXM .* reachable is "),
        ({"tokens_per_second": 1e12}, r"--tokens-per-second 1e\+12 on .* tokens per second"),
    ],
)
def test_speed_that_cannot_be_reached_names_the_range(
    limit: dict[str, float], words: str, make_run: Any
) -> None:
    directory = make_run(formats=FORMATS)
    with pytest.raises(InfeasibleBudgetError, match=words) as caught:
        solve_run(directory, SolveOptions(latency=latency_of("h100", batch=3, **limit)))
    low, high = str(caught.value).partition("reachable is ")[2].split(" ")[:3:2]
    assert float(low) < float(high)
    name = next(iter(limit))
    best = float(low) if name == "ms_per_token" else float(high)
    solution = solve_run(
        directory, SolveOptions(latency=latency_of("h100", batch=3, **{name: best}))
    )
    assert solution.summary["is_satisfied"]
    beyond = best * (0.998 if name == "ms_per_token" else 1.002)
    with pytest.raises(InfeasibleBudgetError):
        solve_run(directory, SolveOptions(latency=latency_of("h100", batch=3, **{name: beyond})))


# --- what is written and read back


def test_solution_keeps_the_card_and_the_load(make_run: Any, tmp_path: Path) -> None:
    directory = make_run(formats=FORMATS)
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(card(1e9, _16x16=48e9).model_dump(exclude_none=True)))
    latency = latency_of(str(path), batch=2, context=32, ms_per_token=0.2)
    solution = solve_run(directory, SolveOptions(bytes=200_000, latency=latency))
    path.unlink()
    start = f"solutions/{solution.name}/"
    state = RunState.open(directory)
    options = solution_options(state, start)
    assert options.latency == latency
    assert options.bytes == 200_000
    candidates = collect_candidates(state, start, ("uniform", "modelopt", "random"), num_random=3)
    assert candidates[0].formats.items() <= solution.formats.items()
    assert len(candidates) >= 1 + 1 + 3
    for candidate in candidates:
        assert _step_ms(directory, candidate.formats, _without_fp8(latency)) <= 0.2 * (1 + 1e-9)
    problem, scores = load_problem(state)
    swaps = Swaps(problem.timed(options.latency), scores, options)
    own = candidates[0].formats
    assert swaps.fits(own)
    tried = list(swaps.proposals(own))
    assert tried
    for change in tried:
        changed = {**own, **dict(change)}
        assert _step_ms(directory, changed, _without_fp8(latency)) <= 0.2 * (1 + 1e-9)


def _without_fp8(latency: Latency) -> Latency:
    """The same card with the rate at which it runs FP8 written out: the 16-bit one."""
    rate = latency.hardware.rate("16", "16")
    hardware = card(latency.hardware.bytes_per_second, _16x16=rate, fp8xfp8=rate)
    return dataclasses.replace(latency, hardware=hardware)


def test_names_differ_by_card_load_and_speed(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    loads: list[dict[str, Any]] = [{}, {"batch": 2}, {"context": 7}, {"ms_per_token": 1}]
    loads += [{"tokens_per_second": 9}]
    options = [SolveOptions(bits=8, latency=latency_of("h100", **load)) for load in loads]
    options += [SolveOptions(bits=8, latency=latency_of("a100")), SolveOptions(bits=8)]
    names = [solve_run(directory, one).name for one in options]
    assert len(set(names)) == len(options)
    assert names[-1] == "bits-8.00"
    assert names[3].startswith("bits-8.00-ms-1-")
    assert names[4].startswith("bits-8.00-tps-9-")


def test_three_limits_at_once_give_the_best_allocation(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    latency = Latency(hardware=card(1e9, _16x16=48e9, fp8xfp8=96e9), batch=48, context=8)
    times, sizes, losses = _everything(directory, latency)
    problem, scores = load_problem(RunState.open(directory))
    weights = sum(g.num_weights for g in problem.searched)
    outside = problem.other_bytes + sum(g.cost(NONE, "model") for g in problem.unsearched)
    for bits, byte_share, time_share in ((9, 0.5, 0.4), (7, 0.4, 0.5), (8, 0.9, 0.3)):
        limit_bytes = round(sizes.min() + byte_share * (sizes.max() - sizes.min()))
        limit_ms = float(times.min() + time_share * (times.max() - times.min()))
        is_within = (times <= limit_ms) & (sizes <= limit_bytes)
        is_within &= (sizes - outside) * 8 / weights <= bits
        limited = dataclasses.replace(latency, ms_per_token=limit_ms)
        options = SolveOptions(bits=bits, bytes=limit_bytes, latency=limited)
        assert is_within.any()
        assert search(problem, scores, options).score == pytest.approx(
            losses[is_within].min(), rel=1e-9
        )


def test_imported_or_earlier_run_is_refused(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    values = directory.read_json("run.json")
    del values["plan"]["step"]
    directory.write_json("run.json", values)
    solve_run(directory, SolveOptions(bits=8))
    with pytest.raises(ConfigError, match="made by an earlier version"):
        solve_run(directory, SolveOptions(bits=8, latency=latency_of("h100")))


# --- the command line


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["solve", *map(str, arguments)])


def test_command_tells_speed_card_and_that_it_is_a_bound(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    done = run(directory.uri, "--latency", "a100", "--batch", 4, "--tokens-per-second", 1000)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "ms per token" in line]
    assert "NVIDIA A100 SXM 80GB (batch 4, context 1024)" in line
    assert line.endswith("roofline bound, not a measurement")
    (name,) = directory.list_folders("solutions")
    report = Path(directory.uri, "solutions", name, "report.md").read_text()
    assert "**Predicted decode speed:**" in report
    assert "at least 1000 tokens/s on NVIDIA A100 SXM 80GB" in report


def test_command_names_formats_without_units(make_run: Any) -> None:
    directory = make_run(formats=("wfp8_afp8",))
    low = ("--latency", "a100", "--bits", 8.5)
    done = run(directory.uri, *low, "--json")
    assert json.loads(done.stdout)["latency"]["formats_without_units"] == ["wfp8_afp8"]
    done = run(directory.uri, *low)
    assert "the card has no units for wfp8_afp8" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--latency", "h1000", "--bits", 8), "'h1000' is neither a card"),
        (("--bits", 8, "--tokens-per-second", 5), "--tokens-per-second needs a card"),
        (("--bits", 8, "--batch", 5), "--batch needs a card"),
        (("--latency", "h100", "--bits", 8, "--batch", 0), "'--batch': 0 is not in the range"),
        (("--latency", "h100", "--bits", 8, "--context", 0), "'--context': 0"),
        (("--latency", "h100"), "give a budget"),
        (("--latency", "h100", "--ms-per-token", 0), "--ms-per-token 0.0 must be"),
        (("--latency", "h100", "--ms-per-token", "nan"), "--ms-per-token nan must be"),
        (("--latency", "h100", "--tokens-per-second", "inf"), "--tokens-per-second inf must be"),
        (
            ("--latency", "h100", "--tokens-per-second", 5, "--ms-per-token", 5),
            "exclude each other",
        ),
    ],
)
def test_wrong_options_are_refused(arguments: Any, words: str, make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    done = run(directory.uri, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert directory.list_folders("solutions") == []


def test_unreachable_speed_exits_4(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    done = run(directory.uri, "--latency", "h100", "--ms-per-token", 1e-7)
    assert done.exit_code == 4
    assert len(done.stderr.splitlines()) == 1
    assert "ms per token" in done.stderr
    assert directory.list_folders("solutions") == []


def test_a_speed_has_one_name_however_it_is_written() -> None:
    whole = SolveOptions(latency=latency_of("h100", tokens_per_second=10))
    assert solution_name(whole) == solution_name(
        SolveOptions(latency=latency_of("h100", tokens_per_second=10.0))
    )


def test_card_without_a_load_is_refused() -> None:
    with pytest.raises(ConfigError, match="latency_of"):
        SolveOptions(bits=6, latency="h100")  # type: ignore[arg-type]
