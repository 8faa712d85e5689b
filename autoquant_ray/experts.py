"""Fused mixture-of-experts modules: calibrate and re-run them with a format switched on.

Current transformers keep the experts of a layer as 3-D parameters of one module. ModelOpt wraps
that module and quantizes each expert's slice and the two shared inputs; GPT-OSS stores its experts
transposed, and there all of a projection is quantized as one tensor. Here a *shadow* of the module
carries ModelOpt's wrapper, so the model itself stays as it was loaded.

Shape letters: T tokens, H hidden, E experts, O out features, I in features.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModuleRegistry
from modelopt.torch.quantization.plugins.huggingface import (
    force_eager_experts_impl_on_the_fly,
    register_fused_experts_on_the_fly,
)

from autoquant_ray.formats import Attributes, Format
from autoquant_ray.quantizable import PlannedModule
from autoquant_ray.quantizers import (
    disabled_quantizer,
    fake_quantize_weight,
    make_input_quantizer,
)


def prepare_experts(model: torch.nn.Module) -> None:
    """Make fused experts run expert by expert, the only way that ModelOpt can quantize."""
    force_eager_experts_impl_on_the_fly(model)
    register_fused_experts_on_the_fly(model)


class FusedExperts:
    """A shadow of one fused experts module.

    Args:
        module: The module in the model; :func:`prepare_experts` must have run.
        planned: Its entry in the plan.
    """

    def __init__(self, module: torch.nn.Module, planned: PlannedModule) -> None:
        self.parameters = planned.parameters
        self._is_transposed = planned.is_transposed
        self._module = module
        self._shadow: Any = shadow_of(module)
        self._resting = dict(self._shadow._parameters)
        for name in self.parameters:
            setattr(self._shadow, f"{name}_input_quantizer", disabled_quantizer())
        if self._is_transposed:  # its weights come quantized: spares two copies in every run
            self._shadow.__dict__["quantize_weight"] = nullcontext
            return
        for name in self.parameters:
            for quantizer in getattr(self._shadow, f"{name}_weight_quantizers"):
                quantizer.disable()

    @torch.no_grad()
    def quantized_weight(self, name: str, attributes: Attributes) -> torch.Tensor:
        """Fake-quantize a parameter, every expert's slice ``(O, I)`` by itself or all as one.

        Returns:
            ``(E, O, I)``, transposed where the module stores it so.
        """
        slices = getattr(self._module, name)
        if self._is_transposed:
            return fake_quantize_weight(attributes, slices.mT.contiguous()).mT
        return torch.stack([fake_quantize_weight(attributes, weight_OI) for weight_OI in slices])

    @torch.no_grad()
    def run(
        self,
        format_: Format,
        weights: dict[str, torch.Tensor],
        maxima: dict[str, float],
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
            setattr(self._shadow, f"{name}_input_quantizer", quantizer or disabled_quantizer())
        quantized = {
            name: torch.nn.Parameter(weight, requires_grad=False)
            for name, weight in weights.items()
        }
        return self._run_shadow(inputs, quantized)

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

    def _run_shadow(
        self, inputs: tuple[torch.Tensor, ...], replaced: dict[str, torch.nn.Parameter]
    ) -> torch.Tensor:
        """Run with the parameters that the module has now (offloaded: only during a visit)."""
        self._shadow._parameters.update(self._module._parameters | replaced)
        try:
            output: torch.Tensor = self._shadow(*inputs)
        finally:
            self._shadow._parameters.update(self._resting)  # keeps neither layer nor copy
        return output


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


def shadow_of(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that carries ModelOpt's wrapper and shares parameters and parts with the module."""
    shadow = copy.copy(module)
    shadow.__dict__.update(
        {key: value.copy() for key, value in module.__dict__.items() if isinstance(value, dict)}
    )
    # accelerate's hooks replace the forward of a split model's modules; theirs runs the original.
    for name in ("forward", "_old_forward", "_hf_hook"):
        shadow.__dict__.pop(name, None)
    converted: torch.nn.Module = QuantModuleRegistry.convert(shadow)
    return converted.eval()
