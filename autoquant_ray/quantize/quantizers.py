"""Fake quantization of weights and inputs through ModelOpt's own quantizer modules.

Nothing here rounds a number by itself: a :class:`Format`'s attributes configure ModelOpt's
``TensorQuantizer``, calibrated by maximum as ``mtq.calibrate(algorithm="max")`` does it; a weight's
may then be searched (:mod:`autoquant_ray.quantize.weight_search`). Where that needs a CUDA kernel
and the values are on CPU, :mod:`autoquant_ray.quantize.backends.block_formats` steps in through
ModelOpt's hook for such a case.

ModelOpt's quantizers keep state that depends on the shape of what they quantized (they reshape
blocks): every weight gets a new quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import autoquant_ray.quantize.backends.by_ggml  # noqa: F401 (registers its backend)
from autoquant_ray.formats.algorithms import SEARCHES
from autoquant_ray.formats.format import Attributes, Format
from autoquant_ray.formats.numbers import is_scaled_by_block, is_static_nvfp4
from autoquant_ray.formats.smoothed import has_free_rows, method_of, needs_channel_squares
from autoquant_ray.modelopt_api import (
    QuantizerAttributeConfig,
    TensorQuantizer,
    load_maxima,
    needs_static_maximum,
)
from autoquant_ray.quantize.backends.block_formats import WEIGHTS_BACKEND, backend_for
from autoquant_ray.quantize.grid import Grid, Integers, grid_of, integers_of, values_of
from autoquant_ray.quantize.weight_search import (
    Recall,
    WeightScales,
    finish_static_blocks,
    search_scales,
    set_common_maximum,
)

_CHUNK_ELEMENTS = 2**20


def make_quantizer(attributes: Attributes, device: torch.device) -> TensorQuantizer:
    """Build an enabled, uncalibrated quantizer for values on a device."""
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**attributes, enable=True))
    if device.type == "cpu" and _takes_backend(attributes):
        quantizer.backend = backend_for(attributes, is_weight=False)
    return quantizer


def _takes_backend(attributes: Attributes) -> bool:
    return is_scaled_by_block(attributes) and not is_static_nvfp4(attributes)


def disabled_quantizer() -> TensorQuantizer:
    """Build a quantizer that passes its input through."""
    quantizer = TensorQuantizer()
    quantizer.disable()
    return quantizer


@torch.no_grad()
def fake_quantize_weight(
    attributes: Attributes,
    weight_OI: torch.Tensor,
    algorithm: Attributes | None = None,
    recall: Recall | None = None,
    largest: torch.Tensor | None = None,
    squares_I: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize one weight tensor.

    Args:
        attributes: Weight quantizer attributes.
        weight_OI: ``(out, in)``, or ``(experts, out, in)`` for experts that share a quantizer; any
            float dtype and device.
        algorithm: The format's; None calibrates by the weight's own maximum.
        recall: Remembers the scales of a search; None searches anew.
        largest: Largest absolute weight of all layers that share its scale; None: its own.
        squares_I: Mean square of every input channel, float32; ``weighted`` without it leaves the
            scales at the maxima.

    Returns:
        Tensor like ``weight_OI``.
    """
    quantizer = make_weight_quantizer(attributes, weight_OI, algorithm, recall, largest, squares_I)
    quantized: torch.Tensor = quantizer(weight_OI)
    return quantized


def quantized_weight(
    format_: Format, weight_OI: torch.Tensor, scales: WeightScales, *name: str
) -> torch.Tensor:
    """A weight of a model as a format makes it; the result of a search is kept.

    Where the format has factors it is rounded with them, in float32, and divided by them again:
    what a model computes whose factors were folded.

    Args:
        format_: The format.
        weight_OI: As above.
        scales: Those of the model.
        name: The module's name; parameter and expert in a module of many.
    """
    factors_I = scales.factors(name, format_)
    if factors_I is not None:
        scaled_OI = weight_OI.float() * factors_I
        return (_quantized(format_, scaled_OI, scales, *name) / factors_I).to(weight_OI.dtype)
    return _quantized(format_, weight_OI, scales, *name)


