"""What single changes of an allocation are predicted to do: from the parts of workers.

A *flip* gives one group another format. Around an allocation, in nats per token,

    change(flip)       slope + w curvature
    change(a and b)    change(a) + change(b) + w interaction

the latter for two groups of one MLP or attention whose interaction is notable and more than two
standard errors over shards from 0, with the sums of
:mod:`autoquant_ray.score.flip_hooks`. The curvatures take the errors of different outputs for
unrelated, and half of them orders measured flips best (docs/refine.md); around a loss near 0, where
slopes vanish, any share above 0 gives the same order. Where the loss is quadratic in the errors of
quantization, w is that half. A large loss grows more slowly, and there the curvature of the Fisher
matrix is too large. How it grows is seen from the slope of undoing all quantization at once: a loss
that grows like the p-th power of the size of all errors has slope ``-p KL`` there, and the second
derivative ``p (p - 1) KL`` in place of ``2 KL``. So ``w = p (p - 1) / 4``, 0 at least, 1/2 at most.

Shards are added in their order in float64, so that the numbers do not depend on which worker had
which shard.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from autoquant_ray.formats.format import NONE

if TYPE_CHECKING:
    from autoquant_ray.evaluate.flip_estimator import ShardFlips

Flip = tuple[str, str]
"""(group, its new format)."""

_NOTABLE = 0.1
"""Share of the two changes from which on their interaction counts."""

_NUM_ERRORS = 2.0
"""Standard errors over shards by which it must differ from 0."""

_CURVATURE_SHARE = 0.5
"""Of the curvature, where the loss is quadratic: from ``benchmarks/flip_order.py``."""


@dataclass(frozen=True, kw_only=True)
class FlipEstimates:
    """Predicted changes around an allocation, in nats per token.

    Attributes:
        changes: Of each flip.
        interactions: Of two flips, each pair in both orders; only where the two interact notably.
    """

    changes: Mapping[Flip, float]
    interactions: Mapping[tuple[Flip, Flip], float] = field(default_factory=dict)


def flip_rows(
    shard: ShardFlips, groups: Sequence[str], formats: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of a shard's part.

    Args:
        shard: From a worker.
        groups: Names by index.
        formats: Names by index.
    """
    names, sums = [*formats, NONE], shard.sums
    totals = {"kl": shard.kl, "num_tokens": shard.num_tokens}
    rows = [
        {
            "group": group,
            "format": name,
            "slope": float(sums.slope_GF[g, f]),
            "curvature": float(sums.curvature_GF[g, f]),
            **totals,
        }
        for (g, group), (f, name) in itertools.product(enumerate(groups), enumerate(names))
    ]
    return rows + [
        {
            "group": groups[first],
            "format": names[f],
            "partner": groups[second],
            "partner_format": names[p],
            "interaction": float(sums_FF[f, p]),
            **totals,
        }
        for (first, second), sums_FF in sums.interactions.items()
        for f, p in itertools.product(range(len(names)), repeat=2)
    ]


def merge_flips(parts: Iterable[pa.Table], formats: Mapping[str, str]) -> FlipEstimates:
    """Add the parts of all shards, in the given order.

    Args:
        parts: Tables of :func:`flip_rows`.
        formats: The allocation; what it does not name is left out.
    """
    slopes: dict[Flip, list[float]] = {}
    curvatures: dict[tuple[Flip, ...], list[float]] = {}
    totals = []
    for table in parts:
        rows = table.to_pylist()
        totals.append((rows[0]["kl"], rows[0]["num_tokens"]))
        for row in rows:
            flip, partner = (row["group"], row["format"]), (row["partner"], row["partner_format"])
            if row["partner"] is None:
                slopes.setdefault(flip, []).append(row["slope"])
                curvatures.setdefault((flip,), []).append(row["curvature"])
            else:
                curvatures.setdefault((flip, partner), []).append(row["interaction"])
    kl, num_tokens = (math.fsum(column) for column in zip(*totals, strict=True))
    undone = math.fsum(slope for flip, of in slopes.items() if flip[1] == NONE for slope in of)
    weight = _curvature_weight(undone, kl)
    second = {flips: weight * math.fsum(of) / num_tokens for flips, of in curvatures.items()}
    changes = {
        flip: math.fsum(of) / num_tokens + second[(flip,)]
        for flip, of in slopes.items()
        if flip[0] in formats and flip[1] != formats[flip[0]]
    }
    interactions = {}
    for flips, interaction in second.items():
        if len(flips) < 2 or any(flip not in changes for flip in flips):
            continue
        is_notable = abs(interaction) >= _NOTABLE * sum(abs(changes[flip]) for flip in flips)
        if is_notable and _is_significant(curvatures[flips]):
            interactions[flips[0], flips[1]] = interactions[flips[1], flips[0]] = interaction
    return FlipEstimates(changes=changes, interactions=interactions)


def _is_significant(parts: Sequence[float]) -> bool:
    """Whether the sum of shards is more than their differences explain; False for one shard."""
    if len(parts) < 2:
        return False
    error = math.sqrt(len(parts)) * statistics.stdev(parts)
    return abs(math.fsum(parts)) > _NUM_ERRORS * error


def _curvature_weight(undone: float, kl: float) -> float:
    """What curvatures count where undoing all quantization has a slope, at a loss of the model."""
    if kl <= 0:
        return _CURVATURE_SHARE
    power = -undone / kl
    return _CURVATURE_SHARE * min(1.0, max(0.0, power * (power - 1) / 2))
