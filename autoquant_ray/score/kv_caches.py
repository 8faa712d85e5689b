"""Scores of KV-cache formats: the output of an attention whose keys and values are quantized.

As for every module the difference is computed in the backward pass, when the gradient at the
attention's output is known; but a token's output depends on the keys and values of all tokens
before it, so whole sequences are run again, and rows without a gradient are left out afterwards.

Shape letters: T rows (tokens), O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.models.layers import first_output
from autoquant_ray.quantize.attention import CachedAttention, Call
from autoquant_ray.score.differences import Difference
from autoquant_ray.score.drawing.rows import ChosenRows, as_rows, choose_rows
from autoquant_ray.score.gradient_book import GradientBook

if TYPE_CHECKING:
    from autoquant_ray.plan.scored_modules import ScoredModule

Add = Callable[[int, Iterable[Difference], list[torch.Tensor], ChosenRows], None]
"""Adds to a group's sums: group, differences, gradients, chosen rows."""


class CacheHooks:
    """Hooks for the attentions among scored modules.

    Args:
        modules: What is scored, with the modules in the model.
        formats: The menu.
        row_share: Share of the rows to score, drawn by importance; 1 scores all.
    """

    def __init__(
        self,
        modules: Sequence[tuple[ScoredModule, torch.nn.Module]],
        formats: Sequence[Format],
        row_share: float,
    ) -> None:
        self._formats = formats
        self._row_share = row_share
        self._attentions = {
            scored.planned.name: CachedAttention(module, scored.planned)
            for scored, module in modules
            if scored.planned.is_cache
        }

    def forward_hook(
        self, scored: ScoredModule, maxima: Mapping[str, float], book: GradientBook, add: Add
    ) -> Callable[..., None]:
        """A forward hook with keywords that scores the attention in the backward pass.

        Args:
            scored: The attention.
            maxima: Calibrated maxima of its keys and values.
            book: Of the attention.
            add: Takes the differences.
        """

        def hook(
            _: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            states = first_output(output)
            if not states.requires_grad:
                return
            call = Call.of(arguments, keywords)

            def score(
                exact: torch.Tensor | None, gradients: list[torch.Tensor], seed: tuple[int, ...]
            ) -> None:
                rows = choose_rows(gradients, as_rows(call.hidden), self._row_share, seed)
                chosen = [rows.of(gradient_TO) for gradient_TO in gradients]
                gradients.clear()
                everything = slice(0, len(chosen[0]))
                differences = self._differences(scored, call, exact, maxima)
                add(
                    scored.group,
                    ((index, everything, rows.of(states_TO)) for index, states_TO in differences),
                    chosen,
                    rows,
                )

            book.open(states, states.detach(), (call.hidden,), score)

        return hook

    def _differences(
        self,
        scored: ScoredModule,
        call: Call,
        output: torch.Tensor | None,
        maxima: Mapping[str, float],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Index of a format, and ``Y_f - Y`` of all rows ``(T, O)``."""
        indices = scored.formats or ()
        formats = [self._formats[index] for index in indices]
        attention = self._attentions[scored.planned.name]
        differences = attention.differences(call, output, formats, maxima)
        for index, difference in zip(indices, differences, strict=True):
            yield index, as_rows(difference)
