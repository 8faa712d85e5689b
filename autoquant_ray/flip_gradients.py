"""Scores around a quantized plan by gradients: what changes of it would do, to second order.

Let Q be the model under a plan and P the model itself. For a module with output ``Y`` in Q, and
``dY = Y_f - Y`` its change if format f replaced the plan's there, all others staying as they are:

    sum KL(P || Q_f) - sum KL(P || Q)  ~  sum_{t,o} g_to dY_to  +  1/2 sum_{t,o} (h_to dY_to)^2

with g the gradient of ``sum KL(P || Q)`` at Y (``q - p`` at the logits), and h the gradient of the
summed loss of labels drawn from Q. The mean of ``h h^T`` is the Fisher matrix of Q, at the logits
the exact Hessian of ``KL(P || .)``; as in :mod:`autoquant_ray.sensitivity` its diagonal is used.
There, around P, the first term is zero; here it is not, and may be negative. Quantized inputs pass
gradients straight through (Bengio et al. 2013, "Estimating or propagating gradients through
stochastic neurons"), fused experts as a whole.

Shape letters: G groups, F formats, T rows with a gradient, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoquant_ray.differences import Difference, OutputDifferences
from autoquant_ray.experts import FusedExperts
from autoquant_ray.footprint import LARGEST_CACHE_BYTES
from autoquant_ray.formats import Format
from autoquant_ray.quantized_layers import UNQUANTIZED, Choice
from autoquant_ray.row_choice import live_rows
from autoquant_ray.sensitivity import Maxima, ScoredModule
from autoquant_ray.weight_cache import WeightCache

Floats = np.ndarray[Any, np.dtype[np.float64]]

NUM_GRADIENTS = 2
"""That flow backward for every forward pass: first g, then h."""


@dataclass(frozen=True, kw_only=True)
class FlipSums:
    """Raw sums around one plan; the last column stands for 16 bits.

    Attributes:
        slope_GF: First term, nats, float64, ``(G, F + 1)``.
        squares_GF: Sum of squares of the second term, nats squared, float64.
        kl: Summed KL(P || Q) of the plan itself, in nats.
        num_tokens: Predicted tokens.
    """

    slope_GF: Floats
    squares_GF: Floats
    kl: float
    num_tokens: int


class FlipScorer:
    """Accumulates sums while two gradients flow backward through a quantized model.

    Args:
        model: Runs under the plan while its modules are called.
        modules: What may be flipped.
        formats: F formats.
        maxima: Calibrated input maxima.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
        maxima: Maxima,
    ) -> None:
        self._maxima = maxima
        self._modules = [(scored, model.get_submodule(scored.planned.name)) for scored in modules]
        self._experts = {
            scored.planned.name: FusedExperts(module, scored.planned)
            for scored, module in self._modules
            if scored.planned.kind == "experts"
        }
        weights = WeightCache(LARGEST_CACHE_BYTES)
        self._of_all = OutputDifferences(formats, weights)
        self._of_one = [OutputDifferences([format_], weights) for format_ in formats]
        shape = (1 + max(scored.group for scored in modules), len(formats) + 1)
        device = next(model.parameters()).device
        self._sums_2GF = torch.zeros(2, *shape, dtype=torch.float64, device=device)

    @contextmanager
    def scoring(self, choice: Choice) -> Iterator[None]:
        """While open, every pair of gradients adds to the sums.

        Args:
            choice: The plan: index of the format per group.
        """
        self._sums_2GF.zero_()
        handles = [
            module.register_forward_hook(self._forward_hook(scored, choice), with_kwargs=True)
            for scored, module in self._modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for differences in (self._of_all, *self._of_one):
                differences.forget()

    def sums(self) -> tuple[Floats, Floats]:
        """First and second sums ``(G, F + 1)`` since :meth:`scoring` was entered."""
        slope_GF, squares_GF = self._sums_2GF.cpu().numpy().copy()
        return slope_GF, squares_GF

    def _forward_hook(self, scored: ScoredModule, choice: Choice) -> Callable[..., None]:
        def hook(
            module: torch.nn.Module,
            arguments: tuple[Any, ...],
            keywords: dict[str, Any],
            output: torch.Tensor,
        ) -> None:
            if not output.requires_grad:
                return
            inputs = [_rows(value.detach()) for value in (*arguments, *keywords.values())]
            gradients: list[torch.Tensor] = []

            def on_gradient(gradient: torch.Tensor) -> None:
                gradients.append(_rows(gradient))
                if len(gradients) < NUM_GRADIENTS:
                    return
                rows = live_rows(gradients)
                chosen = [rows.of(gradient).float() for gradient in gradients]
                gradients.clear()
                with torch.no_grad():
                    self._add(scored, module, choice, [rows.of(one) for one in inputs], chosen)

            output.register_hook(on_gradient)

        return hook

    def _add(
        self,
        scored: ScoredModule,
        module: Any,
        choice: Choice,
        inputs: list[torch.Tensor],
        gradients: list[torch.Tensor],
    ) -> None:
        own = choice[scored.group]
        own_TO: Any = torch.zeros_like(gradients[0])  # of the plan's format to 16 bits
        if own != UNQUANTIZED:
            for _, rows, difference_CO in self._of(self._of_one[own], scored, module, inputs):
                own_TO[rows] = difference_CO
        for index, rows, difference_CO in self._of(self._of_all, scored, module, inputs):
            if index != own:
                self._add_change(scored.group, index, difference_CO - own_TO[rows], rows, gradients)
        if own != UNQUANTIZED:
            self._add_change(scored.group, UNQUANTIZED, -own_TO, slice(None), gradients)

    def _add_change(
        self,
        group: int,
        index: int,
        change_CO: torch.Tensor,
        rows: slice,
        gradients: list[torch.Tensor],
    ) -> None:
        slope_CO, curve_CO = (gradient_TO[rows] * change_CO for gradient_TO in gradients)
        sums_2 = torch.stack([slope_CO.sum(dtype=torch.float64), curve_CO.double().square_().sum()])
        self._sums_2GF[:, group, index] += sums_2.to(self._sums_2GF.device)

    def _of(
        self,
        differences: OutputDifferences,
        scored: ScoredModule,
        module: Any,
        inputs: list[torch.Tensor],
    ) -> Iterator[Difference]:
        """Output under formats minus the output in 16 bits, of the plan's own inputs."""
        planned = scored.planned
        maxima = self._maxima.get(planned.name, {})
        if planned.kind == "experts":
            experts = self._experts[planned.name]
            output_TO, _ = experts.run_and_collect(tuple(inputs))
            return differences.of_experts(experts, planned.name, maxima, output_TO, tuple(inputs))
        output_TO = torch.nn.functional.linear(inputs[0], module.weight, module.bias)
        maximum = maxima.get("input_amax")
        return differences.of_linear(planned, module, maximum, output_TO, inputs[0])


def _rows(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])
