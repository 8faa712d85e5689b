"""Tokenize a stream of texts in Ray tasks: ordered, with a bounded look-ahead.

The driver reads, tasks tokenize, results come back in input order, so the samples are the same as
with one process. Not more than ``look_ahead`` chunks are in flight, so the driver's memory stays
bounded and few texts are tokenized that no sample needs.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from autoquant_ray.data.cutting import opening_tokens, tokenize_chunk
from autoquant_ray.errors import AutoQuantError, DataError, WorkerError, one_line
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer

_MIN_LOOK_AHEAD, _MAX_LOOK_AHEAD = 4, 64

Int32s = npt.NDArray[np.int32]


def look_ahead_of(num_chunks: int) -> int:
    """How many chunks to have in flight: two per CPU of the cluster, from 4 to 64.

    Args:
        num_chunks: About how many chunks will be needed; more would be tokenized for nothing.
    """
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    return max(_MIN_LOOK_AHEAD, min(2 * num_cpus, num_chunks, _MAX_LOOK_AHEAD))


def tokenize_stream(
    chunks: Iterator[list[str]], *, tokenizer_ref: TokenizerRef, pack: bool, look_ahead: int
) -> Generator[tuple[list[bool], list[array[int]]], None, None]:
    """Tokenize chunks of texts in Ray tasks.

    Closing the generator early leaves at most ``look_ahead`` tasks running. They are not
    cancelled: in Ray 2.60 a cancelled task that finishes at that moment aborts the whole driver
    (a failed check in its task manager).

    Args:
        chunks: Lists of texts; read only as far as tasks are started.
        tokenizer_ref: Tokenizer, loaded once per worker process.
        pack: Passed on to :func:`autoquant_ray.data.cutting.tokenize_chunk`.
        look_ahead: Chunks in flight at most, 1 or more.

    Yields:
        For each chunk, in input order: whether each text is white space only, and the token ids
        of each text.

    Raises:
        ModelError: The tokenizer cannot be loaded on a worker.
        DataError: A text cannot be tokenized.
        WorkerError: The workers died more often than Ray retries.
    """
    pending: deque[tuple[list[bool], Any]] = deque()
    for texts in chunks:
        texts_empty = [not text.strip() for text in texts]
        pending.append((texts_empty, _tokenize_task.remote(texts, tokenizer_ref, pack)))
        if len(pending) >= look_ahead:
            yield _result_of_first(pending)
    while pending:
        yield _result_of_first(pending)


def find_opening_tokens(tokenizer_ref: TokenizerRef) -> list[int]:
    """:func:`~autoquant_ray.data.cutting.opening_tokens` of a tokenizer, loaded in a Ray task.

    Raises:
        ModelError: The tokenizer cannot be loaded on a worker.
        WorkerError: The workers died more often than Ray retries.
    """
    tokens: list[int] = fetch(_opening_task.remote(tokenizer_ref))
    return tokens


def _result_of_first(
    pending: deque[tuple[list[bool], Any]],
) -> tuple[list[bool], list[array[int]]]:
    texts_empty, reference = pending[0]
    tokens_T, lengths_N = fetch(reference)
    pending.popleft()
    tokens = tokens_T.tobytes()
    ends_N = np.cumsum(lengths_N) * tokens_T.itemsize
    starts_N = ends_N - lengths_N * tokens_T.itemsize
    token_lists = [
        array("i", tokens[start:end])
        for start, end in zip(starts_N.tolist(), ends_N.tolist(), strict=True)
    ]
    return texts_empty, token_lists


def fetch(reference: Any) -> Any:
    """Result of a task on the data.

    Raises:
        AutoQuantError: The task raised it.
        DataError: It raised anything else.
        WorkerError: Its process died more often than Ray retries.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AutoQuantError):
            raise error.cause from None
        reason = f"{type(error.cause).__name__}: {one_line(error.cause)}"
        raise DataError(f"a text of the calibration data cannot be tokenized: {reason}") from None
    except ray.exceptions.RuntimeEnvSetupError:
        raise  # for whoever connected
    except ray.exceptions.RayError as error:
        raise WorkerError(f"tokenization of the calibration data: {one_line(error)}") from None


def _tokenize(texts: list[str], tokenizer_ref: TokenizerRef, pack: bool) -> tuple[Int32s, Int32s]:
    token_lists = tokenize_chunk(_cached_tokenizer(tokenizer_ref), texts, pack=pack)
    lengths_N = np.array([len(tokens) for tokens in token_lists], dtype=np.int32)
    tokens_T = np.fromiter(chain.from_iterable(token_lists), dtype=np.int32)
    return tokens_T, lengths_N


@lru_cache(maxsize=1)
def _cached_tokenizer(tokenizer_ref: TokenizerRef) -> Any:
    # A task has one CPU; tokenizers would take them all.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return load_tokenizer(tokenizer_ref)


_tokenize_task = ray.remote(num_cpus=1, max_retries=3)(_tokenize)


def _opening(tokenizer_ref: TokenizerRef) -> list[int]:
    return opening_tokens(_cached_tokenizer(tokenizer_ref))


_opening_task = ray.remote(num_cpus=1, max_retries=3)(_opening)
