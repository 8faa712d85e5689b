"""Statistics of every input channel of a linear: what SmoothQuant and AWQ are calibrated with.

Maxima of ``|x|`` merge by maximum. Sums of ``|x|`` merge by sum: in float64 and in the order of
the shards, so that their mean depends neither on who counted nor on who came first.

Shape letters: T rows (tokens), I in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import needs_channel_maxima, needs_search
from autoquant_ray.quantize.statistics import CHANNELS

if TYPE_CHECKING:
    from autoquant_ray.plan.scored_modules import ScoredModule

_CHUNK_ELEMENTS = 2**22  # bounds the copy in float64


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Inputs of one module, channel by channel, over real tokens.

    Attributes:
        largest_I: Largest absolute value, float32; None where no format needs it.
        sum_I: Sum of absolute values, float64; None where no format needs it.
        num_tokens: Number of tokens.
    """

    largest_I: np.ndarray[Any, np.dtype[np.float32]] | None
    sum_I: np.ndarray[Any, np.dtype[np.float64]] | None
    num_tokens: int

    @property
    def mean_I(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Mean of absolute values: ModelOpt's ``act_scale``."""
        assert self.sum_I is not None
        return (self.sum_I / self.num_tokens).astype(np.float32)

    def merged(self, later: Channels) -> Channels:
        """With those of a shard that comes after all that are in this one."""
        largest_I, sum_I = self.largest_I, self.sum_I
        if largest_I is not None and later.largest_I is not None:
            largest_I = np.maximum(largest_I, later.largest_I)
        if sum_I is not None and later.sum_I is not None:
            sum_I = sum_I + later.sum_I
        return Channels(
            largest_I=largest_I, sum_I=sum_I, num_tokens=self.num_tokens + later.num_tokens
        )

    def row(self, module: str) -> dict[str, Any]:
        """A row of ``channels.parquet``; :meth:`of_row` is the inverse."""
        return {
            "module": module,
            "largest": self.largest_I,
            "sum": self.sum_I,
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def of_row(cls, largest: Any, sum_: Any, num_tokens: int) -> Channels:
        """From the values of one row, as Arrow scalars."""
        return cls(
            largest_I=_floats(largest, np.float32),
            sum_I=_floats(sum_, np.float64),
            num_tokens=num_tokens,
        )


def _floats(values: Any, dtype: Any) -> Any:
    return None if not values.is_valid else values.values.to_numpy().astype(dtype)


class ChannelCollector:
    """Collects them while batches run forward.

    Args:
        modules: Searched modules.
        formats: The menu; nothing is collected that none of a module's formats needs.
    """

    def __init__(self, modules: Sequence[ScoredModule], formats: Sequence[Format]) -> None:
        self._wants: dict[str, tuple[bool, bool]] = {}
        for scored in modules:
            own = range(len(formats)) if scored.formats is None else scored.formats
            menu = [formats[index] for index in own] if formats else []
            wants = (any(map(needs_channel_maxima, menu)), any(map(needs_search, menu)))
            if scored.planned.kind == "linear" and any(wants):
                self._wants[scored.planned.name] = wants
        self._seen: dict[str, list[Any]] = {}
        self._last: tuple[torch.Tensor, list[Any]] | None = None

    def clear(self) -> None:
        """Forget all."""
        self._seen, self._last = {}, None

    def release(self) -> None:
        """Hold no input any longer."""
        self._last = None

    def wants(self, name: str) -> bool:
        """Whether a module's inputs are collected."""
        return name in self._wants

    def add(self, name: str, states: torch.Tensor, real_T: torch.Tensor | None) -> None:
        """Count an input of a module.

        Args:
            name: The module; the collector wants it.
            states: ``(..., I)``.
            real_T: Which rows are tokens; None: all.
        """
        # Projections that share an input (q, k and v) are called with the very same tensor.
        if self._last is None or self._last[0] is not states:
            states_TI = states.detach().reshape(-1, states.shape[-1])
            self._last = (states, _reduced(states_TI if real_T is None else states_TI[real_T]))
        largest_I, sum_I, num_tokens = self._last[1]
        if num_tokens == 0:
            return
        if name not in self._seen:
            self._seen[name] = [largest_I, sum_I, num_tokens]
            return
        seen = self._seen[name]
        seen[:] = torch.maximum(seen[0], largest_I), seen[1] + sum_I, seen[2] + num_tokens

    def statistics(self) -> Mapping[tuple[str, str], Channels]:
        """(module, ``channels``) -> what was seen since :meth:`clear`."""
        found = {}
        for name, (largest_I, sum_I, num_tokens) in self._seen.items():
            wants_largest, wants_sum = self._wants[name]
            found[name, CHANNELS] = Channels(
                largest_I=largest_I.float().cpu().numpy() if wants_largest else None,
                sum_I=sum_I.cpu().numpy() if wants_sum else None,
                num_tokens=num_tokens,
            )
        return found


def _reduced(states_TI: torch.Tensor) -> list[Any]:
    """Largest, sum of absolute values, and number of rows."""
    if len(states_TI) == 0:
        return [None, None, 0]
    largest_I = torch.linalg.vector_norm(states_TI, ord=float("inf"), dim=0)
    sum_I = torch.zeros(states_TI.shape[1], dtype=torch.float64, device=states_TI.device)
    for chunk_CI in states_TI.split(max(1, _CHUNK_ELEMENTS // states_TI.shape[1])):
        sum_I += chunk_CI.abs().sum(dim=0, dtype=torch.float64)
    return [largest_I, sum_I, len(states_TI)]