@torch.no_grad()
def integer_weight(
    format_: Format, weight_OI: torch.Tensor, scales: WeightScales, *name: str
) -> Integers:
    """The integers of :func:`quantized_weight`; arguments as there.

    Args:
        format_: One of :func:`~autoquant_ray.formats.integer_pairs.is_integer_pair`.
        weight_OI: Float32.
        scales: As above.
        name: As above.
    """
    parts = [integers_of(*part) for part in _rounded_parts(format_, weight_OI, scales, *name)]
    if len(parts) == 1:
        return parts[0]
    return Integers(*map(torch.cat, zip(*parts, strict=True)))


def _quantized(
    format_: Format, weight_OI: torch.Tensor, scales: WeightScales, *name: str
) -> torch.Tensor:
    rounded = _rounded_parts(format_, weight_OI, scales, *name)
    parts: list[torch.Tensor] = [quantizer(part_OI) for quantizer, part_OI in rounded]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rounded_parts(
    format_: Format, weight_OI: torch.Tensor, scales: WeightScales, *name: str
) -> Iterator[tuple[TensorQuantizer, torch.Tensor]]:
    """Quantizers, each with the rows that it is given, see :func:`rounded_weight`."""
    if method_of(format_) in SEARCHES or len(chunks := _row_chunks(format_, weight_OI)) == 1:
        quantizer = quantizer_of(format_, weight_OI, scales, *name)
        yield quantizer, rounded_weight(format_, quantizer, weight_OI, scales, *name)
        return
    codes = scales.codes(name, format_)
    codes_OI = None if codes is None else codes.reshape(weight_OI.shape)
    start = 0
    for chunk_OI in chunks:
        quantizer = quantizer_of(format_, chunk_OI, scales, *name)
        if codes_OI is not None:
            codes = codes_OI[start : start + len(chunk_OI)]
            chunk_OI = values_of(codes, grid_of(quantizer, chunk_OI)).to(weight_OI.dtype)
        yield quantizer, chunk_OI
        start += len(chunk_OI)


