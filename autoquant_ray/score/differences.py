"""Output differences of one module under every format, a chunk of rows at a time.

For a module with output ``Y = X W^T`` the difference under a format is ``Xq Wq^T - Y``. A weight
is quantized once per distinct weight quantizer and kept in a :class:`WeightCache`, an input once
per distinct input quantizer. Chunks keep the products in the processor's cache until they are
reduced.

In float32, ``Y_f`` of a linear is one product and ``Y`` is at hand. In 16 bits the difference of
two rounded outputs would be mostly rounding: there, quantization errors are formed in float32 and
multiplied separately, ``X dW^T + dX Wq^T``. That may be asked for in a float32 model too, where
products in bfloat16 are faster and exact enough; experts and caches compute as the model does.

Where weight and input are integers with scales outside the sum, ``Y_f`` may be ``s_x s_w (Xi
Wi^T)``, which is exact but for its scaling. That needs ``Y`` in float32: in 16 bits a product for
``Y`` would come on top, which is most of what an integer product saves.

Shape letters: T rows, C rows of a chunk, I in features, O out features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.integer_pairs import (
    fits_int_mm,
    is_integer_pair,
    multiplies_integers,
    without_integers,
)
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.work import chunk_rows
from autoquant_ray.quantize.calibration import Calibration, ModuleCalibration
from autoquant_ray.quantize.grid import Integers
from autoquant_ray.quantize.inputs import QuantizedInputs
from autoquant_ray.quantize.quantizers import integer_weight, quantized_weight
from autoquant_ray.quantize.single_experts import Runnable
from autoquant_ray.quantize.smoothing import input_maximum, input_scales, smoothed_weight
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.integer_products import multiplied

Formats = list[tuple[int, Format]]
"""Formats with their indices in the menu."""

Only = tuple[int, ...] | None
"""Indices of some formats; None: all."""

Difference = tuple[int, slice, torch.Tensor]
"""Format index, rows, and ``Y_f - Y`` of those rows; the tensor may be overwritten after use."""


class _Linear(NamedTuple):
    """A linear and what it was called with.

    Attributes:
        planned: The module's entry in the plan.
        module: The module in the model.
        calibration: Of the module.
        output_TO: Its output.
        input_TI: Its input.
    """

    planned: PlannedModule
    module: Any
    calibration: ModuleCalibration
    output_TO: torch.Tensor
    input_TI: torch.Tensor


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
        dtype: ``float32`` or ``bfloat16``, of the products of linears, or ``int8+`` one of them;
            None: as the model computes.
    """

    def __init__(
        self,
        formats: Sequence[Format],
        weights: WeightCache,
        model: torch.nn.Module,
        dtype: str | None = None,
    ) -> None:
        others = without_integers(dtype)
        self._dtype: torch.dtype | None = None if others is None else getattr(torch, others)
        takes_integers = multiplies_integers(dtype)
        self._pairs = {n for n, f in enumerate(formats) if takes_integers and is_integer_pair(f)}
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
        linear = _Linear(planned, module, calibration, output_TO, input_TI)
        takes_integers = input_TI.dtype == torch.float32 and fits_int_mm(module.weight.shape)
        taken = self._pairs if takes_integers else set()
        for formats in self._menu(only):
            if pairs := [each for each in formats if each[0] in taken]:
                yield from self._from_integers(pairs, linear)
            if others := [each for each in formats if each[0] not in taken]:
                yield from self._from_floats(others, linear)

    def _from_floats(self, formats: Formats, linear: _Linear) -> Iterator[Difference]:
        """Differences under formats that quantize the weight alike."""
        _, module, calibration, output_TO, input_TI = linear
        dtype = self._dtype or input_TI.dtype
        single = input_TI.dtype == dtype == torch.float32
        menu = [format_ for _, format_ in formats]
        weights = self._linear_weights(linear, menu, dtype, is_single=single)
        scale_I, error_OI, weight_OI = weights
        maximum = input_maximum(calibration, scale_I, module.weight.dtype)
        for rows in self._chunks(output_TO):
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

    def _from_integers(self, formats: Formats, linear: _Linear) -> Iterator[Difference]:
        """``s_x s_w (Xi Wi^T) + b - Y`` under formats that quantize the weight alike."""
        planned, module, calibration, output_TO, input_TI = linear
        format_ = formats[0][1]
        scale_I = self._factors(planned, module, format_, calibration)
        weight = self._integer_weight(linear, format_, scale_I)
        maximum = input_maximum(calibration, scale_I, module.weight.dtype)
        for rows in self._chunks(output_TO):
            for index, format_ in formats:
                inputs = self._inputs.integers(format_, maximum, scale_I, input_TI, rows)
                buffer_CO = multiplied(inputs, weight, out=self._buffer(output_TO[rows]))
                buffer_CO.sub_(output_TO[rows])
                yield index, rows, buffer_CO if module.bias is None else buffer_CO.add_(module.bias)

    def _integer_weight(
        self, linear: _Linear, format_: Format, scale_I: torch.Tensor | None
    ) -> Integers:
        """The weight, or ``W / p``, as integers."""
        planned, weight_OI = linear.planned, linear.module.weight
        key = self._key(planned, format_)

        @cache
        def make() -> Integers:
            float_OI = smoothed_weight(weight_OI, scale_I).float()
            made: Integers = integer_weight(format_, float_OI, self._scales, planned.name)
            return made

        codes_OI = self._weights.get((*key, "codes"), lambda: make().codes_RI)
        return Integers(codes_OI, self._weights.get((*key, "unit"), lambda: make().unit_R))

    def _key(self, planned: PlannedModule, format_: Format) -> tuple[Hashable, ...]:
        """Of what is kept of a weight under a format."""
        return planned.name, format_.weight_key, self._scales.unseen_half(format_)

    def _linear_weights(
        self, linear: _Linear, formats: Sequence[Format], dtype: torch.dtype, *, is_single: bool
    ) -> _LinearWeights:
        """What inputs are multiplied with under formats that quantize the weight alike."""
        planned, module, calibration, *_ = linear
        format_ = formats[0]
        key = self._key(planned, format_)
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
        num_chunks = math.ceil(num_rows / chunk_rows(width, output_TO.device.type))
        size = math.ceil(num_rows / max(1, num_chunks)) or 1
        return [slice(start, start + size) for start in range(0, num_rows, size)]


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
