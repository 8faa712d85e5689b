"""Up to which length a model treats a position alike, whatever the context.

``dynamic`` and ``longrope`` rotate by other frequencies where the context is longer than the one
that the model was trained on, and take for the context the longest sample of a step. A shorter
sample beside it would be answered as if it were as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_BY_LENGTH = ("dynamic", "longrope", "su")
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")


def plain_context(config: Any) -> int | None:
    """Tokens up to which no frequency depends on the context; None where none ever does.

    Args:
        config: The model's, with those of its parts.
    """
    return min(_bounds(config.to_dict(), ()), default=None)


def _bounds(part: Mapping[str, Any], lengths: tuple[int, ...]) -> Iterator[int]:
    """Lengths at which a rope in a config or one of its parts may change its frequencies."""
    lengths += tuple(part[name] for name in _LENGTHS if part.get(name))
    if part.get("rope_type", part.get("type")) in _BY_LENGTH:
        yield from lengths
    for value in part.values():
        if isinstance(value, Mapping):
            yield from _bounds(value, lengths)
