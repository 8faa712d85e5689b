"""Requests cut into tasks for workers, and their answers as rows of a part.

Cut by position, never by the number of workers: which requests share a batch can change the last
bits of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from autoquant_ray.distributed.task import RequestTask

Answer = Callable[[str, Sequence[tuple[Any, ...]]], Sequence[Any]]
"""Kind and requests -> answers, in the same order."""

_REQUESTS = 64
"""Answered together: few, so that little is lost with a worker."""


def request_tasks(kind: str, requests: Sequence[tuple[Any, ...]]) -> list[RequestTask]:
    """Requests of a kind as tasks, in order."""
    return [
        RequestTask(shard=number, kind=kind, requests=requests[first : first + _REQUESTS])
        for number, first in enumerate(range(0, len(requests), _REQUESTS))
    ]


def answer_rows(task: RequestTask, answers: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of a part with the schema ``answers``."""
    first = task.shard * _REQUESTS
    return [
        {"request": first + number} | _cells(task.kind, answer)
        for number, answer in enumerate(answers)
    ]


def read_answers(kind: str, part: pa.Table) -> list[Any]:
    """What :func:`answer_rows` was given."""
    columns = [part.column(name).to_pylist() for name in ("log_likelihood", "is_greedy", "text")]
    if kind == "generate_until":
        return list(columns[2])
    if kind == "loglikelihood_rolling":
        return list(columns[0])
    return list(zip(*columns[:2], strict=True))


def _cells(kind: str, answer: Any) -> dict[str, Any]:
    if kind == "generate_until":
        return {"log_likelihood": None, "is_greedy": None, "text": str(answer)}
    value, is_greedy = (answer, None) if kind == "loglikelihood_rolling" else answer
    is_greedy = None if is_greedy is None else bool(is_greedy)
    return {"log_likelihood": float(value), "is_greedy": is_greedy, "text": None}
