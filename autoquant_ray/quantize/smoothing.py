"""A linear under a format that scales its input channels: SmoothQuant and AWQ as ModelOpt has them.

With the scales ``p`` (ModelOpt's ``pre_quant_scale``) the input ``x * p`` is quantized, and the
weight ``W / p``; without quantization the product would be the same. In 16 bits, ``p`` is rounded
to the weight's dtype where it multiplies inputs and is float32 where it divides weights, as
``mtq.quantize`` does it (``apply_pre_quant_scale_and_smooth`` in ModelOpt 0.47).

Shape letters: C rows, I in features, O out features.
"""

from __future__ import annotations

from typing import Any

import torch

from autoquant_ray.formats.algorithms import SMOOTHQUANT
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_smoothed, method_of
from autoquant_ray.quantize.awq import channel_scales, weight_importance
from autoquant_ray.quantize.calibration import ModuleCalibration

_SMALLEST, _LARGEST = 1e-4, 1e4
_EPSILON = 2.0**-31


def input_scales(
    format_: Format, weight_OI: torch.Tensor, calibration: ModuleCalibration
) -> torch.Tensor | None:
    """Factors of the input channels of a linear, float32 ``(I,)``; None where a format has none.

    They are 1 for a linear that no token reached in calibration.

    Args:
        format_: The format.
        weight_OI: The linear's weight, in the model's dtype.
        calibration: Of the linear.
    """
    if not is_smoothed(format_):
        return None
    channels = calibration.channels
    alpha = calibration.alphas.get(format_.name)
    if channels is not None and method_of(format_) == SMOOTHQUANT:
        return _smoothquant_scales(format_, weight_OI, torch.from_numpy(channels.largest_I))
    if channels is None or alpha is None:
        return torch.ones(weight_OI.shape[1], device=weight_OI.device)
    mean_I = torch.from_numpy(channels.mean_I).to(weight_OI.device)
    importance_I = weight_importance(weight_OI, format_.weight)
    return 1.0 / channel_scales(mean_I, importance_I, alpha)


def _smoothquant_scales(
    format_: Format, weight_OI: torch.Tensor, largest_I: torch.Tensor
) -> torch.Tensor:
    """``max|W|^(1 - alpha) / max|x|^alpha`` of each channel (``smoothquant`` in ModelOpt 0.47)."""
    alpha = (format_.algorithm or {}).get("alpha", 1.0)
    largest_I = largest_I.to(weight_OI.device)
    by_weight_I = weight_OI.abs().amax(dim=0).pow(1 - alpha)
    scale_I = by_weight_I / largest_I.pow(alpha)
    if scale_I.min() <= _EPSILON:
        scale_I[largest_I <= _EPSILON] = 1.0
    return scale_I.clamp(min=_SMALLEST, max=_LARGEST)


def smoothed_weight(weight_OI: torch.Tensor, scale_I: torch.Tensor | None) -> torch.Tensor:
    """``W / p`` in the weight's dtype; the weight itself without scales."""
    if scale_I is None:
        return weight_OI
    return (weight_OI * (1.0 / scale_I)).to(weight_OI.dtype)


def smoothed_input(states: torch.Tensor, scale_I: torch.Tensor | None) -> torch.Tensor:
    """``x * p`` in the input's dtype; the input itself without scales."""
    return states if scale_I is None else states * scale_I.to(states.dtype)


def input_maximum(
    calibration: ModuleCalibration, scale_I: torch.Tensor | None, dtype: torch.dtype
) -> float | None:
    """Largest absolute value of ``x * p`` in calibration; None where nothing was collected.

    Args:
        calibration: Of the linear.
        scale_I: Its factors; None without.
        dtype: Of the weight, to which ModelOpt rounds the result.
    """
    channels = calibration.channels
    if scale_I is None or channels is None or channels.largest_I is None:
        return calibration.maxima.get("input_amax")
    largest_I = torch.from_numpy(channels.largest_I).to(scale_I.device, dtype)
    return float((largest_I * scale_I).amax().to(dtype))


def quantized_input(
    states_CI: torch.Tensor,
    quantizer: Any,
    scale_I: torch.Tensor,
    *,
    as_error: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``Xq`` of ``x * p``, or ``Xq - x * p``, formed in float32.

    Args:
        states_CI: Input of the linear.
        quantizer: Of the input, calibrated with :func:`input_maximum`; None: only round ``x * p``.
        scale_I: Factors of the input channels.
        as_error: Give the error.
        dtype: Of the result.
    """
    smoothed_CI = smoothed_input(states_CI, scale_I).float()
    quantized_CI = smoothed_CI if quantizer is None else quantizer(smoothed_CI)
    if as_error:
        exact_CI = states_CI.float() * scale_I.to(states_CI.dtype).float()
        quantized_CI = quantized_CI - exact_CI
    result: torch.Tensor = quantized_CI.to(dtype)
    return result
