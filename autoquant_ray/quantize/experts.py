"""Fused mixture-of-experts modules: calibrate and re-run them with a format switched on.

Current transformers keep the experts of a layer as 3-D parameters of one module. ModelOpt wraps
that module and quantizes each expert's slice and the two shared inputs; GPT-OSS stores its experts
transposed, and there all of a projection is quantized as one tensor. Here a *shadow* of the module
carries ModelOpt's wrapper, so the model itself stays as it was loaded.

Shape letters: T tokens, H hidden, E experts, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autoquant_ray.errors import ModelError
from autoquant_ray.formats.format import Format
from autoquant_ray.modelopt_api import experts_shadow
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.reach import PAST_QUANTIZERS
from autoquant_ray.plan.stand_in import calls_quantizers
from autoquant_ray.quantize.quantizers import (
    disabled_quantizer,
    make_input_quantizer,
    quantized_weight,
)
from autoquant_ray.quantize.weight_search import WeightScales


class FusedExperts:
    """A shadow of one fused experts module.

    Args:
        module: The module in the model; :func:`prepare_experts` must have run.
        planned: Its entry in the plan.
    """

    def __init__(self, module: torch.nn.Module, planned: PlannedModule) -> None:
        self.parameters = planned.parameters
        self.is_transposed = planned.is_transposed
        self._name = planned.path
        self._module = module
        self._shadow: Any = experts_shadow(module, self.parameters)
        self._resting = dict(self._shadow._parameters)
        self._passing = disabled_quantizer()
        self._leave_inputs()
        self._calls_quantizers = False

    @torch.no_grad()
    def quantized_weight(self, name: str, format_: Format, scales: WeightScales) -> torch.Tensor:
        """Fake-quantize a parameter: every expert's slice ``(O, I)`` by itself, or all together.

        Args:
            name: The parameter's.
            format_: Its weight quantizer is used.
            scales: Those of the model.

        Returns:
            ``(E, O, I)``, transposed where the module stores it so.
        """
        slices = getattr(self._module, name)
        if self.is_transposed:
            whole = slices.mT.contiguous()
            return quantized_weight(format_, whole, scales, self._name, name).mT
        return torch.stack(
            [self.quantized_slice(name, e, format_, scales) for e in range(len(slices))]
        )

    def quantized_slice(
        self, name: str, expert: int, format_: Format, scales: WeightScales
    ) -> torch.Tensor:
        """One expert's slice of a parameter, ``(O, I)``, by itself."""
        weight_OI = getattr(self._module, name)[expert]
        return quantized_weight(format_, weight_OI, scales, self._name, name, str(expert))

    def run(
        self,
        format_: Format,
        weights: dict[str, torch.Tensor],
        maxima: Mapping[str, float],
        inputs: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Output ``(T, H)`` under a format.

        Args:
            format_: Its input quantizer is applied before both projections.
            weights: Parameter name -> :meth:`quantized_weight` under the format.
            maxima: Statistic name -> calibrated maximum of this module.
            inputs: Arguments of the module's ``forward``, each with T rows.
        """
        for name in self.parameters:
            quantizer = make_input_quantizer(
                format_.input, maxima.get(f"{name}_input_amax"), inputs[0]
            )
            setattr(self._shadow, f"{name}_input_quantizer", quantizer or self._passing)
        return self._run_shadow(inputs, _as_parameters(weights))

    def run_weights(
        self, weights: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Output ``(T, H)`` of other weights, inputs as they are.

        Args:
            weights: Parameter name -> ``(E', O, I)``; the routes are numbers below E'.
            inputs: Arguments of the module's ``forward``, each with T rows.
        """
        self._leave_inputs()
        return self._run_shadow(inputs, _as_parameters(weights))

    def weights_of(self, name: str) -> torch.Tensor:
        """A parameter as the module has it now, ``(E, O, I)``."""
        weights: torch.Tensor = getattr(self._module, name)
        return weights

    @torch.no_grad()
    def run_and_collect(
        self, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Unquantized output ``(T, H)`` and the maxima of both projections' inputs."""
        recorders = {}
        for name in self.parameters:
            recorders[f"{name}_input_amax"] = _MaximumRecorder()
            setattr(self._shadow, f"{name}_input_quantizer", recorders[f"{name}_input_amax"])
        output = self._run_shadow(inputs, {})
        seen = {key: recorder.maximum for key, recorder in recorders.items()}
        return output, {key: maximum for key, maximum in seen.items() if maximum is not None}

    @torch.no_grad()
    def input_channels(
        self,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        inputs: Sequence[torch.Tensor],
        expert: int | None = None,
    ) -> dict[str, tuple[torch.Tensor, int]]:
        """Sums over the tokens of both projections' inputs, and how many tokens these are.

        Args:
            reduce: ``(T, I)`` -> the sum over its rows.
            inputs: Arguments of the module's ``forward``; of a single expert, its tokens with one
                route each, of number 0.
            expert: Run this expert alone; None: all together.

        Returns:
            Parameter name -> sum and number of tokens; without parameters that saw none.
        """
        recorders = {name: _SumRecorder(reduce) for name in self.parameters}
        for name, recorder in recorders.items():
            setattr(self._shadow, f"{name}_input_quantizer", recorder)
        alone = {}
        if expert is not None and self.is_transposed:  # its biases are not sliced
            inputs = [s if s.is_floating_point() else s + expert for s in inputs]
        elif expert is not None:
            alone = {name: self.slice_of(name, expert) for name in self.parameters}
        self._run_shadow(tuple(inputs), _as_parameters(alone))
        return {
            name: (recorder.total, recorder.num_tokens)
            for name, recorder in recorders.items()
            if recorder.total is not None
        }

    def slice_of(self, name: str, expert: int) -> torch.Tensor:
        """A parameter of one expert, ``(1, O, I)``."""
        return self.weights_of(name)[expert : expert + 1]

    def _leave_inputs(self) -> None:
        for name in self.parameters:
            setattr(self._shadow, f"{name}_input_quantizer", self._passing)

    def _run_shadow(
        self, inputs: tuple[torch.Tensor, ...], replaced: dict[str, torch.nn.Parameter]
    ) -> torch.Tensor:
        """Run with the parameters that the module has now (offloaded: only during a visit)."""
        self._shadow._parameters.update(self._module._parameters | replaced)
        try:
            self._require_calls(inputs)
            output: torch.Tensor = self._shadow(*inputs)
        finally:
            self._shadow._parameters.update(self._resting)  # keeps neither layer nor copy
        return output

    def _require_calls(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Check in the first run with a token that ModelOpt's quantizers are called.

        Raises:
            ModelError: They are not.
        """
        if self._calls_quantizers or len(inputs[0]) == 0:
            return
        if not calls_quantizers(self._shadow, self.parameters, inputs):
            raise ModelError(
                f"{self._name} ({type(self._module).__name__}): {PAST_QUANTIZERS}; "
                f"`disable` {self._name}"
            )
        self._calls_quantizers = True


def _as_parameters(weights: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    return {
        name: torch.nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()
    }


class _MaximumRecorder(torch.nn.Module):
    """Stands in for an input quantizer and notes the largest absolute input."""

    def __init__(self) -> None:
        super().__init__()
        self.maximum: torch.Tensor | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.numel():
            seen = states.abs().amax()
            self.maximum = seen if self.maximum is None else torch.maximum(self.maximum, seen)
        return states


class _SumRecorder(torch.nn.Module):
    """Stands in for an input quantizer and sums over the rows of what passes."""

    def __init__(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._reduce = reduce
        self.total: torch.Tensor | None = None
        self.num_tokens = 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, states.shape[-1])
        if len(rows):
            added = self._reduce(rows)
            self.total = added if self.total is None else self.total + added
            self.num_tokens += len(rows)
        return states
