"""Collects the mean square of every input channel of routed experts, for ``weighted``.

Each expert runs again on the tokens that were routed to it, so that the inputs of its second
projection are seen too. Where a module is quantized as one tensor (GPT-OSS), all its experts share
one record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autoquant_ray.calibrate.transfer import on_host
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import needs_channel_squares
from autoquant_ray.quantize.calibration import Channels
from autoquant_ray.quantize.experts import FusedExperts
from autoquant_ray.quantize.input_squares import square_sum
from autoquant_ray.quantize.single_experts import by_module, sums_by_expert

if TYPE_CHECKING:
    from autoquant_ray.plan.scored_modules import ScoredModule

Mask = Callable[[torch.Tensor], torch.Tensor | None]
"""States ``(T, H)`` -> which rows are tokens; None: all."""


class ExpertChannels:
    """Collects :class:`Channels` of experts while batches run forward.

    Args:
        model: The model; ``prepare_experts`` must have run.
        modules: Searched modules.
        formats: The menu; nothing is collected that none of a module's formats needs.
    """

    def __init__(
        self, model: torch.nn.Module, modules: Sequence[ScoredModule], formats: Sequence[Format]
    ) -> None:
        wanted = [
            scored
            for scored in modules
            if scored.planned.kind in ("experts", "expert")
            and any(map(needs_channel_squares, scored.menu(formats)))
        ]
        self._modules: dict[str, tuple[Any, FusedExperts, list[int]]] = {}
        for entries, module in by_module(model, wanted):
            first = entries[0].planned
            numbers = [entry.planned.expert for entry in entries]
            every = range(len(getattr(module, first.parameters[0])))
            chosen = [n for n in numbers if n is not None] or list(every)
            self._modules[first.path] = (module, FusedExperts(module, first), chosen)
        self._seen: dict[str, dict[str, tuple[torch.Tensor, int]]] = {}

    @property
    def runs_experts(self) -> bool:
        """Whether experts run again to be watched."""
        return bool(self._modules)

    def clear(self) -> None:
        """Forget everything seen."""
        self._seen = {}

    def watch(self, mask: Mask) -> Iterator[Any]:
        """Start to watch every module; yields the handles that end it."""
        for path, (module, _, _) in self._modules.items():

            def hook(_: Any, arguments: Any, keywords: Any, path: str = path) -> None:
                inputs = (*arguments, *keywords.values())
                self._add(path, inputs, mask(inputs[0]))

            yield module.register_forward_pre_hook(hook, with_kwargs=True)

    def experts(self) -> dict[str, dict[str, Channels]]:
        """Module -> ``ModuleCalibration.experts``: what was seen since :meth:`clear`."""
        sums = {(path, part): p[part][0] for path, p in self._seen.items() for part in p}
        arrays = on_host(sums)
        return {
            path: {
                part: Channels(
                    largest_I=None,
                    sum_I=None,
                    square_sum_I=arrays[path, part],
                    num_tokens=num_tokens,
                )
                for part, (_, num_tokens) in parts.items()
            }
            for path, parts in self._seen.items()
        }

    @torch.no_grad()
    def _add(self, path: str, inputs: Sequence[torch.Tensor], real_T: torch.Tensor | None) -> None:
        _, experts, numbers = self._modules[path]
        if experts.is_transposed:
            chosen = inputs if real_T is None else [states[real_T] for states in inputs]
            self._count(path, "", experts.input_channels(square_sum, chosen))
            return
        for number, sums in sums_by_expert(experts, numbers, square_sum, inputs, real_T):
            self._count(path, f".{number}", sums)

    def _count(self, path: str, suffix: str, sums: dict[str, tuple[torch.Tensor, int]]) -> None:
        parts = self._seen.setdefault(path, {})
        for parameter, (sum_I, num_tokens) in sums.items():
            before = parts.get(f"{parameter}{suffix}")
            parts[f"{parameter}{suffix}"] = (
                (sum_I, num_tokens)
                if before is None
                else (before[0] + sum_I, before[1] + num_tokens)
            )
