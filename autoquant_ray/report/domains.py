"""The section of a report that says what a solution loses in each domain of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DOMAIN_HEADS = ("Domain", "Weight", "Tokens", "Predicted KL", "If all counted alike", "Difference")


@dataclass(frozen=True, kw_only=True)
class DomainSection:
    """The domain section of a report.

    Attributes:
        text: What the solution minimizes, and which domain loses most.
        rows: Cells under ``DOMAIN_HEADS``, the domain with the largest loss first.
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
    tokens = sum(domain["num_tokens"] for domain in domains.values())
    worst, facts = ranked[0]
    text = (
        f"{_objective(manifest)} Predicted KL in nats per token of each domain; {worst} loses "
        f"most, {facts['predicted_kl_nats']:.4g}. For comparison, the loss of each domain under "
        "the allocation that has the same budget and constraints but weighs all domains equally."
    )
    is_by_token = not any(domain["weight"] is not None for domain in domains.values())
    is_worst = manifest["budget"].get("worst_domain", False)
    return DomainSection(
        text=text,
        rows=[
            (
                name,
                _weight(domain, tokens, is_by_token, is_worst),
                f"{domain['num_tokens']:,}",
                f"{domain['predicted_kl_nats']:.4g}",
                f"{domain['equal_kl_nats']:.4g}",
                _difference(domain["predicted_kl_nats"], domain["equal_kl_nats"]),
            )
            for name, domain in ranked
        ],
    )


def is_by_domain(budget: Mapping[str, Any]) -> bool:
    """Whether a solution was made for domains rather than for all tokens equally.

    Args:
        budget: The ``budget`` object of ``manifest.json``; those of earlier versions lack domains.
    """
    return bool(budget.get("domains") or budget.get("worst_domain"))


def describe_domains(budget: Mapping[str, Any]) -> list[str]:
    """What a budget says about domains, in words; empty where it says nothing.

    Args:
        budget: The ``budget`` object of ``manifest.json``; those of earlier versions lack domains.
    """
    if budget.get("worst_domain"):
        return ["smallest loss of the worst domain"]
    weights = budget.get("domains") or {}
    named = ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())
    return [f"domains weighted {named}"] if named else []


def _objective(manifest: Mapping[str, Any]) -> str:
    budget, solution = manifest["budget"], manifest["solution"]
    if budget.get("worst_domain"):
        return (
            "The solution minimizes the largest loss of any domain, proven optimal to within "
            f"{solution['optimality_gap']:.2g} of that loss. The certainty of its decisions was "
            "not assessed: solving its resamples would take too long."
        )
    if budget.get("domains"):
        return "The solution minimizes the weighted loss of the domains."
    return "All tokens count equally, so a domain's weight is its share of the tokens."


def _weight(domain: Mapping[str, Any], tokens: int, is_by_token: bool, is_worst: bool) -> str:
    if is_worst:
        return "-"
    return f"{domain['num_tokens'] / tokens if is_by_token else domain['weight']:.1%}"


def _difference(predicted: float, equal: float) -> str:
    return "-" if equal == 0 else f"{predicted / equal - 1:+.1%}"
