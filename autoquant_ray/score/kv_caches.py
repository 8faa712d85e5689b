"""Scores of KV-cache formats: the output of an attention whose keys and values are quantized.

As for every module the difference is computed in the backward pass, when the gradient at the
attention's output is known; but a token's output depends on the keys and values of all tokens
before it, so whole sequences are run again, and rows without a gradient are left out afterwards.

Shape letters: T rows (tokens), O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autoquant_ray.errors import changed_input
from autoquant_ray.formats.format import Format
from autoquant_ray.models.layers import first_output
from autoquant_ray.quantize.attention import CachedAttention, Call
from autoquant_ray.score.row_sampling import name_seed
from autoquant_ray.score.rows import as_rows, choose_rows

if TYPE_CHECKING:
    from autoquant_ray.plan.scored_modules import ScoredModule

Add = Callable[..., None]
"""Adds to a group's sums: group, differences, gradients, chosen rows."""


class CacheHooks:
    """Hooks for the attentions among scored modules.

    Args:
        modules: What is scored, with the modules in the model.
        formats: The menu.
        num_draws: Backward passes that follow each forward pass.
        row_share: Share of the rows to score, drawn by importance; 1 scores all.
    """

    def __init__(
        self,
        modules: Sequence[tuple[ScoredModule, torch.nn.Module]],
        formats: Sequence[Format],
        num_draws: int,
        row_share: float,
    ) -> None:
        self._formats = formats
        self._num_draws = num_draws
        self._row_share = row_share
        self._attentions = {
            scored.planned.name: CachedAttention(module, scored.planned)
            for scored, module in modules
            if scored.planned.is_cache
        }

    def forward_hook(
        self, scored: ScoredModule, maxima: Mapping[str, float], seed: tuple[int, ...], add: Add
    ) -> Callable[..., None]:
        """A forward hook with keywords that scores the attention in the backward pass.

        Args:
            scored: The attention.
            maxima: Calibrated maxima of its keys and values.
            seed: Of the drawn rows.
            add: Takes the differences.
        """
        name, num_calls = scored.planned.name, 0

        def hook(
            _: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            states = first_output(output)
            if not states.requires_grad:
                return
            call, kept = Call.of(arguments, keywords), states.detach()
            versions = (call.hidden._version, kept._version)
            gradients: list[torch.Tensor] = []

            def on_gradient(gradient: torch.Tensor) -> None:
                nonlocal num_calls
                gradients.append(as_rows(gradient))
                if len(gradients) < self._num_draws:
                    return
                own_seed = (*seed, name_seed(scored.planned.label), num_calls)
                rows = choose_rows(gradients, as_rows(call.hidden), self._row_share, own_seed)
                num_calls += 1
                chosen = [rows.of(gradient_TO) for gradient_TO in gradients]
                gradients.clear()
                if call.hidden._version != versions[0]:
                    raise changed_input(name, scored.planned.label)
                exact = kept if kept._version == versions[1] else None
                found = self._differences(scored, call, exact, maxima)
                with torch.no_grad():
                    add(
                        scored.group,
                        ((index, slice(0, len(chosen[0])), rows.of(d)) for index, d in found),
                        chosen,
                        rows,
                    )

            states.register_hook(on_gradient)

        return hook

    def _differences(
        self,
        scored: ScoredModule,
        call: Call,
        output: torch.Tensor | None,
        maxima: Mapping[str, float],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Index of a format, and ``Y_f - Y`` of all rows ``(T, O)``."""
        wanted = scored.formats or ()
        formats = [self._formats[index] for index in wanted]
        found = self._attentions[scored.planned.name].differences(call, output, formats, maxima)
        for index, difference in zip(wanted, found, strict=True):
            yield index, as_rows(difference)
