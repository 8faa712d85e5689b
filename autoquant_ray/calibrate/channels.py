"""Collects statistics of every input channel of a linear, for SmoothQuant, AWQ and ``weighted``.

Sums of ``|x|`` and ``x^2`` are float64; :class:`~autoquant_ray.quantize.calibration.Channels` says
how those of shards merge.

Shape letters: T rows (tokens), I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from autoquant_ray.calibrate.input_rows import TokenMask
from autoquant_ray.calibrate.transfer import on_host
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import (
    needs_channel_maxima,
    needs_channel_squares,
    needs_search,
)
from autoquant_ray.quantize.calibration import Channels
from autoquant_ray.quantize.input_squares import row_chunks, square_sum

if TYPE_CHECKING:
    from autoquant_ray.plan.scored_modules import ScoredModule


class ChannelCollector:
    """Collects :class:`Channels` while batches run forward.

    Args:
        modules: Searched modules.
        formats: The menu; nothing is collected that none of a module's formats needs.
    """

    def __init__(self, modules: Sequence[ScoredModule], formats: Sequence[Format]) -> None:
        self._wants: dict[str, tuple[bool, bool, bool]] = {}
        for scored in modules:
            menu = scored.menu(formats)
            wants = (
                any(map(needs_channel_maxima, menu)),
                any(map(needs_search, menu)),
                any(map(needs_channel_squares, menu)),
            )
            if scored.planned.kind == "linear" and any(wants):
                self._wants[scored.planned.name] = wants
        self._wants_any = [any(column) for column in zip(*self._wants.values(), strict=True)]
        self._seen: dict[str, list[Any]] = {}
        self._last: tuple[torch.Tensor, list[Any]] | None = None

    def clear(self) -> None:
        """Forget everything seen."""
        self._seen, self._last = {}, None

    def release(self) -> None:
        """Release the last input."""
        self._last = None

    def wants(self, name: str) -> bool:
        """Whether a module's inputs are collected."""
        return name in self._wants

    def add(self, name: str, states: torch.Tensor, mask: TokenMask | None) -> None:
        """Count an input of a module.

        Args:
            name: The module; the collector wants it.
            states: ``(..., I)``.
            mask: Which rows are tokens; None: all.
        """
        # Projections that share an input (q, k and v) are called with the very same tensor.
        if self._last is None or self._last[0] is not states:
            states_TI = states.detach().reshape(-1, states.shape[-1])
            self._last = (
                states,
                self._reduced(states_TI if mask is None else mask.rows_of(states_TI)),
            )
        largest_I, *sums, num_tokens = self._last[1]
        if num_tokens == 0:
            return
        if name not in self._seen:
            self._seen[name] = self._last[1]
            return
        before_I, *before, tokens_before = self._seen[name]
        added = [total_I + more_I for total_I, more_I in zip(before, sums, strict=True)]
        self._seen[name] = [torch.maximum(before_I, largest_I), *added, tokens_before + num_tokens]

    def _reduced(self, states_TI: torch.Tensor) -> list[Any]:
        """Largest, sums of absolute values and of squares, and number of rows.

        Sums that no module wants are zeros.
        """
        if len(states_TI) == 0:
            return [None, None, None, 0]
        _, wants_sum, wants_squares = self._wants_any
        largest_I = torch.linalg.vector_norm(states_TI, ord=float("inf"), dim=0)
        sum_I = torch.zeros_like(largest_I, dtype=torch.float64)
        for chunk_CI in row_chunks(states_TI) if wants_sum else ():
            sum_I += chunk_CI.abs().sum(dim=0, dtype=torch.float64)
        square_sum_I = square_sum(states_TI) if wants_squares else torch.zeros_like(sum_I)
        return [largest_I, sum_I, square_sum_I, len(states_TI)]

    def channels(self) -> dict[str, Channels]:
        """Module -> what was seen since :meth:`clear`."""
        wanted: dict[tuple[str, int], torch.Tensor] = {}
        for name, (largest_I, *sums, _) in self._seen.items():
            parts = zip(self._wants[name], (largest_I.float(), *sums), strict=True)
            wanted |= {(name, n): part_I for n, (wants, part_I) in enumerate(parts) if wants}
        arrays = on_host(wanted)
        return {
            name: Channels(
                largest_I=arrays.get((name, 0)),
                sum_I=arrays.get((name, 1)),
                square_sum_I=arrays.get((name, 2)),
                num_tokens=num_tokens,
            )
            for name, (*_, num_tokens) in self._seen.items()
        }
