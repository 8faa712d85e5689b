"""How much a scan computes, from the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoquant_ray.plan import PlannedGroup


def flops_per_token(model: Any, groups: Sequence[PlannedGroup], num_formats: int) -> int:
    """Matrix products of a scan per token: calibration, forward, recompute, backward, formats.

    Routed experts count by the share of them that a token visits.
    """
    text_config = model.config.get_text_config()
    visited = getattr(text_config, "num_experts_per_tok", None) or 1
    total = 0.0
    for group in groups:
        for module in group.modules:
            share = min(1.0, visited / module.shapes[0][0]) if module.kind == "experts" else 1.0
            products = 4 + num_formats if group.is_searched else 4
            total += 2 * module.num_weights * share * products
    return round(total)
