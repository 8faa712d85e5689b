"""Samples as workers take them: plain token ids, or token ids with what belongs to them.

Every token of a plain text is predicted from those before it. The sample of a chat says which of
its tokens count in the loss; with images it also holds what the model's processor made of them.

Shape letters: T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from autoquant_ray.errors import DataError
from autoquant_ray.models.context import SampleLimits

Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RichSample:
    """Token ids with what belongs to them.

    Attributes:
        tokens_T: Token ids, int32.
        in_loss_T: Which of them count in the loss; the first one never does.
        tensors: What the model takes beside the token ids, by the name of its argument. A tensor
            of shape ``(1, T)`` belongs to the tokens; any other joins those of further samples
            along its first dimension.
    """

    tokens_T: Int32s
    in_loss_T: Bools
    tensors: Arrays

    def __len__(self) -> int:
        return len(self.tokens_T)

    def cut(self, num_tokens: int) -> RichSample:
        """Its first tokens; images stay whole."""
        tensors = {
            name: tensor[:, :num_tokens] if is_per_token(tensor, self) else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(
            self,
            tokens_T=self.tokens_T[:num_tokens],
            in_loss_T=self.in_loss_T[:num_tokens],
            tensors=tensors,
        )


Sample = Sequence[int] | npt.NDArray[np.int32] | RichSample
Samples = Sequence[Sample]
"""Samples of a shard, unpadded."""


def token_ids(sample: Sample) -> Sequence[int] | Int32s:
    """Token ids of a sample."""
    return sample.tokens_T if isinstance(sample, RichSample) else sample


def predicting_positions(sample: Sample) -> npt.NDArray[np.int64]:
    """Positions whose next token counts in the loss, in order."""
    if isinstance(sample, RichSample):
        return np.flatnonzero(sample.in_loss_T[1:])
    return np.arange(len(sample) - 1)


def num_predicted(sample: Sample) -> int:
    """Tokens of a sample that count in the loss."""
    if isinstance(sample, RichSample):
        return int(np.count_nonzero(sample.in_loss_T[1:]))
    return len(sample) - 1


def tensors_of(sample: Sample) -> Arrays:
    """What the model takes beside the token ids; none for plain text."""
    return sample.tensors if isinstance(sample, RichSample) else {}


def is_per_token(tensor: npt.NDArray[Any], sample: Sample) -> bool:
    """Whether a tensor of a sample belongs to its tokens."""
    return tensor.shape == (1, len(sample))


def kind_of(sample: Sample) -> tuple[Any, ...]:
    """Samples of one kind can share a step: their tensors have the same names and can be joined."""
    return tuple(
        (name, () if is_per_token(tensor, sample) else tensor.shape[1:])
        for name, tensor in sorted(tensors_of(sample).items())
    )


def require_within(samples: Sequence[Sample], limits: SampleLimits, name: str) -> None:
    """Check that a model has room for samples.

    What stands for an image may have a number beyond the embedding, which the model takes care of,
    so samples with images are only checked for their length.

    Args:
        samples: Of a shard.
        limits: Of the model.
        name: Of the data, for messages.

    Raises:
        DataError: It has not; names the token and the numbers.
    """
    longest = max(map(len, samples))
    if limits.positions is not None and longest > limits.positions:
        raise DataError(
            f"data {name} has a sample of {longest} tokens, but the model has a table of "
            f"{limits.positions} positions; give `seq_len` {limits.positions} or less"
        )
    largest = max((max(token_ids(s)) for s in samples if not tensors_of(s)), default=0)
    if largest >= limits.token_ids:
        raise DataError(
            f"data {name} has the token {largest}, but the model's embedding has "
            f"{limits.token_ids} rows: tokens were added to the tokenizer alone; give data without "
            "them, or resize the embedding with resize_token_embeddings"
        )
