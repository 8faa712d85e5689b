"""Token divergences of all samples -> the rows of ``evaluation.parquet``.

Tokens of one sample depend on each other, so standard errors come from the spread over samples
(ratio estimator, as for the scores), and differences between allocations are paired by sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.certainty.total_error import ratio_stderr

Floats = np.ndarray[Any, np.dtype[np.float64]]

QUANTILES = {"kl_p50": 0.5, "kl_p95": 0.95, "kl_p99": 0.99}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One allocation over S samples and all their N predicted tokens.

    Attributes:
        kl_N: KL(P || Q) per token in nats, float64.
        kl_S: Its sums per sample.
        loss: Summed ``-log q`` in nats.
        reference_loss: Summed ``-log p`` in nats.
        num_agreeing: Tokens whose likeliest continuation stayed the same.
        tokens_S: Predicted tokens per sample.
    """

    kl_N: Floats
    kl_S: Floats
    loss: float
    reference_loss: float
    num_agreeing: int
    tokens_S: Floats


def collect(parts: Iterable[pa.Table]) -> Measured:
    """Merge an allocation's parts, in the order given.

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
        kl_S=np.array([math.fsum(one) for one in kl]),
        loss=math.fsum(loss),
        reference_loss=math.fsum(reference),
        num_agreeing=num_agreeing,
        tokens_S=np.array([len(one) for one in kl], dtype=np.float64),
    )


def evaluation_rows(
    candidates: Sequence[Candidate], measured: Sequence[Measured], labels: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of ``evaluation.parquet``; the first candidate is the one that others are held against.

    Args:
        candidates: What was measured.
        measured: The same, measured on the same samples.
        labels: ``solution`` and ``dataset`` columns.
    """
    own = measured[0]
    return [
        _row(candidate, one) | _difference(one, own) | labels
        for candidate, one in zip(candidates, measured, strict=True)
    ]


def mean_kl(one: Measured) -> float:
    """Mean KL(P || Q) in nats per token."""
    return math.fsum(one.kl_S) / len(one.kl_N)


def paired_difference(one: Measured, other: Measured | None) -> tuple[float, float | None]:
    """How much more an allocation loses than another on the same samples, and its error.

    Args:
        one: In nats per token.
        other: None stands for the model itself, which loses nothing.
    """
    if not np.isfinite(one.kl_S).all():
        return math.inf, None
    difference_S = one.kl_S if other is None else one.kl_S - other.kl_S
    error = ratio_stderr(difference_S, one.tokens_S)
    return math.fsum(difference_S) / len(one.kl_N), error


def _row(candidate: Candidate, one: Measured) -> dict[str, Any]:
    num_tokens = len(one.kl_N)
    return {
        "name": candidate.name,
        "allocation": candidate.key,
        "effective_bits": candidate.effective_bits,
        "weight_bytes": candidate.weight_bytes,
        "predicted_kl": candidate.predicted_kl,
        "kl_mean": mean_kl(one),
        "kl_stderr": ratio_stderr(one.kl_S, one.tokens_S),
        **{name: float(np.quantile(one.kl_N, q, method="higher")) for name, q in QUANTILES.items()},
        "perplexity": math.exp(one.loss / num_tokens),
        "reference_perplexity": math.exp(one.reference_loss / num_tokens),
        "top1_agreement": one.num_agreeing / num_tokens,
        "num_tokens": num_tokens,
        "num_samples": len(one.kl_S),
    }


def _difference(one: Measured, own: Measured) -> dict[str, Any]:
    """How much more an allocation loses than the solution, paired by sample."""
    difference, error = paired_difference(one, own)
    return {"kl_above_solution": difference, "kl_above_solution_stderr": error}


def _sum(scalar: Any) -> float:
    return math.fsum(scalar.values.to_numpy().astype(np.float64))
