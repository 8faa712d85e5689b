"""The weight cache keeps to its limit and drops what was not used for longest."""

from __future__ import annotations

import torch

from autoquant_ray.quantize.weight_cache import WeightCache


def test_weight_cache_makes_once_and_drops_the_least_recently_used() -> None:
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return torch.zeros(10)

    cache = WeightCache(limit=2 * 40)
    for name in ("a", "b", "a", "c", "a", "b"):
        cache.get(name, lambda n=name: make(n))
        assert cache.nbytes <= cache.limit
    assert made == ["a", "b", "c", "b"]


def test_weight_cache_that_shrinks_drops_what_exceeds_it() -> None:
    cache = WeightCache(limit=80)
    second = [cache.get(name, lambda: torch.zeros(10)) for name in ("a", "b")][1]
    cache.resize(40)
    assert cache.nbytes == 40
    assert cache.get("b", lambda: torch.ones(10)) is second
    cache.resize(0)
    assert cache.nbytes == 0


def test_weight_cache_does_not_keep_what_exceeds_its_limit() -> None:
    cache = WeightCache(limit=39)
    first = cache.get("a", lambda: torch.zeros(10))
    assert cache.get("a", lambda: torch.ones(10)) is not first
    assert cache.nbytes == 0
