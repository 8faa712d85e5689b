"""Which steps of a shard visit the layers together, and what they look like as tensors.

A visit runs several steps through one layer before it goes on to the next. It holds as many steps
as their layer inputs have room for; neither the room nor the grouping changes a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autoquant_ray.backward import Step
from autoquant_ray.data import plan_steps

Samples = Sequence[Sequence[int]]
"""Token ids of each sample, unpadded."""

Visit = list[list[int]]
"""Positions of the samples of each step, of the steps that are run layer by layer together."""


class VisitPlanner:
    """Groups samples into steps and steps into visits.

    Args:
        step_tokens: Tokens, padding included, per step.
        token_bytes: Bytes of all layers' inputs per token.
        room: Bytes for the layer inputs of one visit; 0 gives visits of one step.
    """

    def __init__(self, step_tokens: int, token_bytes: int, room: int) -> None:
        self._step_tokens = step_tokens
        self._token_bytes = token_bytes
        self._room = room

    def visits(self, samples: Samples) -> list[Visit]:
        """All steps of a shard, in order."""
        visits: list[Visit] = []
        room = 0
        for positions in plan_steps([len(sample) for sample in samples], self._step_tokens):
            needed = self._step_bytes(samples, positions)
            if not visits or needed > room:
                visits.append([])
                room = self._room
            visits[-1].append(positions)
            room -= needed
        return visits

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
    """Token ids ``(B, S)`` padded on the right, and the mask (None without padding)."""
    longest = max(len(sample) for sample in samples)
    ids_BS = torch.zeros(len(samples), longest, dtype=torch.long)
    mask_BS = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids_BS[row, : len(sample)] = torch.as_tensor(sample, dtype=torch.long)
        mask_BS[row, : len(sample)] = 1
    is_padded = any(len(sample) != longest for sample in samples)
    return ids_BS.to(device), mask_BS.to(device) if is_padded else None


def predicting_rows(samples: Samples) -> torch.Tensor:
    """Rows of a flattened step ``(B * S)`` that predict a token, int64."""
    longest = max(len(sample) for sample in samples)
    rows = [
        torch.arange(row * longest, row * longest + len(sample) - 1)
        for row, sample in enumerate(samples)
    ]
    return torch.cat(rows)
