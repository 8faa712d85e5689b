"""NVFP4 and the MX formats in plain torch, where ModelOpt's CUDA kernels cannot run.

ModelOpt's kernels are the reference (version 0.47, ``kernels/quantization/gemm``): the same
scales, the same rounding, the same treatment of tiny blocks. :data:`BACKEND` is registered with
ModelOpt under its own hook when this module is imported. A quantizer that names it computes here
on CPU, and by ModelOpt's kernels on CUDA.

Shape letters: N blocks, B values of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    StaticBlockScaleQuantizer,
    is_registered_quant_backend,
    register_quant_backend,
)
from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl
from modelopt.torch.quantization.utils.numeric_utils import fp8_max_for_normalization

from autoquant_ray.formats.numbers import (
    E2M1,
    E4M3,
    Blocks,
    Number,
    blocks_of,
    is_scaled_by_block,
    is_static_nvfp4,
)

BACKEND = "autoquant_ray_blocks"
"""Value of a quantizer's ``backend`` attribute."""

_EXPONENT_BITS = 0x7F800000
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_SMALLEST_NVFP4_SCALE = 1e-5


def for_cpu(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ModelOpt quantization config that also runs on CPU; the given one stays as it is.

    Args:
        config: What ``mtq.quantize`` takes, such as ``mtq.NVFP4_DEFAULT_CFG``.

    Returns:
        A copy whose NVFP4 and MX quantizers name :data:`BACKEND`. Static NVFP4 weights do not:
        ModelOpt asks no backend for them.
    """

    def named(attributes: Any) -> Any:
        if isinstance(attributes, list):
            return [named(entry) for entry in attributes]
        if not attributes or is_static_nvfp4(attributes):
            return attributes
        runs_by_kernel = is_scaled_by_block(attributes)
        return attributes | {"backend": BACKEND} if runs_by_kernel else attributes

    entries = [
        entry | ({"cfg": named(entry["cfg"])} if "cfg" in entry else {})
        for entry in config["quant_cfg"]
    ]
    return {**config, "quant_cfg": entries}


@torch.no_grad()
def quantize_blocks(
    values: torch.Tensor, blocks: Blocks, maximum: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize and dequantize blocks of the last axis, each by its own maximum.

    A row whose length is no multiple of the block ends with a shorter block, as in ModelOpt's
    kernels, which fill it up with zeros. Sums and products are formed in float32. A NaN makes
    its block NaN (ModelOpt's kernels turn it into a number); an infinity saturates where the
    scale allows.

    Args:
        values: ``(..., columns)``, any float dtype.
        blocks: Number format, size and scales.
        maximum: Largest absolute value of the whole tensor, or what calibration found for it;
            needed, and only used, where there is a second scale.

    Returns:
        Tensor like ``values``.
    """
    columns = values.shape[-1]
    padding = -columns % blocks.size
    padded = torch.nn.functional.pad(values.float(), (0, padding))
    values_NB = padded.reshape(-1, blocks.size)
    maxima_N1 = values_NB.abs().amax(dim=1, keepdim=True)
    if blocks.has_second_scale:
        assert maximum is not None
        scales_N1 = _two_level_scales(maxima_N1, maximum.float().amax())
        rounded_NB = round_to(values_NB / scales_N1, blocks.number)
    else:
        exponents_N1 = _scale_exponents(maxima_N1, blocks.number)
        scales_N1 = _power_of_two(exponents_N1).masked_fill_(maxima_N1.isnan(), float("nan"))
        rounded_NB = round_to(values_NB * _power_of_two(-exponents_N1), blocks.number)
    quantized = rounded_NB.mul_(scales_N1).view(padded.shape)
    return quantized[..., :columns].to(values.dtype)


@torch.no_grad()
def quantize_static_blocks(
    values_NB: torch.Tensor, maxima_N1: torch.Tensor, largest: torch.Tensor, scale_at_largest: float
) -> torch.Tensor:
    """Quantize and dequantize NVFP4 blocks whose maxima are given.

    As ModelOpt's ``compute_fp4_scales`` and ``static_blockwise_fp4_fake_quant_kernel``: scales are
    ``e4m3(m / 6 s) s`` with ``s = largest / (6 * scale_at_largest)``; one that rounds to 0 makes
    zeros.

    Args:
        values_NB: Blocks, any float dtype.
        maxima_N1: What each block counts as its maximum; float32.
        largest: That of the tensor, or of all that share its second scale; float32.
        scale_at_largest: e4m3 scale of a block with that maximum: 448, or 256 where the choice
            between the maxima ``m`` and ``1.5 m`` needs room above ("four over six").
    """
    second = largest.float() * (E4M3.largest / scale_at_largest) / E2M1.largest
    scales_N1 = scaled_e4m3_impl(maxima_N1.float() / E2M1.largest, second)
    safe_N1 = torch.where((scales_N1 == 0) | ~scales_N1.isfinite(), 1.0, scales_N1)
    quantized_NB = round_to(values_NB.float() / safe_N1, E2M1).mul_(safe_N1)
    return quantized_NB.masked_fill_(scales_N1 == 0, 0.0).to(values_NB.dtype)


def round_to(values: torch.Tensor, number: Number) -> torch.Tensor:
    """Round to the nearest value of a number format, ties to even, saturating; NaN stays NaN.

    Args:
        values: float32.
        number: The format.
    """
    rounded = values.clamp(-number.largest, number.largest)
    # The exponent bits alone are the power of two at or below the value, or 0.
    steps = (rounded.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    steps.clamp_(min=2.0**number.smallest_exponent).mul_(2.0**-number.mantissa_bits)
    return rounded.div_(steps).round_().mul_(steps)


def _two_level_scales(maxima_N1: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """NVFP4's scales: ``e4m3(m / 6 s) s`` with ``s = maximum / (6 * 448)``.

    As in ModelOpt's ``fp4_fake_quant_kernel``, a scale below 1e-5 counts as 1, so the values of
    such a block become 0.
    """
    second = maximum / (E2M1.largest * E4M3.largest)
    second = torch.where(second <= 0, 1e-12, second)
    scales_N1 = round_to(maxima_N1 / (E2M1.largest * second), E4M3).mul_(second)
    return scales_N1.masked_fill_(scales_N1 < _SMALLEST_NVFP4_SCALE, 1.0)


def _scale_exponents(maxima_N1: torch.Tensor, number: Number) -> torch.Tensor:
    """``ceil(log2(m / largest))`` within -127 and 127, which is also the range of e8m0.

    As ModelOpt's ``compute_scale_e8m0_NV``: rounded up, so no element saturates. (The OCP
    specification rounds down.)
    """
    ratios_N1 = maxima_N1.nan_to_num(nan=0.0, posinf=_LARGEST_FLOAT32) / number.largest
    fractions_N1, exponents_N1 = torch.frexp(ratios_N1)
    is_power_N1 = fractions_N1 == 0.5
    exponents_N1 = (exponents_N1 - is_power_N1.int()).clamp_(-127, 127)
    return exponents_N1.masked_fill_(ratios_N1 == 0, -127)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """float32 ``2 ** exponents`` for int32 exponents from -127 (a subnormal number) to 127."""
    bits = torch.where(exponents > -127, (exponents + 127) << 23, 1 << 22)
    return bits.to(torch.int32).view(torch.float32)


class _StraightThrough(torch.autograd.Function):
    """A quantized forward; backward as if nothing happened, like ModelOpt's default."""

    @staticmethod
    def forward(
        context: Any, values: torch.Tensor, quantize: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return quantize(values)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class StaticBlocksOnCpu(StaticBlockScaleQuantizer):
    """ModelOpt's quantizer of static NVFP4 weights, which asks no backend, also on CPU.

    Made of another quantizer by ``from_tensor_quantizer``, before or after its calibration.
    """

    def _fake_quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.is_cuda:
            on_cuda: torch.Tensor = super()._fake_quantize(inputs)
            return on_cuda
        largest = self.amax.amax() if self.global_amax is None else self.global_amax
        quantize = partial(
            quantize_static_blocks,
            maxima_N1=self.amax.reshape(-1, 1),
            largest=largest,
            scale_at_largest=fp8_max_for_normalization(self),
        )
        quantized: torch.Tensor = _StraightThrough.apply(inputs, quantize)
        return quantized


def _entry_point(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """What ModelOpt calls for a quantizer that names :data:`BACKEND`."""
    if inputs.is_cuda:
        quantizer.backend = None
        try:
            on_cuda: torch.Tensor = quantizer._fake_quantize(inputs)
        finally:
            quantizer.backend = BACKEND
        return on_cuda
    attributes = {"num_bits": quantizer.num_bits, "block_sizes": quantizer.block_sizes}
    blocks = blocks_of(attributes)
    maximum = quantizer._get_amax(inputs) if blocks.has_second_scale else None
    quantize = partial(quantize_blocks, blocks=blocks, maximum=maximum)
    quantized: torch.Tensor = _StraightThrough.apply(inputs, quantize)
    return quantized


if not is_registered_quant_backend(BACKEND):
    register_quant_backend(BACKEND, _entry_point)
