"""A made-up card, and times, bytes and losses of every allocation by formulas written here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoquant_ray.allocate.cards import Hardware
from autoquant_ray.allocate.load import Latency
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.runs.state import RunState

FORMATS = ("wint4_afp16:max", "wfp8_afp8")


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


def plan_of(model: Any) -> Plan:
    return build_plan(model, resolve_formats(FORMATS, device="cpu"))


def every_allocation(problem: Problem) -> Any:
    """Every allocation, as (group, format) of the searched groups."""
    groups = problem.searched
    for formats in itertools.product(*(list(g.rows) for g in groups)):
        yield list(zip(groups, formats, strict=True))


def choices_ms(directory: Any, latency: Latency) -> tuple[dict[tuple[str, str], float], float]:
    """Time of every (group, format), and of the rest, from the run's files.

    By the formulas of the docstring, and by nothing of ours.
    """
    plan = RunState.open(directory).record.plan
    batch, bandwidth = latency.batch, latency.hardware.memory_bandwidth.value
    rates = {pair: figure.value for pair, figure in latency.hardware.matmul_rates.items()}
    pairs = {"wint4_afp16:max": "16x16", "wfp8_afp8": "fp8xfp8", NONE: "16x16"}
    times = {}
    for row in directory.read_table("plan.parquet").to_pylist():
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


def step_ms(directory: Any, formats: Mapping[str, str], latency: Latency) -> float:
    times, rest = choices_ms(directory, latency)
    groups = dict.fromkeys(group for group, _ in times)
    return rest + math.fsum(times[group, formats.get(group, NONE)] for group in groups)


def times_sizes_losses(directory: Any, latency: Latency) -> tuple[Any, Any, Any]:
    """Times, bytes of the model and losses of all allocations, in one order."""
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    groups = problem.searched
    ms, rest = choices_ms(directory, latency)
    rest += sum(ms[g.name, NONE] for g in problem.unsearched)
    times = rest + every_sum([[ms[g.name, f] for f in g.rows] for g in groups])
    fixed = problem.other_bytes + sum(g.cost(NONE, "storage") for g in problem.unsearched)
    sizes = fixed + every_sum([[g.cost(f, "storage") for f in g.rows] for g in groups])
    losses = every_sum([[0.0 if f == NONE else scores[g.name, f] for f in g.rows] for g in groups])
    return times, sizes, losses


def every_sum(rows: list[list[float]]) -> Any:
    """Sums over all combinations of one number per row."""
    total = np.zeros(1)
    for row in rows:
        total = np.add.outer(total, row).ravel()
    return total
