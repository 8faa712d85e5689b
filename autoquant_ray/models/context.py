"""How many positions and token ids a model has room for, and up to which length it is the same.

``dynamic`` and ``longrope`` rotate by other frequencies where the context is longer than the one
that the model was trained on, and take for the context the longest sample of a step. A shorter
sample beside it would be answered as if it were as long.

A model with a table of positions (learned, as GPT-2's and OPT's, or computed once, as GPT-J's) has
no answer for a sample that is longer, and one whose tokenizer got tokens that the embedding did
not get has none for those. On a GPU that is an assertion of a kernel, after all work before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.quantizable import is_of_tower

if TYPE_CHECKING:
    import torch

_BY_LENGTH = ("dynamic", "longrope", "su")
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")
_TABLE_LENGTHS = (
    "max_position_embeddings",
    "max_target_positions",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "block_size",
)
_MAX_OFFSET = 2
"""Rows that a table of positions may have beside those of positions."""


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


@dataclass(frozen=True, kw_only=True)
class SampleLimits:
    """What samples may hold.

    Attributes:
        token_ids: Rows of the embedding: ids are below.
        positions: Tokens of a sample at most; None where the model has no table of positions.
    """

    token_ids: int
    positions: int | None

    def to_json(self) -> dict[str, int | None]:
        """For ``run.json``."""
        return {"token_ids": self.token_ids, "positions": self.positions}

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> SampleLimits:
        """From :meth:`to_json`."""
        return cls(token_ids=entries["token_ids"], positions=entries["positions"])


def limits_of(model: Any) -> SampleLimits:
    """The limits of a model.

    Args:
        model: Skeleton on the meta device, or a loaded model.
    """
    embedding = model.get_input_embeddings()
    extra = getattr(
        embedding, "num_additional_embeddings", 0
    )  # Idefics keeps them in a table apart
    config = model.config.get_text_config()
    lengths = {
        value for name in _TABLE_LENGTHS if isinstance(value := getattr(config, name, None), int)
    }
    return SampleLimits(
        token_ids=embedding.weight.shape[0] + extra,
        positions=min(_tables(model, embedding, lengths), default=None),
    )


def _tables(model: torch.nn.Module, embedding: Any, lengths: set[int]) -> Iterator[int]:
    """Positions of each table of positions in the language model.

    A table is an embedding whose name tells positions, or a tensor beside a module's weights whose
    name does. It has as many rows as the config has positions, or a few more.
    """
    import torch

    if type(model).__name__.startswith("Mpt"):  # biases by distance, made for so many at each call
        yield from lengths
    for name, module in model.named_modules():
        if is_of_tower(name) or module is embedding:
            continue
        if isinstance(module, torch.nn.Embedding) and _tells_positions(name.rpartition(".")[2]):
            offset = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                offset = max(offset, module.padding_idx + 1)
            # ProphetNet's stream that predicts asks for the position after each token's.
            offset += type(module).__name__.startswith("ProphetNet")
            rows = module.num_embeddings
            if rows in lengths or rows - _MAX_OFFSET in lengths:
                yield rows - offset
        for label, tensor in [*module.named_buffers(recurse=False), *vars(module).items()]:
            is_table = isinstance(tensor, torch.Tensor) and tensor.dim() == 2
            if is_table and _tells_positions(label) and tensor.shape[0] in lengths:
                yield tensor.shape[0]


def _tells_positions(label: str) -> bool:
    return "pos" in label or label == "wpe"
