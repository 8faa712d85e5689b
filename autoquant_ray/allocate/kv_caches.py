"""The limit on the KV cache as a budget: bytes that a token of context takes over all layers.

Weights and caches are separate resources: a cache takes no bytes of the weights' budgets, and what
one leaves the other cannot use. Only the loss is shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autoquant_ray.allocate.allocation import Budget
from autoquant_ray.arrays import Indices
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES, KV_OPTION, limit_problem, reachable_cache

if TYPE_CHECKING:
    from autoquant_ray.allocate.group_choices import GroupChoices


def require_cache_limit(caches: Sequence[GroupChoices], limit: float | None) -> None:
    """Refuse to choose formats of caches without a limit, or to limit what has no choice.

    Raises:
        ConfigError: Names the option and the remedy.
    """
    reason = limit_problem(any(group.is_searched for group in caches), limit)
    if reason is not None:
        raise ConfigError(reason)


def cache_budget(caches: Sequence[GroupChoices], limit: float | None) -> list[Budget]:
    """The limit on the searched caches; none without one.

    Args:
        caches: Groups that are caches.
        limit: Bytes per token of context of the whole model; caches that are not searched count in
            16 bits.
    """
    if limit is None:
        return []
    fixed = math.fsum(g.cost(NONE, KV_BYTES) for g in caches if not g.is_searched)
    return [
        Budget(
            resource=KV_BYTES,
            limit=limit - fixed,
            unit_per_bit=None,
            description=f"{KV_OPTION} {limit:g}",
            fixed=fixed,
            reachable=reachable_cache,
        )
    ]


def shuffled_order(groups: Sequence[GroupChoices], generator: np.random.Generator) -> Indices:
    """An order of groups that puts weights in the places of weights, caches in those of caches."""
    order = np.arange(len(groups), dtype=np.intp)
    for is_cache in (False, True):
        places = np.flatnonzero([group.is_cache == is_cache for group in groups])
        order[places] = places[generator.permutation(len(places))]
    return order


def cache_summary(caches: Sequence[GroupChoices], formats: Mapping[str, str]) -> dict[str, Any]:
    """What a solution's summary says of the cache: its bytes per token; nothing without caches.

    Args:
        caches: Groups that are caches.
        formats: Group -> format.
    """
    if not caches:
        return {}
    total = math.fsum(group.cost(formats[group.name], KV_BYTES) for group in caches)
    return {KV_BYTES: total}
