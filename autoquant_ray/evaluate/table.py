"""Token divergences of all samples -> the rows of ``evaluation.parquet``.

Tokens of a sample depend on each other, so standard errors are taken over samples (ratio
estimator, as for the scores), and differences between allocations are paired by sample.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.allocate.candidate import AT_SIZE_OF, Candidate
from autoquant_ray.allocate.certainty.total_error import ratio_stderr
from autoquant_ray.arrays import Floats

_MOST_NATS = math.log(sys.float_info.max)
QUANTILES = {"kl_p50": 0.5, "kl_p95": 0.95, "kl_p99": 0.99}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an allocation loses on S samples with N predicted tokens altogether.

    Attributes:
        kl_N: KL(P || Q) per token in nats, float64.
        kl_S: Sum of the KL per sample.
        loss: Summed ``-log q`` in nats.
        reference_loss: Summed ``-log p`` in nats.
        num_agreeing: Tokens whose most likely continuation is unchanged.
        tokens_S: Predicted tokens per sample.
    """

    kl_N: Floats
    kl_S: Floats
    loss: float
    reference_loss: float
    num_agreeing: int
    tokens_S: Floats


def collect(parts: Iterable[pa.Table]) -> Measured:
    """Merge an allocation's parts, in the given order.

    Args:
        parts: One table per shard with the schema ``divergences``.
    """
    kl: list[Floats] = []
    loss, reference, num_agreeing = [], [], 0
    for table in parts:
        columns = (table.column(name) for name in ("kl", "loss", "reference_loss", "agrees"))
        for kl_n, loss_n, reference_n, agrees_n in zip(*columns, strict=True):
            kl.append(kl_n.values.to_numpy().astype(np.float64))
            loss.append(_sum(loss_n))
            reference.append(_sum(reference_n))
            num_agreeing += int(agrees_n.values.to_numpy(zero_copy_only=False).sum())
    return Measured(
        kl_N=np.concatenate(kl),
        kl_S=np.array([math.fsum(kl_n) for kl_n in kl]),
        loss=math.fsum(loss),
        reference_loss=math.fsum(reference),
        num_agreeing=num_agreeing,
        tokens_S=np.array([len(kl_n) for kl_n in kl], dtype=np.float64),
    )


def evaluation_rows(
    candidates: Sequence[Candidate], measured: Sequence[Measured], labels: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of ``evaluation.parquet``; the first candidate is the reference of the differences.

    Args:
        candidates: The allocations that were measured.
        measured: What each of them loses, on the same samples.
        labels: Values of the columns ``solution``, ``dataset`` and ``data_key``.
    """
    solution = measured[0]
    by_name = {candidate.name: m for candidate, m in zip(candidates, measured, strict=True)}
    return [
        _row(candidate, losses)
        | _difference(losses, solution)
        | _equal_difference(losses, by_name.get(f"{AT_SIZE_OF}{candidate.name}"))
        | labels
        for candidate, losses in zip(candidates, measured, strict=True)
    ]


def mean_kl(losses: Measured) -> float:
    """Mean KL(P || Q) in nats per token."""
    return math.fsum(losses.kl_S) / len(losses.kl_N)


def paired_difference(losses: Measured, baseline: Measured | None) -> tuple[float, float | None]:
    """Difference of the mean KL of two allocations, paired by sample, with its standard error.

    Args:
        losses: What the allocation loses.
        baseline: What the other loses on the same samples; None for the unquantized model.

    Returns:
        Nats per token that the allocation loses more than the baseline, and the standard error.
    """
    if not np.isfinite(losses.kl_S).all():
        return math.inf, None
    difference_S = losses.kl_S if baseline is None else losses.kl_S - baseline.kl_S
    error = ratio_stderr(difference_S, losses.tokens_S)
    return math.fsum(difference_S) / len(losses.kl_N), error


def _row(candidate: Candidate, losses: Measured) -> dict[str, Any]:
    num_tokens = len(losses.kl_N)
    return {
        "name": candidate.name,
        "allocation": candidate.key,
        "effective_bits": candidate.effective_bits,
        "weight_bytes": candidate.weight_bytes,
        "predicted_kl": candidate.predicted_kl,
        "kl_mean": mean_kl(losses),
        "kl_stderr": ratio_stderr(losses.kl_S, losses.tokens_S),
        **{
            name: float(np.quantile(losses.kl_N, q, method="higher"))
            for name, q in QUANTILES.items()
        },
        "perplexity": _exponential(losses.loss / num_tokens),
        "reference_perplexity": _exponential(losses.reference_loss / num_tokens),
        "top1_agreement": losses.num_agreeing / num_tokens,
        "num_tokens": num_tokens,
        "num_samples": len(losses.kl_S),
    }


def _exponential(nats: float) -> float:
    """A perplexity; infinite where no float is so large, which Python refuses to say."""
    return math.inf if nats > _MOST_NATS else math.exp(nats)


def _difference(losses: Measured, solution: Measured) -> dict[str, Any]:
    """Columns of the difference between an allocation and the solution."""
    difference, error = paired_difference(losses, solution)
    return {"kl_above_solution": difference, "kl_above_solution_stderr": error}


def _equal_difference(losses: Measured, equal: Measured | None) -> dict[str, Any]:
    """Columns of the difference between a rival and what the run chooses at the same size."""
    difference, error = (None, None) if equal is None else paired_difference(losses, equal)
    return {"kl_above_equal": difference, "kl_above_equal_stderr": error}


def _sum(scalar: Any) -> float:
    return math.fsum(scalar.values.to_numpy().astype(np.float64))
