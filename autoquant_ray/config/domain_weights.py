"""Weights of domains: as people write them, and made to sum to 1."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autoquant_ray.errors import ConfigError

_ROUNDING = 1e-9


def parse_weights(text: str) -> dict[str, float]:
    """Parse ``code=0.5,chat=0.5``.

    Raises:
        ConfigError: Not of that form, or a domain twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        name = name.strip()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or math.isnan(weight):
            raise ConfigError(
                f"`domains`: {part.strip()!r} is not NAME=WEIGHT; write for example "
                "code=0.5,chat=0.5"
            )
        if name in weights:
            raise ConfigError(f"`domains`: {name!r} is named twice; give it one weight")
        weights[name] = weight
    return weights


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that sum to 1, by name; those that already do, up to rounding, stay as they are.

    Raises:
        ConfigError: A weight is negative or not finite, or all are 0.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ConfigError(f"`domains`: the weight of {name!r} must be 0 or more, not {weight}")
    total = math.fsum(weights.values())
    if weights and not 0 < total < math.inf:
        raise ConfigError("`domains`: all weights are 0; give one domain a weight above 0")
    scale = 1.0 if abs(total - 1) <= _ROUNDING else total
    return {name: weights[name] / scale for name in sorted(weights) if weights[name] > 0}


def check_objective(weights: Mapping[str, float], worst_domain: bool) -> None:
    """Check that one thing at most is asked to be least.

    Raises:
        ConfigError: Both are.
    """
    if weights and worst_domain:
        raise ConfigError("`domains` and `worst_domain` exclude each other; give one of them")
