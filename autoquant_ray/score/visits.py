"""Which steps of a shard visit the layers together, and what they look like as tensors.

A visit runs several steps through one layer before it goes on to the next. It holds as many steps
as their layer inputs have room for; neither the room nor the grouping changes a number. Where a
model answers a sample otherwise beside a longer one, samples share a step with their equals only
(:func:`~autoquant_ray.score.model_checks.joint_context`): all where padding itself changes the
answer, those longer than the model was trained on where positions depend on the longest of a step.

Shape letters: B samples, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from autoquant_ray.data.cutting import pack_steps
from autoquant_ray.data.samples import (
    Samples,
    is_per_token,
    kind_of,
    predicting_positions,
    tensors_of,
    token_ids,
)

NO_INPUTS: Mapping[str, torch.Tensor] = MappingProxyType({})


class Step(NamedTuple):
    """What the model runs on at once.

    Attributes:
        ids_BS: Token ids, int64.
        mask_BS: 1 for real tokens, 0 for padding on the right; None if all are real.
        inputs: What the model takes beside them: pixels and their places, by argument.
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor | None = None
    inputs: Mapping[str, torch.Tensor] = NO_INPUTS

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of samples and of positions."""
        num_samples, num_positions = self.ids_BS.shape
        return num_samples, num_positions


Visit = list[list[int]]
"""Positions of the samples of each step, of the steps that are run layer by layer together."""


class VisitPacker:
    """Groups samples into steps and steps into visits.

    Args:
        step_tokens: Tokens, padding included, per step.
        token_bytes: Bytes of all layers' inputs per token.
        room: Bytes for the layer inputs of one visit; 0 gives visits of one step.
        joint_context: Longer samples share a step with those of their length only; None: any may.
    """

    def __init__(
        self, step_tokens: int, token_bytes: int, room: int, joint_context: int | None = None
    ) -> None:
        self._step_tokens = step_tokens
        self._joint_context = joint_context
        self._token_bytes = token_bytes
        self._room = room

    def one_by_one(self) -> VisitPacker:
        """The same with one sample in each step."""
        return VisitPacker(0, self._token_bytes, self._room, self._joint_context)

    def visits(self, samples: Samples) -> list[Visit]:
        """All steps of a shard, in order."""
        visits: list[Visit] = []
        room = 0
        for positions in self._steps(samples):
            needed = self._step_bytes(samples, positions)
            if not visits or needed > room:
                visits.append([])
                room = self._room
            visits[-1].append(positions)
            room -= needed
        return visits

    def _steps(self, samples: Samples) -> list[list[int]]:
        """Positions of the samples of each step, of one kind each."""
        of_kind: dict[tuple[object, ...], list[int]] = {}
        for position, sample in enumerate(samples):
            key: tuple[object, ...] = kind_of(sample)
            if self._joint_context is not None and len(sample) > self._joint_context:
                # Images take fewer positions than tokens: such a sample has no equals.
                key = (len(sample), position if tensors_of(sample) else None)
            of_kind.setdefault(key, []).append(position)
        return [
            [positions[index] for index in step]
            for positions in of_kind.values()
            for step in pack_steps([len(samples[p]) for p in positions], self._step_tokens)
        ]

    def input_bytes(self, samples: Samples) -> int:
        """Bytes of the layer inputs of a whole shard."""
        return sum(
            self._step_bytes(samples, positions)
            for visit in self.visits(samples)
            for positions in visit
        )

    def _step_bytes(self, samples: Samples, positions: list[int]) -> int:
        longest = max(len(samples[position]) for position in positions)
        return len(positions) * longest * self._token_bytes


def make_step(samples: Samples, device: torch.device) -> Step:
    """Samples of one kind as tensors; padded on the right, images one after the other."""
    longest = max(len(sample) for sample in samples)
    ids_BS = torch.zeros(len(samples), longest, dtype=torch.long)
    mask_BS = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids_BS[row, : len(sample)] = torch.as_tensor(token_ids(sample), dtype=torch.long)
        mask_BS[row, : len(sample)] = 1
    is_padded = any(len(sample) != longest for sample in samples)
    return Step(
        ids_BS.to(device),
        mask_BS.to(device) if is_padded else None,
        {name: _joined(name, samples, longest).to(device) for name in tensors_of(samples[0])},
    )


def _joined(name: str, samples: Samples, longest: int) -> torch.Tensor:
    """A tensor of each sample: rows padded where it belongs to tokens, else one after the other."""
    tensors = [np.asarray(tensors_of(sample)[name]) for sample in samples]
    if is_per_token(tensors[0], samples[0]):
        tensors = [np.pad(t, ((0, 0), (0, longest - t.shape[1]))) for t in tensors]
    return torch.from_numpy(np.concatenate(tensors))


def predicting_rows(samples: Samples) -> torch.Tensor:
    """Rows of a flattened step ``(B * S)`` that predict a token of the loss, int64."""
    longest = max(len(sample) for sample in samples)
    rows = [row * longest + predicting_positions(sample) for row, sample in enumerate(samples)]
    return torch.from_numpy(np.concatenate(rows))
