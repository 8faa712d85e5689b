"""The modules of a model that are scored: hooks on them, and their output differences.

Shape letters: T rows, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.single_experts import by_module, runnable_experts
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.score.differences import Difference, Only, OutputDifferences
from autoquant_ray.score.gradient_book import GradientBook
from autoquant_ray.score.kv_caches import Add, CacheHooks


class ComparedModules:
    """The modules of a model whose outputs are compared while gradients flow backward.

    Args:
        model: The model.
        modules: What is compared.
        formats: The menu.
        weights: Where quantized weights are kept.
        cache_share: Share of the rows of an attention to use, drawn by importance; 1 takes all.
        difference_dtype: Of the products of linears, see :class:`OutputDifferences`.

    Attributes:
        modules: Entries of the plan, and their module in the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
        weights: WeightCache,
        cache_share: float = 1.0,
        difference_dtype: str | None = None,
    ) -> None:
        self.modules = by_module(model, modules)
        self._outputs = OutputDifferences(formats, weights, model, difference_dtype)
        self._experts = runnable_experts(self.modules)
        firsts = [(entries[0], module) for entries, module in self.modules]
        self._caches = CacheHooks(firsts, formats, cache_share)
        self._calibration = Calibration()

    @contextmanager
    def hooked(
        self,
        calibration: Calibration,
        hook_of: Callable[[Sequence[ScoredModule], Any], Callable[..., None]],
    ) -> Iterator[None]:
        """While open, forward passes call a hook of every module.

        Args:
            calibration: Merged over all shards; needed by formats with a static input quantizer.
            hook_of: Makes the hook of a module and its entries.
        """
        self._calibration = calibration
        self._outputs.calibrate(calibration)
        handles = [
            module.register_forward_hook(hook_of(entries, module), with_kwargs=True)
            for entries, module in self.modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.forget()

    def cache_hook(self, scored: ScoredModule, book: GradientBook, add: Add) -> Callable[..., None]:
        """The hook of an attention; see :meth:`CacheHooks.forward_hook`."""
        maxima = self._calibration.of(scored.planned.name).maxima
        return self._caches.forward_hook(scored, maxima, book, add)

    def differences(
        self,
        scored: ScoredModule,
        module: Any,
        output_TO: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        only: Only,
    ) -> Iterator[Difference]:
        """Differences of a linear, of fused experts or of one of them.

        Args:
            scored: The module's entry.
            module: The module.
            output_TO: Its output at these inputs, unquantized.
            inputs: What it is called with.
            only: Formats to compute.
        """
        planned = scored.planned
        calibration = self._calibration.of(planned.name)
        if (experts := self._experts.get(planned.name)) is not None:
            return self._outputs.of_experts(
                experts, planned.name, calibration.maxima, output_TO, tuple(inputs), only
            )
        return self._outputs.of_linear(planned, module, calibration, output_TO, inputs[0], only)

    def output_of(
        self, planned: PlannedModule, module: Any, inputs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The output of the unquantized module at some inputs."""
        if (experts := self._experts.get(planned.name)) is not None:
            return experts.run_and_collect(tuple(inputs))[0]
        return torch.nn.functional.linear(inputs[0], module.weight, module.bias)
