"""The few numbers at the head of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoquant_ray.budget import UNQUANTIZED_BITS
from autoquant_ray.formats import NONE
from autoquant_ray.report.measured import with_error
from autoquant_ray.report.sources import Sources


@dataclass(frozen=True, kw_only=True)
class Number:
    """One of the few numbers that a reader wants first.

    Attributes:
        note: What belongs to it: unit, data set, what was asked for.
    """

    label: str
    value: str
    note: str


def headline(sources: Sources, asked: str) -> list[Number]:
    """Predicted and measured loss, size and budget.

    Args:
        sources: The solution.
        asked: Budget and constraints in words.
    """
    solution, budget = sources.manifest["solution"], sources.manifest["budget"]
    error = None if sources.error is None else sources.error.stderr
    imported = solution["predicted_kl_nats"] is None
    numbers = [
        Number(
            label="Total score" if imported else "Predicted KL",
            value=with_error(solution["score"], error),
            note="imported, no unit" if imported else "nats per token, ± one standard error",
        )
    ]
    for own, *_ in sources.measured:
        size = f"{own['num_tokens']:,} tokens of {own['dataset']}"
        value = with_error(own["kl_mean"], own["kl_stderr"])
        numbers.append(Number(label="Measured KL", value=value, note=f"nats per token, on {size}"))
    whole = sources.problem.other_bytes + sum(
        group.cost(NONE, "model") for group in sources.problem.groups.values()
    )
    share = solution["weight_bytes"] / whole
    numbers += [
        Number(
            label="Effective bits",
            value=f"{solution['effective_bits']:.3f}",
            note="stored bits per searched weight, scales included",
        ),
        Number(
            label="Size",
            value=f"{solution['weight_bytes'] / 2**20:,.1f} MiB",
            note=f"all weights, {share:.0%} of the model in {UNQUANTIZED_BITS} bits",
        ),
        Number(label="Budget", value=_budget_value(budget), note=asked),
    ]
    stability = sources.manifest.get("stability")
    if stability:
        value = f"{stability['num_certain']} of {stability['num_groups']}"
        note = (
            f"groups are certain of their format, {len(stability['coin_tosses'])} are coin tosses"
        )
        numbers.append(Number(label="Decisions", value=value, note=note))
    return numbers


def _budget_value(budget: dict[str, Any]) -> str:
    parts = [] if budget["bits"] is None else [f"{budget['bits']:g} bits"]
    if budget["bytes"] is not None:
        parts.append(f"{budget['bytes'] / 2**20:,.1f} MiB")
    return ", ".join(parts) or "-"
