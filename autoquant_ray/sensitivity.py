"""The scoring core: how much each format would disturb the loss, module by module.

For a module with output ``Y``, gradient ``g = dL/dY`` of the summed token loss, and output
``Y_f`` under format f (weight and input fake-quantized, all other modules exact):

    elementwise_f = sum_{t,o} (g_to * (Y_f - Y)_to)^2
    token_f       = sum_t (sum_o g_to * (Y_f - Y)_to)^2

``1/2 * elementwise_f / num_tokens`` predicts ``KL(P || P_f)`` in nats per token: the second-order
term of the KL divergence with the Fisher matrix in place of its Hessian (ModelOpt's
``auto_quantize`` uses the same diagonal form, without the unit).

The output difference is computed in the backward pass, when the gradient is known, on rows whose
gradient is not zero: padding costs nothing. A weight is quantized once per distinct weight
quantizer, an input once per distinct input quantizer.

Shape letters: T rows (tokens) with a gradient, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoquant_ray.errors import WorkerError
from autoquant_ray.experts import FusedExperts
from autoquant_ray.formats import Format
from autoquant_ray.plan import Plan
from autoquant_ray.quantizable import PlannedModule
from autoquant_ray.quantizers import fake_quantize_weight, make_input_quantizer

Maxima = dict[str, dict[str, float]]
"""Module name -> statistic (``input_amax``, ...) -> value, from calibration."""


@dataclass(frozen=True, kw_only=True)
class ScoredModule:
    """A module to score, and the index of the group that its sums are added to."""

    group: int
    planned: PlannedModule


def scored_modules(plan: Plan) -> tuple[ScoredModule, ...]:
    """All modules of a plan's searched groups, with the groups' positions."""
    return tuple(
        ScoredModule(group=index, planned=module)
        for index, group in enumerate(plan.searched)
        for module in group.modules
    )


@dataclass(frozen=True, kw_only=True)
class SensitivitySums:
    """Raw sums; G groups, F formats.

    Attributes:
        elementwise_GF: Float64, nats squared.
        token_GF: Float64, nats squared.
        num_rows_G: Rows with a gradient seen by each group, summed over its modules.
    """

    elementwise_GF: np.ndarray[Any, np.dtype[np.float64]]
    token_GF: np.ndarray[Any, np.dtype[np.float64]]
    num_rows_G: np.ndarray[Any, np.dtype[np.int64]]


class SensitivityScorer:
    """Accumulates sensitivity sums while gradients flow backward through a model.

    Args:
        model: Parameters take no gradient; activations do.
        modules: What to score.
        formats: F formats.
        num_draws: Backward passes that follow each forward pass; sums are averaged over them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
        num_draws: int = 1,
    ) -> None:
        self._num_formats = len(formats)
        self._by_weight = _by_weight(formats)
        self._num_draws = num_draws
        self._modules = [(scored, model.get_submodule(scored.planned.name)) for scored in modules]
        self._experts = {
            scored.planned.name: FusedExperts(module, scored.planned)
            for scored, module in self._modules
            if scored.planned.kind == "experts"
        }
        self._num_groups = 1 + max(scored.group for scored in modules)
        self._device = next(model.parameters()).device
        self._maxima: Maxima = {}
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        shape = (self._num_groups, self._num_formats)
        self._elementwise_GF = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._token_GF = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._num_rows_G = [0] * self._num_groups

    def sums(self) -> SensitivitySums:
        """The sums since the last :meth:`reset`."""
        return SensitivitySums(
            elementwise_GF=self._elementwise_GF.cpu().numpy(),
            token_GF=self._token_GF.cpu().numpy(),
            num_rows_G=np.array(self._num_rows_G, dtype=np.int64),
        )

    @contextmanager
    def scoring(self, maxima: Maxima) -> Iterator[None]:
        """While open, every backward pass through the model adds to the sums.

        Args:
            maxima: Calibrated input maxima; needed by formats with a static input quantizer.
        """
        self._maxima = maxima
        handles = [
            module.register_forward_hook(self._forward_hook(scored), with_kwargs=True)
            for scored, module in self._modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward_hook(self, scored: ScoredModule) -> Callable[..., None]:
        differences = (
            self._experts_differences
            if scored.planned.kind == "experts"
            else self._linear_differences
        )

        def hook(
            module: torch.nn.Module,
            arguments: tuple[Any, ...],
            keywords: dict[str, Any],
            output: torch.Tensor,
        ) -> None:
            if not output.requires_grad:
                return
            inputs = tuple(_rows(value.detach()) for value in (*arguments, *keywords.values()))
            output_TO = _rows(output.detach())
            versions = [tensor._version for tensor in (output_TO, *inputs)]
            gradients: list[torch.Tensor] = []

            def on_gradient(gradient: torch.Tensor) -> None:
                gradients.append(_rows(gradient))
                if len(gradients) == self._num_draws:
                    live = _live_rows(gradients)
                    chosen = [_select(rows, live) for rows in (output_TO, *inputs, *gradients)]
                    output, *chosen_inputs = chosen[: 1 + len(inputs)]
                    self._num_rows_G[scored.group] += len(output)
                    now = [tensor._version for tensor in (output_TO, *inputs)]
                    with torch.no_grad():
                        if now != versions:
                            _require_same_inputs(scored.planned.name, versions[1:], now[1:])
                            output = self._output_again(scored.planned, module, chosen_inputs)
                        iterator = differences(scored.planned, module, output, *chosen_inputs)
                        self._add(scored.group, iterator, chosen[1 + len(inputs) :])
                    gradients.clear()

            output.register_hook(on_gradient)

        return hook

    def _linear_differences(
        self, planned: PlannedModule, module: Any, output_TO: torch.Tensor, input_TI: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (format index, ``Y_f - Y``), one weight quantizer after another.

        In float32, ``Y_f`` is one product and ``Y`` is at hand. In 16 bits the difference of two
        rounded outputs would be mostly rounding: there, quantization errors are formed in
        float32 and multiplied apart, ``X dW^T + dX Wq^T``.
        """
        dtype = input_TI.dtype
        is_single = dtype == torch.float32
        maximum = self._maxima.get(planned.name, {}).get("input_amax")
        inputs: dict[str, torch.Tensor] = {}
        for formats in self._by_weight:
            original_OI = module.weight.float()
            weight_OI = fake_quantize_weight(formats[0][1].weight, original_OI)
            by_weight_TO: torch.Tensor | None = None
            if not is_single or any(format_.input is None for _, format_ in formats):
                by_weight_TO = input_TI @ (weight_OI - original_OI).to(dtype).T
            for index, format_ in formats:
                if format_.input is None or format_.input_key is None:
                    assert by_weight_TO is not None
                    yield index, by_weight_TO
                    continue
                if format_.input_key not in inputs:
                    quantizer = make_input_quantizer(format_.input, maximum, original_OI)
                    assert quantizer is not None
                    inputs[format_.input_key] = quantizer(input_TI.float())
                quantized_TI = inputs[format_.input_key]
                if is_single:
                    output = torch.nn.functional.linear(quantized_TI, weight_OI, module.bias)
                    yield index, output.sub_(output_TO)
                else:
                    assert by_weight_TO is not None
                    errors_TI = (quantized_TI - input_TI.float()).to(dtype)
                    by_input_TO = errors_TI @ weight_OI.to(dtype).T
                    yield index, by_input_TO.float() + by_weight_TO.float()

    def _experts_differences(
        self, planned: PlannedModule, module: Any, output_TO: torch.Tensor, *inputs: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        experts = self._experts[planned.name]
        maxima = self._maxima.get(planned.name, {})
        for formats in self._by_weight:
            weights = experts.quantize_weights(formats[0][1].weight)
            for index, format_ in formats:
                yield index, experts.run(format_, weights, maxima, inputs).sub_(output_TO)

    def _output_again(
        self, planned: PlannedModule, module: Any, inputs: list[torch.Tensor]
    ) -> torch.Tensor:
        """The module's output, where the model has since added to it in place."""
        if planned.kind == "experts":
            return self._experts[planned.name].run_and_collect(tuple(inputs))[0]
        return torch.nn.functional.linear(inputs[0], module.weight, module.bias)

    def _add(
        self,
        group: int,
        differences: Iterator[tuple[int, torch.Tensor]],
        gradients_TO: list[torch.Tensor],
    ) -> None:
        for index, difference_TO in differences:
            for gradient_TO in gradients_TO:
                product_TO = gradient_TO.float() * difference_TO.float()
                norms_T = torch.linalg.vector_norm(product_TO, dim=1).double()
                totals_T = product_TO.sum(dim=1).double()
                self._elementwise_GF[group, index] += norms_T.square().sum() / self._num_draws
                self._token_GF[group, index] += totals_T.square().sum() / self._num_draws


def _by_weight(formats: Sequence[Format]) -> list[list[tuple[int, Format]]]:
    """Formats with their indices, those that quantize weights alike together."""
    groups: dict[str, list[tuple[int, Format]]] = {}
    for index, format_ in enumerate(formats):
        groups.setdefault(format_.weight_key, []).append((index, format_))
    return list(groups.values())


def _require_same_inputs(name: str, before: list[int], now: list[int]) -> None:
    if before != now:
        raise WorkerError(f"the model changes the input of {name} in place; --disable {name}")


def _rows(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])


def _live_rows(gradients_TO: list[torch.Tensor]) -> torch.Tensor | None:
    """Indices of rows where any gradient is not zero (NaN counts); None if all rows are."""
    live_T = torch.stack([_largest(gradient) != 0 for gradient in gradients_TO]).any(dim=0)
    indices = live_T.nonzero()[:, 0]
    return None if len(indices) == len(live_T) else indices


def _largest(gradient_TO: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(gradient_TO, ord=float("inf"), dim=1)


def _select(rows: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    return rows if indices is None else rows.index_select(0, indices)
