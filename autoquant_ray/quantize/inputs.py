"""Quantized inputs of linears, shared by the projections that have the same input.

Shape letters: T rows, C rows of a chunk, I in features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.quantize.grid import Integers, integers_of
from autoquant_ray.quantize.quantizers import make_input_quantizer
from autoquant_ray.quantize.smoothing import quantized_input, smoothed_input


class QuantizedInputs:
    """Quantized chunks of the last input; projections that share an input share them.

    Not where channels are scaled: every projection has scales of its own.
    """

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None  # held, so that its memory is not another's
        self._version = 0
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._integers: dict[Hashable, Integers] = {}
        self._quantizers: dict[Hashable, Any] = {}

    def of(
        self,
        formats: Sequence[Format],
        maximum: float | None,
        scale_I: torch.Tensor | None,
        input_TI: torch.Tensor,
        rows: slice,
        *,
        as_error: bool,
        dtype: torch.dtype | None = None,
    ) -> dict[str | None, torch.Tensor]:
        """Quantized rows, or their errors, by the key of the input quantizer.

        Args:
            formats: That quantize the weight alike; where none quantizes inputs, nothing is done.
            maximum: Calibrated maximum of what the input quantizers see.
            scale_I: Factors of its input channels under these formats; None without. Where there
                are some, a format without input quantizer gets ``x * p``.
            input_TI: Whole input.
            rows: Which rows.
            as_error: Give the errors.
            dtype: Of what is given, the same at every call; None: the input's.
        """
        dtype = dtype or input_TI.dtype
        if all(format_.input is None for format_ in formats):
            return {}
        self._start(input_TI)
        if scale_I is not None:
            return {
                format_.input_key: quantized_input(
                    input_TI[rows],
                    self._quantizer(format_, maximum, input_TI.device),
                    scale_I,
                    as_error=as_error,
                    dtype=dtype,
                )
                for format_ in formats
            }
        return {
            format_.input_key: self._get(input_TI, rows, maximum, format_, dtype, as_error=as_error)
            for format_ in formats
            if format_.input is not None
        }

    def integers(
        self,
        format_: Format,
        maximum: float | None,
        scale_I: torch.Tensor | None,
        input_TI: torch.Tensor,
        rows: slice,
    ) -> Integers:
        """Quantized rows as integers.

        Args:
            format_: One of :func:`~autoquant_ray.formats.integer_pairs.is_integer_pair`.
            maximum: As above.
            scale_I: As above.
            input_TI: Whole input.
            rows: Which rows.
        """
        self._start(input_TI)
        quantizer = self._quantizer(format_, maximum, input_TI.device)
        if scale_I is not None:
            return integers_of(quantizer, smoothed_input(input_TI[rows], scale_I).float())
        key = (format_.input_key, maximum, rows.start, rows.stop)
        if key not in self._integers:
            self._integers[key] = integers_of(quantizer, input_TI[rows].float())
        return self._integers[key]

    def _get(
        self,
        input_TI: torch.Tensor,
        rows: slice,
        maximum: float | None,
        format_: Format,
        dtype: torch.dtype,
        *,
        as_error: bool,
    ) -> torch.Tensor:
        """``Xq`` of some rows, or ``Xq - X``, formed in float32.

        Args:
            input_TI: Whole input.
            rows: Which rows.
            maximum: Calibrated maximum.
            format_: Its input quantizer.
            dtype: Of the result.
            as_error: Give the error.
        """
        quantizer = self._quantizer(format_, maximum, input_TI.device)
        key = (format_.input_key, maximum, rows.start, rows.stop, as_error)
        if key not in self._kept:
            states_CI = input_TI[rows].float()
            quantized_CI = quantizer(states_CI)
            if as_error:
                quantized_CI = quantized_CI - states_CI
            self._kept[key] = quantized_CI.to(dtype)
        return self._kept[key]

    def _quantizer(self, format_: Format, maximum: float | None, device: torch.device) -> Any:
        key = (format_.input_key, maximum, device)
        if key not in self._quantizers:
            like = torch.empty(0, device=device)
            self._quantizers[key] = make_input_quantizer(format_.input, maximum, like)
        return self._quantizers[key]

    def clear(self) -> None:
        """Forget the last input."""
        self._input, self._kept, self._integers, self._quantizers = None, {}, {}, {}

    def _start(self, input_TI: torch.Tensor) -> None:
        """Forget the last input unless it is this one."""
        last = self._input
        is_last = (
            last is not None
            and last.data_ptr() == input_TI.data_ptr()
            and last.shape == input_TI.shape
            and last.stride() == input_TI.stride()
            and self._version == input_TI._version
        )
        if not is_last:
            self._input, self._version = input_TI, input_TI._version
            self._kept, self._integers, self._quantizers = {}, {}, {}
