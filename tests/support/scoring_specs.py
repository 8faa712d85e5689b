"""What a scorer of a small model computes in tests."""

from __future__ import annotations

from typing import Any

from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.models.find import ModelRef
from autoquant_ray.plan.plan import Plan
from autoquant_ray.plan.scored_modules import scored_modules

IN_MEMORY = ModelRef(name="in memory", path="unused")
"""A model that is given to the scorer."""


def scoring_spec(plan: Plan, **fields: Any) -> ScoringSpec:
    """Spec of a scorer: all modules on a CPU, in a single step, by the data's labels.

    Args:
        plan: The plan.
        fields: Others than these.
    """
    values: dict[str, Any] = {
        "model": IN_MEMORY,
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "modules": scored_modules(plan),
        "formats": plan.formats,
        "step_tokens": 100_000,
        "labels": "data",
        "label_draws": 1,
        "seed": 0,
    }
    return ScoringSpec(**values | fields)
