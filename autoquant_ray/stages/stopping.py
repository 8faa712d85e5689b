"""The stopping rule of a run: made from its config, fed from its files, noted in ``run.json``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from autoquant_ray.allocate.certainty.stopping import (
    MIN_SHARDS,
    StoppingRule,
    budget_knapsack,
    part_sums,
    scored_choices,
)
from autoquant_ray.allocate.options import solve_options
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import served_problems
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.formats.format import NONE
from autoquant_ray.plan.plan import Plan
from autoquant_ray.runs.names import SAMPLES, SCORES, part_name
from autoquant_ray.runs.record import UsedData
from autoquant_ray.runs.state import RunState

logger = logging.getLogger(__name__)


def make_rule(state: RunState, plan: Plan) -> StoppingRule | None:
    """The rule that the run's config asks for."""
    config = ScanConfig.model_validate(state.config)
    if config.stop_when_stable is None:
        return None
    if state.num_shards <= MIN_SHARDS:
        logger.warning(
            "`stop_when_stable` has no effect on %d shards: it needs more than %d; make them "
            "smaller with `shard_samples`",
            state.num_shards,
            MIN_SHARDS,
        )
    if config.max_formats is not None:
        logger.warning("`stop_when_stable` does not consider `max_formats`")
    if config.engine is not None:
        logger.warning(
            "`stop_when_stable` considers only the first set of formats that %s serves together",
            config.engine,
        )
    problem, options = Problem.from_plan(plan.rows(), plan.summary()), solve_options(config)
    formats = [format_.name for format_ in plan.formats]
    served = served_problems(problem, options)[0].served
    costs = budget_knapsack(problem, options, formats)
    has_GF = scored_choices(costs)
    if served is not None:
        permitted = [served.permitted[group.name] for group in problem.searched]
        costs = costs.keep(
            np.array([[f in names for f in (*formats, NONE)] for names in permitted])
        )
    return StoppingRule(
        costs,
        threshold=config.stop_when_stable,
        num_shards=state.num_shards,
        seed=config.seed,
        has_GF=has_GF,
    )


def is_enough(state: RunState, rule: StoppingRule, shard: int) -> bool:
    """Give the rule a shard that has its part or is left out; logs each check that it makes."""
    sums_K = None
    if shard not in state.left_out:
        table = state.directory.read_table(part_name(SCORES, shard))
        sums_K = part_sums(table, state.config["estimator"])
    num_checks = len(rule.checks)
    is_enough = rule.add(shard, sums_K)
    for check in rule.checks[num_checks:]:
        regret = check.expected_regret
        shown = "unknown" if regret is None else f"{regret:.2%}"
        logger.info("expected regret after %d shards: %s", check.shards, shown)
        state.directory.append_event(
            "stability_checked", shards=check.shards, expected_regret=regret
        )
    return is_enough


def keep_used(state: RunState, rule: StoppingRule) -> None:
    """Note the decision, and forget everything about the shards after it."""
    state.record.stopping = rule.summary()
    state.record.quarantined = [
        entry
        for entry in state.record.quarantined
        if entry["shard"] < rule.end or entry["stage"] != "score"
    ]
    state.save()
    for shard in state.directory.list_parts(SCORES):
        if shard >= rule.end:
            state.directory.delete(part_name(SCORES, shard))


def used_data(state: RunState, shards: Sequence[int]) -> UsedData:
    """Numbers of shards, samples and tokens that the result is made of."""
    dataset = state.record.dataset
    if len(shards) == state.num_shards:
        num_samples, num_tokens = dataset["num_samples"], dataset["num_tokens"]
    else:
        tables = (state.directory.read_table(part_name(SAMPLES, s)) for s in shards)
        lengths = [pc.list_value_length(table.column("tokens")) for table in tables]
        num_samples = sum(len(column) for column in lengths)
        num_tokens = sum(pc.sum(column).as_py() for column in lengths)
    return {"num_shards": len(shards), "num_samples": num_samples, "num_tokens": num_tokens}
