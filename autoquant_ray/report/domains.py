"""The part of a report that says who pays: what a plan loses in each domain of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DOMAIN_HEADS = ("Domain", "Weight", "Tokens", "Predicted KL", "If all counted alike", "Difference")


@dataclass(frozen=True, kw_only=True)
class DomainSection:
    """What each domain loses.

    Attributes:
        text: What was made least, who pays most, and how to change it.
        rows: Cells under ``DOMAIN_HEADS``, the domain that loses most first.
    """

    text: str
    rows: list[tuple[str, ...]]


def domain_section(manifest: Mapping[str, Any]) -> DomainSection | None:
    """Lay out a solution's domains; None where its run has none.

    Args:
        manifest: Content of ``manifest.json``.
    """
    domains = manifest["solution"].get("domains")
    if not domains:
        return None
    ranked = sorted(domains.items(), key=lambda item: -item[1]["predicted_kl_nats"])
    tokens = sum(one["num_tokens"] for one in domains.values())
    first, facts = ranked[0]
    text = (
        f"{_objective(manifest)} Predicted KL in nats per token of each domain; {first} loses "
        f"most, {facts['predicted_kl_nats']:.4g}. Beside it, what the domain would lose under the "
        "plan of the same budget and constraints that weighs all domains alike."
    )
    is_by_token = not any(one["weight"] is not None for one in domains.values())
    is_worst = manifest["budget"].get("worst_domain", False)
    return DomainSection(
        text=text,
        rows=[
            (
                name,
                _weight(one, tokens, is_by_token, is_worst),
                f"{one['num_tokens']:,}",
                f"{one['predicted_kl_nats']:.4g}",
                f"{one['equal_kl_nats']:.4g}",
                _difference(one["predicted_kl_nats"], one["equal_kl_nats"]),
            )
            for name, one in ranked
        ],
    )


def is_by_domain(budget: Mapping[str, Any]) -> bool:
    """Whether a plan was made for domains rather than for all tokens alike.

    Args:
        budget: The ``budget`` object of ``manifest.json``; those of earlier versions lack domains.
    """
    return bool(budget.get("domains") or budget.get("worst_domain"))


def describe_domains(budget: Mapping[str, Any]) -> list[str]:
    """What a budget says about domains, in words; nothing where it says nothing.

    Args:
        budget: The ``budget`` object of ``manifest.json``; those of earlier versions lack domains.
    """
    if budget.get("worst_domain"):
        return ["least loss of the worst domain"]
    weights = budget.get("domains") or {}
    named = ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())
    return [f"domains weighted {named}"] if named else []


def _objective(manifest: Mapping[str, Any]) -> str:
    budget, solution = manifest["budget"], manifest["solution"]
    if budget.get("worst_domain"):
        return (
            "The plan makes the largest loss of a domain least, proven to within "
            f"{solution['optimality_gap']:.2g} of it. How sure its decisions are was not assessed: "
            "no fast solver solves its resamples."
        )
    if budget.get("domains"):
        return "The plan makes the weighted loss of the domains least."
    return "All tokens count alike in the plan, so that a domain weighs as much as it has tokens."


def _weight(one: Mapping[str, Any], tokens: int, is_by_token: bool, is_worst: bool) -> str:
    if is_worst:
        return "-"
    return f"{one['num_tokens'] / tokens if is_by_token else one['weight']:.1%}"


def _difference(own: float, equal: float) -> str:
    return "-" if equal == 0 else f"{own / equal - 1:+.1%}"
