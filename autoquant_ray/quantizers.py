"""Fake quantization of weights and inputs through ModelOpt's own quantizer modules.

Nothing here rounds a number by itself: a :class:`Format`'s attributes configure ModelOpt's
``TensorQuantizer``, calibrated by maximum as ``mtq.calibrate(algorithm="max")`` does it. Where
that needs a CUDA kernel and the values are on CPU, :mod:`autoquant_ray.block_formats` steps in
through ModelOpt's hook for such a case.
"""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from autoquant_ray.block_formats import BACKEND
from autoquant_ray.formats import Attributes
from autoquant_ray.number_formats import is_scaled_by_block


def make_quantizer(attributes: Attributes, device: torch.device) -> TensorQuantizer:
    """Build an enabled, uncalibrated quantizer for values on a device."""
    quantizer = TensorQuantizer()
    quantizer.set_from_attribute_config(QuantizerAttributeConfig(**attributes, enable=True))
    if device.type == "cpu" and is_scaled_by_block(attributes):
        quantizer.backend = BACKEND
    return quantizer


def disabled_quantizer() -> TensorQuantizer:
    """Build a quantizer that passes its input through."""
    quantizer = TensorQuantizer()
    quantizer.disable()
    return quantizer


@torch.no_grad()
def fake_quantize_weight(attributes: Attributes, weight_OI: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize one weight tensor, calibrated by its own maximum.

    Args:
        attributes: Weight quantizer attributes.
        weight_OI: ``(out, in)``, or ``(experts, out, in)`` for experts that share a quantizer; any
            float dtype and device.

    Returns:
        Tensor like ``weight_OI``.
    """
    quantized: torch.Tensor = make_weight_quantizer(attributes, weight_OI)(weight_OI)
    return quantized


@torch.no_grad()
def make_weight_quantizer(attributes: Attributes, weight_OI: torch.Tensor) -> TensorQuantizer:
    """Build the quantizer of one weight matrix, calibrated by its own maximum."""
    quantizer = make_quantizer(attributes, weight_OI.device)
    if needs_static_maximum(quantizer):
        quantizer.disable_quant()
        quantizer.enable_calib()
        quantizer(weight_OI)
        quantizer.load_calib_amax()
        quantizer.enable_quant()
        quantizer.disable_calib()
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
        quantizer.amax = torch.tensor(maximum, dtype=like.dtype, device=like.device)
    return quantizer


def needs_static_maximum(quantizer: Any) -> bool:
    """Whether ModelOpt calibrates this quantizer's maximum ahead of use."""
    is_constant = quantizer._use_constant_amax or quantizer._constant_amax is not None
    return not (is_constant or quantizer._dynamic or quantizer.is_mx_format)
