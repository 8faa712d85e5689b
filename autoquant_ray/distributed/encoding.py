"""Make samples of a stream of conversations in Ray tasks: ordered, with a bounded look-ahead.

As :mod:`autoquant_ray.distributed.tokenization` does for plain text.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import ray

from autoquant_ray.data.chat_encoding import ConversationEncoder, Encoded
from autoquant_ray.data.conversations import BadSample, Conversation
from autoquant_ray.distributed.tokenization import fetch
from autoquant_ray.models.tokenizer import TokenizerRef


def encode_stream(
    chunks: Iterator[list[Conversation | BadSample]],
    *,
    tokenizer_ref: TokenizerRef,
    loss_on: str,
    look_ahead: int,
) -> Iterator[Encoded | BadSample]:
    """Make samples of conversations in Ray tasks.

    Args:
        chunks: Conversations with the content of their images; read only as far as tasks are
            started. Bad ones pass through.
        tokenizer_ref: Of the model, loaded once per worker process.
        loss_on: ``all`` or ``answer``.
        look_ahead: Chunks in flight at most, 1 or more.

    Yields:
        One result per conversation, in input order.

    Raises:
        AutoQuantError: As :meth:`~autoquant_ray.data.chat_encoding.ConversationEncoder.encode`.
        WorkerError: The workers died more often than Ray retries.
    """
    pending: deque[Any] = deque()
    for chunk in chunks:
        pending.append(_encode_task.remote(chunk, tokenizer_ref, loss_on))
        if len(pending) >= look_ahead:
            yield from fetch(pending.popleft())
    while pending:
        yield from fetch(pending.popleft())


def _encode(
    chunk: list[Conversation | BadSample], tokenizer_ref: TokenizerRef, loss_on: str
) -> list[Encoded | BadSample]:
    encoder = _cached_encoder(tokenizer_ref, loss_on)
    return [chat if isinstance(chat, BadSample) else encoder.encode(chat) for chat in chunk]


@lru_cache(maxsize=1)
def _cached_encoder(tokenizer_ref: TokenizerRef, loss_on: str) -> ConversationEncoder:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a task has one CPU
    return ConversationEncoder(tokenizer_ref, loss_on)


_encode_task = ray.remote(num_cpus=1, max_retries=3)(_encode)
