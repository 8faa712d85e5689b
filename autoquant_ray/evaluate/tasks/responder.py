"""Answers requests with a loaded model, in a worker, by lm-eval's own code for transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from autoquant_ray.errors import ConfigError, ModelError

_LONGEST_ANSWER = 256
"""Tokens that lm-eval lets a model write where a task does not say it."""


class Responder:
    """A model behind lm-eval's interface.

    Args:
        model: A causal language model; whatever is replaced in it afterwards is used.
        tokenizer: Its tokenizer.
        batch_tokens: Tokens of a batch at most, padding included; a longer request is a batch by
            itself.

    Raises:
        ConfigError: lm-eval is not installed where the worker runs.
        ModelError: The tokenizer has no token that can stand before a text.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int) -> None:
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError:
            raise ConfigError(
                "`tasks` needs lm-eval on every worker's node: pip install -e '.[tasks]' there, "
                "or name lm-eval in the scan's `runtime_env`"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ModelError(
                "the model's tokenizer has neither a first nor a last token, and lm-eval puts one "
                "before a text; leave out `tasks`"
            )
        self._lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self._batch_tokens = batch_tokens

    def answer(self, kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Answers in the order of the requests.

        Args:
            kind: The method of lm-eval's ``LM``.
            requests: Arguments of each.

        Returns:
            ``loglikelihood``: (nats, whether it is the likeliest); ``loglikelihood_rolling``:
            nats; ``generate_until``: text.
        """
        from lm_eval.api.instance import Instance

        longest = max(self._num_tokens(kind, request) for request in requests)
        self._lm.batch_size_per_gpu = max(1, self._batch_tokens // longest)
        instances = [
            Instance(request_type=kind, doc={}, arguments=request, idx=number)
            for number, request in enumerate(requests)
        ]
        answers: list[Any] = getattr(self._lm, kind)(instances, disable_tqdm=True)
        return answers

    def _num_tokens(self, kind: str, request: tuple[Any, ...]) -> int:
        """Tokens that a request takes, the answer included."""
        texts = [part for part in request if isinstance(part, str)]
        num_tokens = len(self._lm.tok_encode("".join(texts)))
        if kind == "generate_until":
            num_tokens += int(request[1].get("max_gen_toks", _LONGEST_ANSWER))
        return min(max(1, num_tokens), int(self._lm.max_length))
