"""Groups as a report shows them: a row per group, and totals per format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoquant_ray.allocate.group_choices import GroupChoices

ScoresWithErrors = Mapping[str, Mapping[str, tuple[float, float | None]]]
"""Group -> format -> (score, standard error or None)."""


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """A group with its chosen format.

    Attributes:
        modules: Names of its layers.
        chosen: The chosen format; ``none`` for 16 bits.
        num_bytes: Stored bytes in that format, scales included.
        num_bits: Stored bits per weight.
        share: Share of the predicted loss; None for an unsearched group.
        sensitivity: Largest score over the menu; None for an unsearched group.
        scores: Format -> (score, standard error or None).
        kept: Share of the resamples in which the group keeps its format; None where unknown.
        note: Why the group is not searched.
    """

    name: str
    modules: list[str]
    num_weights: int
    chosen: str
    num_bytes: float
    num_bits: float
    share: float | None
    sensitivity: float | None
    scores: Mapping[str, tuple[float, float | None]]
    kept: float | None
    note: str | None


def group_rows(
    groups: Sequence[GroupChoices],
    formats: Mapping[str, str],
    scores: ScoresWithErrors,
    kept: Mapping[str, float],
    unsearched: Mapping[str, str],
) -> list[GroupRow]:
    """Rows of all groups, the most sensitive first, unsearched ones last.

    Args:
        groups: All groups of the plan.
        formats: Group -> chosen format.
        scores: Measured scores.
        kept: Group -> share of the resamples in which it keeps its format.
        unsearched: Group -> why it is not searched.
    """
    losses = {group.name: _loss(group.name, formats, scores) for group in groups}
    total = math.fsum(losses.values())
    shares = {name: loss / total if total > 0 else 0.0 for name, loss in losses.items()}
    rows = [
        GroupRow(
            name=group.name,
            modules=group.module_names,
            num_weights=group.num_weights,
            chosen=formats[group.name],
            num_bytes=group.rows[formats[group.name]]["weight_bytes"],
            num_bits=group.rows[formats[group.name]]["weight_bits"],
            share=None if group.name in unsearched else shares[group.name],
            sensitivity=max((s for s, _ in scores.get(group.name, {}).values()), default=None),
            scores=scores.get(group.name, {}),
            kept=kept.get(group.name),
            note=unsearched.get(group.name),
        )
        for group in groups
    ]
    return sorted(rows, key=lambda row: (row.sensitivity is None, -(row.sensitivity or 0.0)))


def _loss(group: str, formats: Mapping[str, str], scores: ScoresWithErrors) -> float:
    """Predicted loss of a group in its chosen format; 16 bits lose nothing."""
    entry = scores.get(group, {}).get(formats[group])
    return 0.0 if entry is None else entry[0]


@dataclass(frozen=True, kw_only=True)
class MixRow:
    """How much of the model is in a format.

    Attributes:
        share: Share of all weights that can be quantized, 0 to 1.
        lost: Share of the predicted loss.
    """

    format: str
    num_groups: int
    share: float
    num_bytes: float
    lost: float


def format_mix(rows: Sequence[GroupRow]) -> list[MixRow]:
    """Formats in use, the one with most weights first."""
    by_format: dict[str, list[GroupRow]] = {}
    for row in rows:
        by_format.setdefault(row.chosen, []).append(row)
    weights = sum(row.num_weights for row in rows)
    mix = [
        MixRow(
            format=name,
            num_groups=len(of_format),
            share=sum(row.num_weights for row in of_format) / weights,
            num_bytes=math.fsum(row.num_bytes for row in of_format),
            lost=math.fsum(row.share or 0.0 for row in of_format),
        )
        for name, of_format in by_format.items()
    ]
    return sorted(mix, key=lambda row: -row.share)
