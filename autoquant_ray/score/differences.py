"""Output differences of one module under every format, a chunk of rows at a time.

For a module with output ``Y = X W^T`` the difference under a format is ``Xq Wq^T - Y``. A weight
is quantized once per distinct weight quantizer and kept in a :class:`WeightCache`, an input once
per distinct input quantizer. Chunks keep the products in the processor's cache until they are
reduced.

In float32, ``Y_f`` of a linear is one product and ``Y`` is at hand. In 16 bits the difference of
two rounded outputs would be mostly rounding: there, quantization errors are formed in float32 and
multiplied separately, ``X dW^T + dX Wq^T``. That may be asked for in a float32 model too, where
products in bfloat16 are faster and exact enough; experts and caches compute as the model does.

Shape letters: T rows, C rows of a chunk, I in features, O out features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import Calibration, ModuleCalibration
from autoquant_ray.quantize.inputs import QuantizedInputs
from autoquant_ray.quantize.quantizers import quantized_weight
from autoquant_ray.quantize.single_experts import Runnable, by_module, runnable_experts
from autoquant_ray.quantize.smoothing import input_maximum, input_scales, smoothed_weight
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.gradient_book import GradientBook
from autoquant_ray.score.kv_caches import Add, CacheHooks

Formats = list[tuple[int, Format]]
"""Formats with their indices in the menu."""

Only = tuple[int, ...] | None
"""Indices of some formats; None: all."""

Difference = tuple[int, slice, torch.Tensor]
"""Format index, rows, and ``Y_f - Y`` of those rows; the tensor may be overwritten after use."""

_CHUNK_ELEMENTS = {"cpu": 2**20}
_CHUNK_ELEMENTS_ELSEWHERE = 2**26
_MIN_CHUNK_ROWS = 512  # fewer make the product itself slower


class _LinearWeights(NamedTuple):
    """Of a linear, under formats that quantize its weight alike.

    Attributes:
        scale_I: Factors of its input channels; None without.
        error_OI: ``Wq - W``; None where it is not needed.
        weight_OI: ``Wq``; None where no format quantizes inputs.
    """

    scale_I: torch.Tensor | None
    error_OI: torch.Tensor | None
    weight_OI: torch.Tensor | None


class OutputDifferences:
    """Computes output differences of the modules of one model.

    Args:
        formats: The menu.
        weights: Where quantized weights are kept.
        model: The model.
        dtype: ``float32`` or ``bfloat16``, of the products of linears; None: as the model computes.
    """

    def __init__(
        self,
        formats: Sequence[Format],
        weights: WeightCache,
        model: torch.nn.Module,
        dtype: str | None = None,
    ) -> None:
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self._formats = formats
        self._menus: dict[Only, list[Formats]] = {}
        self._weights = weights
        self._scales = WeightScales(model)
        self._scratch = torch.empty(0)
        self._inputs = QuantizedInputs()

    def calibrate(self, calibration: Calibration) -> None:
        """Use the statistics of all shards for the scales of weights."""
        self._scales.calibration = calibration

    def forget(self) -> None:
        """Release the inputs seen so far."""
        self._inputs.clear()

    def of_linear(
        self,
        planned: PlannedModule,
        module: Any,
        calibration: ModuleCalibration,
        output_TO: torch.Tensor,
        input_TI: torch.Tensor,
        only: Only = None,
    ) -> Iterator[Difference]:
        """Differences of a linear module, one weight quantizer after another.

        Args:
            planned: The module's entry in the plan.
            module: The module in the model.
            calibration: Of the module; needed by static input quantizers and scaled channels.
            output_TO: Its output.
            input_TI: Its input.
            only: Formats to compute.
        """
        chunks = self._chunks(output_TO)
        dtype = self._dtype or input_TI.dtype
        single = input_TI.dtype == dtype == torch.float32
        for formats in self._menu(only):
            menu = [format_ for _, format_ in formats]
            weights = self._linear_weights(
                planned, module, calibration, menu, dtype, is_single=single
            )
            scale_I, error_OI, weight_OI = weights
            maximum = input_maximum(calibration, scale_I, module.weight.dtype)
            for rows in chunks:
                inputs = self._inputs.of(
                    menu, maximum, scale_I, input_TI, rows, as_error=not single, dtype=dtype
                )
                if single and weight_OI is not None:
                    yield from self._single(
                        formats, inputs, rows, output_TO, input_TI, weight_OI, module.bias
                    )
                else:
                    assert error_OI is not None
                    yield from self._from_errors(
                        formats, inputs, input_TI[rows].to(dtype), rows, error_OI, weight_OI
                    )
            del weights, error_OI, weight_OI  # not held while the next are made

    def _linear_weights(
        self,
        planned: PlannedModule,
        module: Any,
        calibration: ModuleCalibration,
        formats: Sequence[Format],
        dtype: torch.dtype,
        *,
        is_single: bool,
    ) -> _LinearWeights:
        """What inputs are multiplied with under formats that quantize the weight alike."""
        format_ = formats[0]
        key = (planned.name, format_.weight_key, self._scales.unseen_half(format_))
        scale_I = self._factors(planned, module, format_, calibration)
        quantize = partial(_in_float32, module.weight, scale_I, format_, self._scales, planned.name)
        quantizes_inputs = any(format_.input is not None for format_ in formats)
        error_OI, weight_OI = None, None
        if not is_single or not quantizes_inputs:
            error_OI = self._weights.get(
                (*key, "error"), partial(_error, module.weight, scale_I, quantize, dtype)
            )
        if quantizes_inputs:
            weight_OI = self._weights.get((*key, "weight"), lambda: quantize().to(dtype))
        return _LinearWeights(scale_I, error_OI, weight_OI)

    def _factors(
        self, planned: PlannedModule, module: Any, format_: Format, calibration: ModuleCalibration
    ) -> torch.Tensor | None:
        """Factors of the input channels; None under a format without."""
        if not is_smoothed(format_):
            return None

        def make() -> torch.Tensor:
            scale_I = input_scales(format_, module.weight, calibration)
            assert scale_I is not None
            return scale_I

        return self._weights.get((planned.name, format_.weight_key, "scales"), make)

    def of_experts(
        self,
        experts: Runnable,
        name: str,
        maxima: Mapping[str, float],
        output_TO: torch.Tensor,
        inputs: tuple[torch.Tensor, ...],
        only: Only = None,
    ) -> Iterator[Difference]:
        """Differences of fused experts, or of one of them, by running them again."""
        for formats in self._menu(only):
            format_of_weight = formats[0][1]
            half = self._scales.unseen_half(format_of_weight)
            weights = {
                parameter: self._weights.get(
                    (name, format_of_weight.weight_key, half, parameter),
                    partial(experts.quantized_weight, parameter, format_of_weight, self._scales),
                )
                for parameter in experts.parameters
            }
            for index, format_ in formats:
                difference_TO = experts.run(format_, weights, maxima, inputs).sub_(output_TO)
                yield index, slice(0, len(output_TO)), difference_TO

    def _menu(self, only: Only) -> list[Formats]:
        """Formats with their indices, those that quantize weights alike together."""
        if only not in self._menus:
            by_weight: dict[str, Formats] = {}
            for index, format_ in enumerate(self._formats):
                if only is None or index in only:
                    by_weight.setdefault(format_.weight_key, []).append((index, format_))
            self._menus[only] = list(by_weight.values())
        return self._menus[only]

    def _single(
        self,
        formats: Formats,
        inputs: Mapping[str | None, torch.Tensor],
        rows: slice,
        output_TO: torch.Tensor,
        input_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
    ) -> Iterator[Difference]:
        """``Xq Wq^T + b - Y`` in float32."""
        for index, format_ in formats:
            states_CI = inputs.get(format_.input_key, input_TI[rows])
            buffer_CO = self._buffer(output_TO[rows])
            torch.addmm(output_TO[rows], states_CI, weight_OI.T, beta=-1, out=buffer_CO)
            yield index, rows, buffer_CO if bias_O is None else buffer_CO.add_(bias_O)

    def _from_errors(
        self,
        formats: Formats,
        errors: Mapping[str | None, torch.Tensor],
        states_CI: torch.Tensor,
        rows: slice,
        error_OI: torch.Tensor,
        weight_OI: torch.Tensor | None,
    ) -> Iterator[Difference]:
        """``X dW^T + dX Wq^T``; the first product serves all formats of a weight quantizer."""
        if weight_OI is None and states_CI.dtype == torch.float32:
            for index, _ in formats:
                buffer_CO = self._buffer(states_CI, len(error_OI))
                yield index, rows, torch.mm(states_CI, error_OI.T, out=buffer_CO)
            return
        by_weight_CO = (states_CI @ error_OI.T).float()
        for index, format_ in formats:
            if format_.input_key is None:
                yield index, rows, by_weight_CO.clone()
                continue
            assert weight_OI is not None
            yield index, rows, by_weight_CO + errors[format_.input_key] @ weight_OI.T

    def _buffer(self, like: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """Uninitialized memory with as many rows, reused by every product."""
        shape = (len(like), width or like.shape[1])
        needed = shape[0] * shape[1]
        if self._scratch.numel() < needed or self._scratch.device != like.device:
            self._scratch = torch.empty(needed, device=like.device)
        return self._scratch[:needed].view(shape)

    @staticmethod
    def _chunks(output_TO: torch.Tensor) -> list[slice]:
        num_rows, width = output_TO.shape
        elements = _CHUNK_ELEMENTS.get(output_TO.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        num_chunks = math.ceil(num_rows / max(_MIN_CHUNK_ROWS, elements // width))
        size = math.ceil(num_rows / max(1, num_chunks)) or 1
        return [slice(start, start + size) for start in range(0, num_rows, size)]


class ComparedModules:
    """The modules of a model whose outputs are compared while gradients flow backward.

    Args:
        model: The model.
        modules: What is compared.
        formats: The menu.
        weights: Where quantized weights are kept.
        cache_share: Share of the rows of an attention to use, drawn by importance; 1 takes all.
        difference_dtype: Of the products of linears; None: as the model computes.

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


def _in_float32(
    weight_OI: torch.Tensor,
    factors_I: torch.Tensor | None,
    format_: Format,
    scales: WeightScales,
    name: str,
) -> torch.Tensor:
    """``Wq`` of a weight, or of ``W / p``, in float32."""
    return quantized_weight(format_, smoothed_weight(weight_OI, factors_I).float(), scales, name)


def _error(
    weight_OI: torch.Tensor,
    factors_I: torch.Tensor | None,
    quantize: Callable[[], torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``Wq - W``, or ``p Wq - W``, formed in float32, in the type of the products."""
    quantized_OI = quantize()
    if factors_I is not None:
        quantized_OI = quantized_OI * factors_I.to(weight_OI.dtype).float()
    return quantized_OI.sub_(weight_OI.float()).to(dtype)