def _row_chunks(format_: Format, weight_OI: torch.Tensor) -> Sequence[torch.Tensor]:
    """Some rows at a time, where they have scales of their own: copies of them stay in the cache of
    a CPU. Elsewhere all."""
    if weight_OI.device.type != "cpu" or weight_OI.dim() != 2 or not has_free_rows(format_):
        return [weight_OI]
    chunks: Sequence[torch.Tensor] = weight_OI.split(max(1, _CHUNK_ELEMENTS // weight_OI.shape[1]))
    return chunks


@torch.no_grad()
def rounded_weight(
    format_: Format, quantizer: Any, weight_OI: torch.Tensor, scales: WeightScales, *name: str
) -> torch.Tensor:
    """What a weight's quantizer is given: the weight, or numbers of its grid that were fitted.

    Args:
        format_: The format.
        quantizer: From :func:`quantizer_of`.
        weight_OI: As above.
        scales: Those of the model.
        name: As above.
    """
    if weight_OI.dim() == 3:
        return _rounded_slices(format_, quantizer, weight_OI, scales, *name)
    codes = scales.codes(name, format_)
    if codes is None:
        return weight_OI
    return values_of(codes, grid_of(quantizer, weight_OI)).to(weight_OI.dtype)


def _rounded_slices(
    format_: Format, quantizer: Any, weight_EOI: torch.Tensor, scales: WeightScales, *name: str
) -> torch.Tensor:
    """The same of experts that share a quantizer, each of which has a rounding."""
    codes = {e: scales.codes((*name, str(e)), format_) for e in range(len(weight_EOI))}
    fitted = {expert: values for expert, values in codes.items() if values is not None}
    if not fitted:
        return weight_EOI
    grid, rounded_EOI = grid_of(quantizer, weight_EOI), weight_EOI.clone()
    for expert, values in fitted.items():
        rounded_EOI[expert] = values_of(values, grid.of_slice(expert)).to(weight_EOI.dtype)
    return rounded_EOI


@torch.no_grad()
def quantizer_of(
    format_: Format,
    weight_OI: torch.Tensor,
    scales: WeightScales,
    *name: str,
    recall: Recall | None = None,
) -> TensorQuantizer:
    """The quantizer of :func:`quantized_weight`, calibrated; arguments as there.

    Where the format has factors, the weight is given with them.

    Args:
        recall: In place of that of ``scales``.
    """
    needs_squares = needs_channel_squares(format_)
    dtype = torch.float32 if needs_squares else weight_OI.dtype
    quantizer = make_weight_quantizer(
        format_.weight, weight_OI, largest=scales.largest(name, format_)
    )
    search_scales(
        quantizer,
        partial(scales.searched_rows, name, format_, weight_OI),
        format_.algorithm,
        scales.recall(name, format_, dtype) if recall is None else recall,
        scales.squares(name, weight_OI.device) if needs_squares else None,
    )
    return quantizer


@torch.no_grad()
def fit_weight(
    format_: Format, weight_OI: torch.Tensor, scales: WeightScales, *name: str
) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """The numbers of the multiples that a search takes, one per scale; None without statistics.

    Args:
        format_: By ``weighted``.
        weight_OI: As above.
        scales: Those of the model.
        name: As above.
    """
    results: list[torch.Tensor] = []

    def search_and_keep(search: Callable[[], torch.Tensor]) -> torch.Tensor:
        results.append(search())
        return results[-1]

    for chunk_OI in _row_chunks(format_, weight_OI):
        quantizer_of(format_, chunk_OI, scales, *name, recall=search_and_keep)
    if not results:
        return None
    numbers: np.ndarray[Any, np.dtype[np.uint8]] = (
        results[0] if len(results) == 1 else torch.cat(results)
    ).numpy(force=True)
    return numbers


@torch.no_grad()
def weight_grid(format_: Format, weight_OI: torch.Tensor, scales: WeightScales, *name: str) -> Grid:
    """The grid of a weight, or of experts that share a quantizer; arguments as above."""
    return grid_of(quantizer_of(format_, weight_OI, scales, *name), weight_OI)


@torch.no_grad()
def make_weight_quantizer(
    attributes: Attributes,
    weight_OI: torch.Tensor,
    algorithm: Attributes | None = None,
    recall: Recall | None = None,
    largest: torch.Tensor | None = None,
    squares_I: torch.Tensor | None = None,
) -> TensorQuantizer:
    """Build the calibrated quantizer of one weight matrix; arguments as above."""
    quantizer = make_quantizer(attributes, weight_OI.device)
    if _takes_backend(attributes) and backend_for(attributes, is_weight=True) == WEIGHTS_BACKEND:
        quantizer.backend = WEIGHTS_BACKEND  # on CUDA too
    if needs_static_maximum(quantizer):
        load_maxima(quantizer, weight_OI)
        finish_static_blocks(quantizer, weight_OI, largest)
        if largest is not None and not is_static_nvfp4(attributes):
            set_common_maximum(quantizer, largest)
    search_scales(quantizer, lambda: weight_OI, algorithm, recall, squares_I)
    return quantizer


def make_input_quantizer(
    attributes: Attributes | None, maximum: float | None, like: torch.Tensor
) -> TensorQuantizer | None:
    """Build an input quantizer with its calibrated maximum.

    Args:
        attributes: Input quantizer attributes; None gives None (inputs stay as they are).
        maximum: Largest absolute input seen in calibration; None only where the quantizer
            scales by each token.
        like: Tensor whose dtype and device the quantizer's buffer takes.

    Raises:
        KeyError: The quantizer is static and no maximum is given.
    """
    if attributes is None:
        return None
    quantizer = make_quantizer(attributes, like.device)
    if needs_static_maximum(quantizer):
        if maximum is None:
            raise KeyError("no calibrated maximum for a static input quantizer")
        quantizer.amax = like.new_full((), maximum)  # filled there: no copy waits
    return quantizer
