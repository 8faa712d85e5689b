"""Scores of tasks -> the rows of ``tasks.parquet``.

The same samples are asked of every model, so where a metric is a mean over samples its difference
to the model in 16 bits is paired: its standard error is that of the samples' differences, which is
smaller than that of two separate means. Other metrics take the errors of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.evaluate.tasks.suite import TaskScore


def task_rows(
    candidates: Sequence[Candidate],
    scores: Sequence[Sequence[TaskScore]],
    solution: str,
) -> list[dict[str, Any]]:
    """Rows of ``tasks.parquet``; differences are to the first candidate.

    Args:
        candidates: The model in 16 bits, then allocations.
        scores: Of each, the same metrics in the same order.
        solution: Name of the solution; '' for the scan's own.
    """
    return [
        _row(candidate, score) | _difference(score, first) | {"solution": solution}
        for candidate, of_candidate in zip(candidates, scores, strict=True)
        for score, first in zip(of_candidate, scores[0], strict=True)
    ]


def _row(candidate: Candidate, score: TaskScore) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "allocation": candidate.key,
        "effective_bits": candidate.effective_bits,
        "weight_bytes": candidate.weight_bytes,
        "task": score.task,
        "task_version": score.version,
        "num_fewshot": score.num_fewshot,
        "metric": score.metric,
        "filter": score.filter,
        "higher_is_better": score.higher_is_better,
        "value": score.value,
        "stderr": score.stderr,
        "num_samples": score.num_samples,
    }


def _difference(score: TaskScore, first: TaskScore) -> dict[str, Any]:
    """How a model's score differs from the first model's."""
    error: float | None = None
    if score.of_samples and len(score.of_samples) == len(first.of_samples) > 1:
        differences = np.subtract(score.of_samples, first.of_samples)
        error = float(np.std(differences, ddof=1) / math.sqrt(len(differences)))
    elif score.stderr is not None and first.stderr is not None:
        error = math.hypot(score.stderr, first.stderr)
    return {"difference": score.value - first.value, "difference_stderr": error}
