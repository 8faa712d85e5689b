"""How many tokens the routed experts of a model saw, and which of them saw too few.

A group of fused experts has one score for all its experts. What an expert adds to it comes from the
tokens that were routed to it; one that saw none adds nothing, whatever a format does to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Counts = list[int]
"""Tokens of each expert of a group."""


def routed_tokens(
    inputs: Sequence[torch.Tensor], live_T: torch.Tensor, num_experts: int
) -> torch.Tensor | None:
    """Tokens routed to each expert ``(experts,)``, int64; None where no input holds the routes.

    Args:
        inputs: Inputs of a fused experts module, each with T rows; the first one of integers holds
            the experts of each token.
        live_T: Which tokens count.
        num_experts: Number of experts; a larger index means none.
    """
    import torch

    routes = [states for states in inputs if not states.is_floating_point()]
    if not routes:
        return None
    chosen = routes[0][live_T.to(routes[0].device)].flatten().long()
    return torch.bincount(chosen, minlength=num_experts)[:num_experts]


def add_counts(
    total: Sequence[Counts | None], more: Sequence[Counts | None]
) -> list[Counts | None]:
    """Sums of two lists of counts; unknown (None) where either is."""
    return [
        None if a is None or b is None else [x + y for x, y in zip(a, b, strict=True)]
        for a, b in zip(total, more, strict=True)
    ]


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
    found = []
    for group, tokens in counts.items():
        few = tuple(number for number, count in enumerate(tokens) if count < min_tokens)
        if few:
            found.append(
                FewTokens(group=group, experts=few, fewest=min(tokens), num_experts=len(tokens))
            )
    return found
