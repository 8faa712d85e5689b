"""A stream in another order, by seed, with bounded memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

_BUFFER_TEXTS = 10_000
_BUFFER_CHARACTERS = 2**26

Text = TypeVar("Text")
"""A text, or a text with what belongs to it."""


def shuffled(
    texts: Iterable[Text],
    seed: int | None,
    *,
    max_texts: int = _BUFFER_TEXTS,
    max_characters: int = _BUFFER_CHARACTERS,
    length: Callable[[Any], int] = len,
) -> Iterator[Text]:
    """Shuffle texts through a buffer, as ``datasets`` shuffles a stream.

    What fits the buffer is permuted as a whole. Of a longer stream, a text comes out no earlier
    than the buffer's size before its own place. Only ``random.random()`` is drawn from, the one
    generator that Python promises to keep from version to version.

    Args:
        texts: Read no further ahead than the buffer holds.
        seed: Seed of the order; None leaves it as it is.
        max_texts: Texts that the buffer holds.
        max_characters: Characters that it holds; one longer text still fits.
        length: Characters of a text.
    """
    if seed is None:
        return iter(texts)
    return _shuffled(texts, seed, max_texts, max_characters, length)


def _shuffled(
    texts: Iterable[Text],
    seed: int,
    max_texts: int,
    max_characters: int,
    length: Callable[[Any], int],
) -> Iterator[Text]:
    draw = random.Random(seed).random
    buffer: list[Text] = []
    num_characters = 0

    def take() -> Text:
        index = int(draw() * len(buffer))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    for text in texts:
        buffer.append(text)
        num_characters += length(text)
        while len(buffer) > max_texts or (num_characters > max_characters and len(buffer) > 1):
            taken = take()
            num_characters -= length(taken)
            yield taken
    while buffer:
        yield take()
