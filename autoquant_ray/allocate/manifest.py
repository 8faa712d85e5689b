"""An allocation -> the manifests that people and ``mtq.quantize`` read.

Needs neither torch nor the model: everything stands in the run directory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.group_choices import ACTIVE_MOE, Scores
from autoquant_ray.allocate.kv_caches import cache_summary
from autoquant_ray.allocate.latency import LATENCY
from autoquant_ray.allocate.losses import average_bits, chosen_formats, model_bytes
from autoquant_ray.allocate.options import BITS_PER_BYTE, SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.quant_cfg import is_linear
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.stored_size import format_bits
from autoquant_ray.runs.directory import SCHEMA_VERSION
from autoquant_ray.runs.record import RunRecord


def solution_summary(
    problem: Problem, allocation: Allocation, scores_are_nats: bool
) -> dict[str, Any]:
    """The ``solution`` object of ``manifest.json``.

    ``effective_bits`` is that of the searched groups, ``effective_bits_all`` that of all
    quantizable ones; ``weight_bytes`` is the whole model's weights. ``predicted_kl_nats`` is
    null where the scores have no unit (an imported ModelOpt manifest). With routed experts it has
    ``active_moe_effective_bits``; with caches to choose ``kv_bytes_per_token``; with a card,
    ``latency``
    (:meth:`~autoquant_ray.allocate.latency.StepTime.prediction`); with tensors that are not loaded,
    which ``weight_bytes`` counts, their ``carried_bytes``.
    """
    formats = chosen_formats(problem, allocation)
    everything = list(problem.groups.values())
    more: dict[str, Any] = {}
    if problem.has_active_moe:
        more["active_moe_effective_bits"] = average_bits(everything, formats, ACTIVE_MOE, 16)
    if problem.step is not None:
        more[LATENCY] = problem.step.prediction(everything, formats)
    if problem.carried:
        more["carried_bytes"] = sum(problem.carried.values())
    return {
        "effective_bits": average_bits(problem.searched, formats),
        "effective_bits_all": average_bits(everything, formats),
        "modelopt_effective_bits": average_bits(everything, formats, "modelopt", 16),
        "weight_bytes": model_bytes(problem, formats),
        "score": allocation.score,
        "predicted_kl_nats": allocation.score if scores_are_nats else None,
        "is_satisfied": allocation.is_satisfied,
        "optimality_gap": allocation.optimality_gap,
        **cache_summary(problem.caches, formats),
    } | more


def manifest_rows(
    problem: Problem, formats: Mapping[str, str], scores: Scores, summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of ``manifest.parquet``: one per module. ``score`` is that of the module's group.

    ``weight_bytes`` sum to what the groups take of the model's bytes.
    """
    menu = {
        entry["name"]: Format.from_json(entry)
        for entry in summary["formats"]
        if entry.get("weight")
    }
    rows = []
    for group in problem.groups.values():
        chosen = formats[group.name]
        is_embedding = group.shares_embedding(chosen)
        for module in group.module_names:
            facts = summary["modules"][module]
            is_shared = is_embedding or "shared_with" in facts
            shapes = [tuple(shape) for shape in facts["shapes"]]
            weights = sum(math.prod(shape) for shape in shapes)
            row = group.rows[chosen]
            bits = float(weights) * row["weight_bits"]
            if chosen in menu:
                format_, linear = menu[chosen], is_linear(facts)
                bits = float(sum(format_bits(format_, s, is_linear=linear) for s in shapes))
            rows.append(
                {
                    "module": module,
                    "group": group.name,
                    "format": chosen,
                    "weight_bits": bits / weights if weights else row["weight_bits"],
                    "weight_bytes": 0.0 if is_shared else bits / BITS_PER_BYTE,
                    "score": 0.0 if chosen == NONE else scores[group.name, chosen],
                }
            )
    return rows


def build_manifest(
    run: RunRecord,
    options: SolveOptions,
    solution: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    stability: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Content of ``manifest.json``.

    Args:
        run: Content of ``run.json``. The manifest's ``dataset`` also holds its ``used`` (shards,
            samples and tokens behind the scores) and ``stopping``, null where it has none.
        options: Budget and constraints that were solved for.
        solution: From :func:`solution_summary`.
        config: From :func:`quantization_config`.
        stability: What resampling says of the allocation; None where nothing was resampled.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.run_id,
        "model": run.model,
        "dataset": {**run.dataset, "used": run.used, "stopping": run.stopping},
        "budget": options.to_json(),
        "solution": dict(solution),
        "quantization_config": config,
        "stability": stability,
    }
