"""The model that lm-eval asks: it hands all requests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from autoquant_ray.evaluate.tasks.answers import Answer


class AnsweringModel(LM):
    """A language model whose answers come from elsewhere.

    Args:
        answer: Answers requests of a kind.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[Any]:
        """Log-likelihood of each continuation in nats, and whether it is the likeliest."""
        return list(self._answer("loglikelihood", [request.args for request in requests]))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[Any]:
        """Log-likelihood of each text in nats."""
        return list(self._answer("loglikelihood_rolling", [request.args for request in requests]))

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[Any]:
        """What the model writes after each text."""
        return list(self._answer("generate_until", [request.args for request in requests]))
