"""Experts that saw no token, or few, in the calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.models.quantizable import expert_place
from autoquant_ray.runs.record import PlanSummary

Counts = list[int]
"""Tokens of each expert of a group."""


def add_counts(
    total: Sequence[Counts | None], more: Sequence[Counts | None]
) -> list[Counts | None]:
    """Sums of two lists of counts; unknown (None) where either is."""
    return [
        None if a is None or b is None else [x + y for x, y in zip(a, b, strict=True)]
        for a, b in zip(total, more, strict=True)
    ]


NO_TOKEN = "this expert saw no token, so that it has no score"
"""Why such an expert stays in 16 bits."""


def without_tokens(tokens: Mapping[str, Counts | None]) -> tuple[str, ...]:
    """Single experts that saw no token, in layers whose other experts saw some.

    A layer none of whose experts saw a token has lost its gradient, which is another matter.

    Args:
        tokens: Group -> tokens of its experts; None where it has none, or where it is not known.
    """
    places = {name: expert_place(name) or (name, 0) for name in tokens}
    seen = {places[name][0] for name, counts in tokens.items() if counts and sum(counts)}
    return tuple(
        name for name, counts in tokens.items() if counts == [0] and places[name][0] in seen
    )


def note_silent_experts(plan: PlanSummary, groups: Iterable[str]) -> None:
    """Say in a plan's summary which experts stay in 16 bits because they saw no token.

    Args:
        plan: The summary, changed in place.
        groups: Those experts; what was said before of others is taken back.
    """
    others = {group: reason for group, reason in plan["unsearched"].items() if reason != NO_TOKEN}
    plan["unsearched"] = others | dict.fromkeys(groups, NO_TOKEN)


def silent_experts(plan: PlanSummary) -> list[str]:
    """Experts that stay in 16 bits because they saw no token.

    Args:
        plan: The plan's summary.
    """
    return [group for group, reason in plan["unsearched"].items() if reason == NO_TOKEN]


@dataclass(frozen=True, kw_only=True)
class FewTokens:
    """Experts of a group that saw fewer tokens than asked for.

    Attributes:
        group: The group.
        experts: Their numbers.
        fewest: Tokens of the one that saw fewest.
        num_experts: All experts of the group.
    """

    group: str
    experts: tuple[int, ...]
    fewest: int
    num_experts: int


def experts_with_few_tokens(rows: Iterable[Mapping[str, Any]], min_tokens: int) -> list[FewTokens]:
    """Groups with such experts, in the order of the rows.

    Args:
        rows: Rows of ``sensitivity.parquet``.
        min_tokens: Fewer are too few.
    """
    counts = {row["group"]: row.get("expert_tokens") or [] for row in rows}
    with_few = []
    for group, tokens in counts.items():
        few = tuple(number for number, count in enumerate(tokens) if count < min_tokens)
        if few:
            with_few.append(
                FewTokens(group=group, experts=few, fewest=min(tokens), num_experts=len(tokens))
            )
    return with_few
