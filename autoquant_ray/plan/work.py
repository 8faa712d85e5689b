"""How much a scan computes, from the plan alone, and how much of it at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoquant_ray.formats.smoothed import num_search_products

if TYPE_CHECKING:
    from autoquant_ray.formats.format import Format
    from autoquant_ray.plan.group import PlannedGroup

_CHUNK_ELEMENTS = {"cpu": 2**20}
_CHUNK_ELEMENTS_ELSEWHERE = 2**26
_MIN_CHUNK_ROWS = 512  # fewer make the product itself slower


def flops_per_token(model: Any, groups: Sequence[PlannedGroup], formats: Sequence[Format]) -> int:
    """Matrix products of a scan per token: calibration, forward, recompute, backward, formats.

    Routed experts count by the share of them that a token visits. AWQ's search is one more forward
    pass, and a product per candidate. For a cache the projections of
    its attention run again, once per format and once exactly.
    """
    num_candidates = sum(map(num_search_products, formats))
    num_passes = 4 + (1 if num_candidates else 0)
    num_caches = sum(format_.kv is not None for format_ in formats)
    num_formats = len(formats) - num_caches
    attentions = {group.modules[0].name for group in groups if group.is_cache and group.is_searched}
    text_config = model.config.get_text_config()
    visited = getattr(text_config, "num_experts_per_tok", None) or 1
    total = 0.0
    experts = Counter(module.path for group in groups for module in group.modules)
    for group in groups:
        for module in group.modules:
            if not module.num_elements:
                continue
            count = {"experts": module.shapes[0][0], "expert": experts[module.path]}
            share = min(1.0, visited / count.get(module.kind, 1))
            products = num_passes + (num_formats if group.is_searched else 0)
            if group.is_searched and module.kind == "linear":
                products += num_candidates
            products += (1 + num_caches) * (module.name.rpartition(".")[0] in attentions)
            total += 2 * module.num_elements * share * products
    return round(total)


def chunk_rows(width: int, device: str) -> int:
    """Rows whose output differences are computed together.

    Args:
        width: Of the output.
        device: ``cpu`` or ``cuda``.
    """
    elements = _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS_ELSEWHERE)
    return max(_MIN_CHUNK_ROWS, elements // width)
