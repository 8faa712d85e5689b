"""Experts of a layer in clusters by sensitivity, each of which shares a format.

An expert's sensitivity is the mean, over the formats, of the logarithm of its score per weight, so
that no format counts more than another because its scores are larger. The experts of a layer, in
this order, are cut into K runs with the least sum of squared distances to the runs' means: exact,
by dynamic programming (Fisher 1958, "On grouping for maximum homogeneity"). The scores of a run
that was scored expert by expert are enough, so that another K takes no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.arrays import Floats
from autoquant_ray.config.expert_groups import EXPERT, LAYER, ExpertGroups
from autoquant_ray.errors import ConfigError
from autoquant_ray.models.quantizable import expert_place


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a run that was scored expert by expert.

    Attributes:
        scanned_as: The scan's own ``expert_groups``.
        sensitivities: Layer's experts module -> expert -> logarithm of its sensitivity per weight.
    """

    scanned_as: ExpertGroups
    sensitivities: Mapping[str, Mapping[str, float]]

    def ties(self, expert_groups: ExpertGroups | None) -> list[tuple[str, ...]]:
        """Experts that share a format, in the order of the model; those of one expert left out.

        Args:
            expert_groups: What is asked for; None: the scan's own.
        """
        asked = self.scanned_as if expert_groups is None else expert_groups
        if asked == EXPERT:
            return []
        count = 1 if asked == LAYER else int(asked)
        return [
            tuple(cluster)
            for values in self.sensitivities.values()
            for cluster in clusters(values, count)
            if len(cluster) > 1
        ]


def experts_of(
    weights: Mapping[str, int], apart: Sequence[str], scores: Scores, scanned_as: ExpertGroups
) -> Experts | None:
    """The experts of a run; None where they were not scored apart.

    Args:
        weights: Searched group -> number of its weights.
        apart: Groups of one expert each.
        scores: (group, format) -> nats per token.
        scanned_as: The scan's own ``expert_groups``.
    """
    if not apart:
        return None
    places = {group: place for group in apart if (place := expert_place(group)) is not None}
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for (group, format_), score in scores.items():
        if group in weights and group in places:
            format_scores = layers.setdefault(places[group][0], {}).setdefault(group, {})
            format_scores[format_] = score / weights[group]
    return Experts(
        scanned_as=scanned_as,
        sensitivities={
            layer: _sensitivities(layer_scores) for layer, layer_scores in layers.items()
        },
    )


def require_apart(apart: Sequence[str], expert_groups: ExpertGroups | None) -> None:
    """Check that a run has scores of single experts if they are asked for.

    Args:
        apart: Groups of one expert each.
        expert_groups: What is asked for.

    Raises:
        ConfigError: It has none.
    """
    if expert_groups not in (None, LAYER) and not apart:
        raise ConfigError(
            f"`expert_groups` {expert_groups}: this run has no scores of single experts; scan the "
            f"model again with `expert_groups` {expert_groups}, or leave it out"
        )


def _sensitivities(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means of logarithms; a format under which some expert of the layer loses nothing has none."""
    formats = dict.fromkeys(name for format_scores in scores.values() for name in format_scores)
    usable = [
        f
        for f in formats
        if all(format_scores.get(f, 0.0) > 0 for format_scores in scores.values())
    ]
    return {
        group: math.fsum(math.log(format_scores[f]) for f in usable) / max(1, len(usable))
        for group, format_scores in scores.items()
    }


def clusters(values: Mapping[str, float], count: int) -> list[list[str]]:
    """Names in at most ``count`` runs of similar values, least squares.

    Args:
        values: Name -> finite value.
        count: At least 1.

    Returns:
        From the smallest values to the largest; names in the order given.
    """
    names = list(values)
    order = sorted(range(len(names)), key=lambda n: (values[names[n]], n))
    sorted_N = np.array([values[names[n]] for n in order])
    starts = _cuts(sorted_N, min(count, len(names)))
    ends = [*starts[1:], len(names)]
    return [
        [names[n] for n in sorted(order[start:end])]
        for start, end in zip(starts, ends, strict=True)
    ]


def _cuts(values_N: Floats, count: int) -> list[int]:
    """Where the runs of the best partition of sorted values begin."""
    centred_N = values_N - values_N.mean()
    sums = np.concatenate([[0.0], np.cumsum(centred_N)])
    squares = np.concatenate([[0.0], np.cumsum(centred_N**2)])
    size = len(values_N)
    lengths = np.arange(size + 1)[None] - np.arange(size + 1)[:, None]
    spread = squares[None] - squares[:, None]
    spread = spread - (sums[None] - sums[:, None]) ** 2 / np.maximum(lengths, 1)
    costs = np.where(lengths > 0, np.maximum(spread, 0.0), np.inf)  # of a run from row to column
    best, origins = costs[0], []
    for _ in range(1, count):
        through = best[:, None] + costs
        origins.append(through.argmin(axis=0))
        best = through.min(axis=0)
    starts, end = [], size
    for origin in reversed(origins):
        end = int(origin[end])
        starts.append(end)
    return [0, *reversed(starts)]
