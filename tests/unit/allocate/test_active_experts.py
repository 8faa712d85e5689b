"""ModelOpt's ``active_moe`` cost of routed experts, and budgets in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from step_by_hand import FORMATS, every_allocation, plan_of

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run


def test_active_moe_cost_is_modelopts(make_model: Any) -> None:
    from modelopt.torch.quantization._auto_quantize_cost import (
        _get_module_weight_numel,
        get_auto_quantize_cost_model,
        normalize_auto_quantize_constraints,
    )

    model = make_model("qwen3_moe")
    plan = plan_of(model)
    problem = Problem.from_plan(plan.rows(), plan.summary())
    constraints = normalize_auto_quantize_constraints(
        model, {"effective_bits": 6.0, "cost_model": "active_moe"}
    )
    theirs = get_auto_quantize_cost_model("active_moe")
    modules = dict(model.named_modules())
    weighted = set()
    for group in problem.groups.values():
        factor = theirs.module_cost_weight(group.module_names, constraints["cost"])
        weighted.add(factor)
        numel = sum(_get_module_weight_numel(modules[name]) for name in group.module_names)
        assert group.weights("active_moe") == numel * factor
        for format_ in [*plan.formats, None]:
            name = NONE if format_ is None else format_.name
            compression = 1.0 if format_ is None else format_.modelopt_compression
            expected = numel * factor * compression
            assert group.cost(name, "active_moe") == pytest.approx(expected, rel=1e-12)
    assert weighted == {1.0, 0.25}


def test_active_moe_budget_is_met_and_tight(make_run: Any) -> None:
    directory = make_run("qwen3_moe", formats=FORMATS)
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    options = SolveOptions(bits=8.5, bits_over="all", cost="active_moe")
    allocation = search(problem, scores, options)
    total = sum(g.weights("active_moe") for g in problem.groups.values())
    outside = sum(g.cost(NONE, "active_moe") for g in problem.unsearched)
    assert (allocation.costs["active_moe"] + outside) * 16 / total <= 8.5 * (1 + 1e-9)
    best = min(
        math.fsum(0.0 if f == NONE else scores[g.name, f] for g, f in chosen)
        for chosen in every_allocation(problem)
        if (math.fsum(g.cost(f, "active_moe") for g, f in chosen) + outside) * 16 / total <= 8.5
    )
    assert allocation.score == pytest.approx(best, rel=1e-9)
    solution = solve_run(directory, options)
    assert solution.summary["active_moe_effective_bits"] <= 8.5
    assert solution.summary["active_moe_effective_bits"] != pytest.approx(
        solution.summary["modelopt_effective_bits"]
    )


def test_active_moe_without_experts_is_refused(make_run: Any) -> None:
    with pytest.raises(ConfigError, match="`cost` active_moe needs the share of the experts"):
        solve_run(make_run(), SolveOptions(bits=8, cost="active_moe"))
