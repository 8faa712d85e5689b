"""Facts about a solution that its reasons for concern are derived from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoquant_ray.plan.silent_experts import FewTokens


@dataclass(frozen=True, kw_only=True)
class ChosenFormat:
    """A searched group in its chosen format, with a loss above 0.

    Attributes:
        score: Predicted loss in nats per token, above 0.
        stderr: Standard error of the score; None where unknown.
    """

    group: str
    format: str
    score: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Facts about a solution.

    Attributes:
        predicted: Summed score, nats per token (imported: no unit).
        stderr: Standard error of ``predicted``; None where unknown.
        effective_bits: Average stored bits over the searched groups.
        choices: Groups with a loss above 0.
        uniform: The format, without its method, of all quantized groups of weights; None where
            they have several.
        is_satisfied: Whether the budget is met.
        num_shards: Shards behind the scores; None for imported scores.
        quarantined: Entries of ``run.json``.
        labels: ``model``, ``data``, or None for imported scores.
        measured: Rows of ``evaluation.parquet``, a list per data set: the solution's row, then
            those of its rivals, allocations from shuffled scores merged into a single row.
        coin_tosses: Groups whose format is undecided.
        expected_regret: Share of the predicted KL; None where unknown.
        null: Loss of allocations from shuffled scores; None where unknown.
        objective: The weighted loss that a solution for domains minimizes, comparable with
            ``null``; None where it is the predicted loss.
        by_domain: Made for domains; rivals that weigh all tokens equally do not compare with it.
        by_measurement: Chosen by measured losses, so not what the scores alone would choose.
        few_tokens: Experts that saw fewer than ``min_expert_tokens``.
        silent_experts: Single-expert groups that saw no token: they stay in 16 bits.
        unserved: Why the requested serving engine, or any supported one, cannot serve the
            solution; None where an engine can.
        remedies: Name of a remedy -> command line.
    """

    predicted: float
    stderr: float | None
    effective_bits: float
    choices: Sequence[ChosenFormat]
    uniform: str | None = None
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
    remedies: Mapping[str, str] = field(default_factory=dict)
