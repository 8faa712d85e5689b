"""The key numbers at the head of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoquant_ray.allocate.options import UNQUANTIZED_BITS
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.report.charts.frontier_chart import size_text
from autoquant_ray.report.domains import describe_domains
from autoquant_ray.report.sources import Sources
from autoquant_ray.wording import with_error

_COSTS = {
    "storage": "stored bits",
    "modelopt": "bits by ModelOpt's cost",
    "active_moe": "bits by ModelOpt's active_moe cost",
}


@dataclass(frozen=True, kw_only=True)
class Number:
    """A key number.

    Attributes:
        note: Its context: unit, data set or budget.
    """

    label: str
    value: str
    note: str


def headline(sources: Sources) -> list[Number]:
    """Predicted and measured loss, size, budget, and certainty."""
    solution, budget = sources.manifest["solution"], sources.manifest["budget"]
    share = solution["weight_bytes"] / unquantized_bytes(sources.scored.problem)
    return [
        *_losses(sources),
        Number(
            label="Effective bits",
            value=f"{solution['effective_bits']:.3f}",
            note="stored bits per searched weight, scales included",
        ),
        Number(
            label="Size",
            value=size_text(solution["weight_bytes"]),
            note=f"all weights, {share:.0%} of what they take in {UNQUANTIZED_BITS} bits",
        ),
        Number(label="Budget", value=_budget_value(budget), note=budget_text(budget)),
        *_decisions(sources),
    ]


def unquantized_bytes(problem: Problem) -> float:
    """Bytes of the whole model's weights where all of them are in 16 bits."""
    return problem.other_bytes + sum(
        group.cost(NONE, "storage") for group in problem.groups.values()
    )


def _losses(sources: Sources) -> list[Number]:
    error = None if sources.error is None else sources.error.stderr
    is_bound = sources.error is not None and sources.error.is_bound
    is_imported = sources.manifest["solution"]["predicted_kl_nats"] is None
    unit = f"nats per token, ± {'at most ' if is_bound else ''}one standard error"
    numbers = [
        Number(
            label="Total score" if is_imported else "Predicted KL",
            value=with_error(sources.predicted, error),
            note="imported, no unit" if is_imported else unit,
        )
    ]
    for row, *_ in sources.measured:
        size = f"{row['num_tokens']:,} tokens of {row['dataset']}"
        value = with_error(row["kl_mean"], row["kl_stderr"])
        numbers.append(Number(label="Measured KL", value=value, note=f"nats per token, on {size}"))
    return numbers


def _decisions(sources: Sources) -> list[Number]:
    """How many groups are certain of their format; empty where that is unknown."""
    stability = sources.manifest.get("stability")
    if not stability or sources.is_by_measurement:
        return []
    value = f"{stability['num_certain']} of {stability['num_groups']}"
    note = f"groups are certain of their format, {len(stability['coin_tosses'])} are coin tosses"
    return [Number(label="Decisions", value=value, note=note)]


def _budget_value(budget: dict[str, Any]) -> str:
    parts = [] if budget["bits"] is None else [f"{budget['bits']:g} bits"]
    if budget["bytes"] is not None:
        parts.append(size_text(budget["bytes"]))
    return ", ".join([*parts, *_speed(budget)]) or "-"


def _speed(budget: dict[str, Any]) -> list[str]:
    """The requested speed; empty where there is no limit."""
    latency = budget.get("latency") or {}
    limits = {
        "ms_per_token": "at most {:g} ms per token",
        "tokens_per_second": "at least {:g} tokens/s",
    }
    return [
        f"{text.format(latency[key])} on {latency['hardware']['name']}"
        for key, text in limits.items()
        if latency.get(key) is not None
    ]


def budget_text(budget: dict[str, Any]) -> str:
    """Budget and constraints in words; an option without words of its own by its name."""
    parts = []
    if budget["bits"] is not None:
        over = "searched groups" if budget["bits_over"] == "searched" else "all quantizable weights"
        parts.append(f"{budget['bits']:g} {_COSTS[budget['cost']]} over {over}")
    if budget["bytes"] is not None:
        parts.append(f"{budget['bytes']} bytes for the whole model")
    parts.extend(_speed(budget))
    if (limit := budget.get(KV_BYTES)) is not None:
        parts.append(f"{limit:,g} bytes of KV cache per token of context")
    if budget.get("engine") is not None:
        where = f" on {budget['gpu']}" if budget["gpu"] is not None else ""
        parts.append(f"served by {budget['engine']}{where}")
    if (experts := budget.get("expert_groups")) is not None:
        texts = {"layer": "one format for a layer's experts", "expert": "a format per expert"}
        parts.append(texts.get(experts, f"experts of a layer in {experts} clusters"))
    if budget["max_formats"] is not None:
        parts.append(f"at most {budget['max_formats']} formats")
    others = {name: value for name, value in budget.items() if name not in _WORDED and value}
    parts.extend(f"{name.replace('_', ' ')} {value}" for name, value in others.items())
    parts.extend(f"{group} = {format_}" for group, format_ in budget["pins"].items())
    parts.extend(f"{pattern} in {', '.join(f)}" for pattern, f in budget["allow"].items())
    return "; ".join([*parts, *describe_domains(budget)])


_WORDED = {"bits", "bytes", "bits_over", "cost", "latency", KV_BYTES, "engine", "gpu"}
_WORDED |= {"expert_groups", "max_formats", "pins", "allow", "domains", "worst_domain"}
"""Options that :func:`budget_text` words."""
