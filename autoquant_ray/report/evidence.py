"""What is known of a plan when its report is written: the input of the reasons for concern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoquant_ray.plan.silent_experts import FewTokens


@dataclass(frozen=True, kw_only=True)
class ChosenFormat:
    """A searched group under its chosen format, which loses something.

    Attributes:
        score: Predicted loss in nats per token, above 0.
        stderr: Its standard error; None where unknown.
    """

    group: str
    format: str
    score: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a plan.

    Attributes:
        predicted: Summed score, nats per token (imported: no unit).
        stderr: Its standard error; None where unknown.
        effective_bits: Average stored bits over the searched groups.
        choices: Groups that lose something.
        is_satisfied: Whether the budget is met.
        num_shards: Shards behind the scores; None for imported scores.
        quarantined: Entries of ``run.json``.
        labels: ``model``, ``data``, or None for imported scores.
        measured: Rows of ``evaluation.parquet``, a list per data set: the solution's, then its
            rivals', shuffled plans merged into one.
        coin_tosses: Groups whose format is not decided.
        expected_regret: Share of the predicted KL; None where unknown.
        null: Loss of plans from shuffled scores; None where unknown.
        objective: What a plan for weighted domains made least, which its null is of; None where it
            is the predicted loss.
        by_domain: It was made for domains; rivals that weigh all tokens alike say nothing of it.
        by_measurement: Measured losses chose it: it is not what the scores alone would choose.
        few_tokens: Experts that saw fewer than ``min_expert_tokens``.
        silent_experts: Experts that are groups of their own and saw none: they stay in 16 bits.
        unserved: Why the engine that it is for, or every engine known, cannot serve it; None where
            one can.
    """

    predicted: float
    stderr: float | None
    effective_bits: float
    choices: Sequence[ChosenFormat]
    is_satisfied: bool = True
    num_shards: int | None = None
    quarantined: Sequence[Mapping[str, Any]] = ()
    labels: str | None = None
    measured: Sequence[Sequence[Mapping[str, Any]]] = ()
    coin_tosses: Sequence[str] = field(default_factory=tuple)
    expected_regret: float | None = None
    null: float | None = None
    objective: float | None = None
    by_domain: bool = False
    by_measurement: bool = False
    few_tokens: Sequence[FewTokens] = ()
    silent_experts: Sequence[str] = ()
    min_expert_tokens: int = 0
    unserved: str | None = None
