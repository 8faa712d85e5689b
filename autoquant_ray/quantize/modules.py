"""Runs a model's modules under chosen formats: what ``mtq.quantize`` would make of them.

Weights and inputs pass through ModelOpt's own quantizers, in the model's own dtype. Nothing in the
model is changed: while a context is open, the modules of one layer run another ``forward``.

Shape letters: T tokens, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.models.layers import replaced_forward
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.attention import CachedAttention
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.quantizers import make_input_quantizer, quantized_weight
from autoquant_ray.quantize.single_experts import (
    SingleExpert,
    by_module,
    run_apart,
    runnable_experts,
)
from autoquant_ray.quantize.smoothing import (
    input_maximum,
    input_scales,
    smoothed_input,
    smoothed_weight,
)
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.quantize.weight_search import WeightScales

FormatNumbers = tuple[int, ...]
"""Index of the format per searched group; -1 where the group stays in 16 bits."""

UNQUANTIZED = -1

FRONT = -1
"""Stands for the layer before all: what runs before the decoder layers, a vision tower."""


class QuantizedLayers:
    """Lets the modules of a layer run under the formats of a choice.

    Args:
        model: The model; ``prepare_experts`` must have run.
        layers: Its decoder layers in order.
        modules: All modules that may be quantized.
        formats: The menu that choices point into.
        calibration: From the scan.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[torch.nn.Module],
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
        calibration: Calibration,
    ) -> None:
        self._formats = formats
        self._calibration = calibration
        self._scales = WeightScales(model, calibration)
        number_of = {m: number for number, layer in enumerate(layers) for m in layer.modules()}
        self._by_layer: dict[int, list[tuple[ScoredModule, Any]]] = {}
        self._experts = runnable_experts(by_module(model, modules))
        self._attentions: dict[str, CachedAttention] = {}
        for scored in modules:
            module = model.get_submodule(scored.planned.path)
            outside = FRONT if scored.planned.is_idle else len(layers)
            number = number_of.get(module, outside)
            self._by_layer.setdefault(number, []).append((scored, module))
            if scored.planned.is_cache:
                self._attentions[scored.planned.name] = CachedAttention(module, scored.planned)

    def signature(self, number: int, choice: FormatNumbers) -> FormatNumbers:
        """The part of a choice that matters in a layer; the head counts as the layer after all."""
        return tuple(choice[scored.group] for scored, _ in self._by_layer.get(number, []))

    def quantized_bytes(self, number: int, choice: FormatNumbers) -> int:
        """Bytes of a layer's quantized weights under a choice, in the model's own dtype."""
        return sum(
            scored.planned.num_elements * next(module.parameters()).element_size()
            for scored, module in self._by_layer.get(number, [])
            if choice[scored.group] != UNQUANTIZED and not scored.planned.is_cache
        )

    @contextmanager
    def quantized(self, number: int, choice: FormatNumbers, weights: WeightCache) -> Iterator[None]:
        """While open, the modules of a layer run under the formats of a choice.

        Args:
            number: The layer; the number of layers stands for the head, ``FRONT`` for what runs
                before them.
            choice: Formats of all groups.
            weights: Keeps quantized weights between calls.
        """
        apart: dict[Any, list[tuple[SingleExpert, PlannedModule, Format]]] = {}
        with ExitStack() as stack:
            for scored, module in self._by_layer.get(number, []):
                index = choice[scored.group]
                if index == UNQUANTIZED:
                    continue
                planned, format_ = scored.planned, self._formats[index]
                if isinstance(expert := self._experts.get(planned.name), SingleExpert):
                    apart.setdefault(module, []).append((expert, planned, format_))
                    continue
                forward = self._forward(planned, module, format_, weights)
                stack.enter_context(replaced_forward(module, forward))
            for module, chosen in apart.items():
                stack.enter_context(
                    replaced_forward(module, run_apart(chosen, weights, self._scales))
                )
            yield

    def _forward(
        self, planned: PlannedModule, module: Any, format_: Format, weights: WeightCache
    ) -> Callable[..., Any]:
        calibration = self._calibration.of(planned.name)
        if planned.is_cache:
            attention = self._attentions[planned.name]
            return lambda *inputs, **named: attention.run(
                format_, calibration.maxima, inputs, named
            )
        if (experts := self._experts.get(planned.name)) is not None:
            kept = {
                name: weights.get(
                    (planned.name, format_.weight_key, name),
                    partial(experts.quantized_weight, name, format_, self._scales),
                )
                for name in experts.parameters
            }
            return lambda *inputs: experts.run(format_, kept, calibration.maxima, inputs)
        scale_I = input_scales(format_, module.weight, calibration)
        weight_OI = weights.get(
            (planned.name, format_.weight_key),
            lambda: quantized_weight(
                format_, smoothed_weight(module.weight, scale_I), self._scales, planned.name
            ),
        )
        maximum = input_maximum(calibration, scale_I, module.weight.dtype)
        quantizer = make_input_quantizer(format_.input, maximum, module.weight[:0])

        def forward(states: torch.Tensor) -> torch.Tensor:
            smoothed = smoothed_input(states, scale_I)
            quantized = smoothed if quantizer is None else quantizer(smoothed)
            weight = weight_OI.to(quantized.dtype)  # an attention may run again in float32
            return torch.nn.functional.linear(quantized, weight, module.bias)

        return forward
