"""NVFP4 and the MX formats in plain torch, where ModelOpt's CUDA kernels cannot run.

ModelOpt's kernels are the reference (version 0.47, ``kernels/quantization/gemm``): the same
scales, the same rounding, the same treatment of tiny blocks. :data:`BACKEND` is registered with
ModelOpt under its own hook when this module is imported. A quantizer that names it computes here
on CPU, and by ModelOpt's kernels on CUDA.

NVFP4 weights are quantized as ModelOpt packs them (``NVFP4QTensor``), because that is what an
engine reads. The kernels turn a block to zeros where its scale is below 1e-5 or, as an e4m3 number,
would be 0; packed, such a block has its scale, or the smallest one, 2^-9. All other blocks are the
same in both. :data:`WEIGHTS_BACKEND` names this, on CUDA too.

Shape letters: N blocks, B values of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from autoquant_ray.formats.numbers import (
    E2M1,
    E4M3,
    E4M3_SCALE,
    Blocks,
    Number,
    blocks_of,
    is_scaled_by_block,
    is_static_nvfp4,
)
from autoquant_ray.modelopt_api import (
    StaticBlockQuantizer,
    fake_quantize,
    fp8_max_for_normalization,
    is_registered_quant_backend,
    largest_of,
    register_quant_backend,
    scaled_e4m3_impl,
)

BACKEND = "autoquant_ray_blocks"
"""Value of a quantizer's ``backend`` attribute."""
WEIGHTS_BACKEND = "autoquant_ray_weight_blocks"
"""The same for NVFP4 weights."""

_EXPONENT_BITS = 0x7F800000
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_SMALLEST_KERNEL_SCALE = 1e-5
_SMALLEST_E4M3 = 2.0 ** (E4M3.smallest_exponent - E4M3.mantissa_bits)


def for_cpu(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ModelOpt quantization config that also runs on CPU; the given one stays as it is.

    Args:
        config: What ``mtq.quantize`` takes, such as ``mtq.NVFP4_DEFAULT_CFG``.

    Returns:
        A copy whose NVFP4 and MX quantizers name :data:`BACKEND`. Static NVFP4 weights do not:
        ModelOpt asks no backend for them.
    """

    def named(attributes: Any, *, is_weight: bool) -> Any:
        if isinstance(attributes, list):
            return [named(entry, is_weight=is_weight) for entry in attributes]
        if not attributes or is_static_nvfp4(attributes) or not is_scaled_by_block(attributes):
            return attributes
        return attributes | {"backend": backend_for(attributes, is_weight=is_weight)}

    entries = []
    for entry in config["quant_cfg"]:
        is_weight = "weight_quantizer" in entry["quantizer_name"]
        changes = {"cfg": named(entry["cfg"], is_weight=is_weight)} if "cfg" in entry else {}
        entries.append(entry | changes)
    return {**config, "quant_cfg": entries}


def backend_for(attributes: Mapping[str, Any], *, is_weight: bool) -> str:
    """What a quantizer of blocks that are scaled by their values names as its backend.

    Args:
        attributes: Its own.
        is_weight: Whether it is a weight's.
    """
    has_second_scale = (attributes.get("block_sizes") or {}).get("scale_bits") == E4M3_SCALE
    return WEIGHTS_BACKEND if is_weight and has_second_scale else BACKEND


@torch.no_grad()
def quantize_blocks(
    values: torch.Tensor,
    blocks: Blocks,
    maximum: torch.Tensor | None = None,
    *,
    as_packed: bool = False,
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
        as_packed: Small scales of NVFP4 are those of ModelOpt's packed tensors, not its kernels'.

    Returns:
        Tensor like ``values``.
    """
    values_NB = _in_blocks(values, blocks.size)
    maxima_N1 = values_NB.abs().amax(dim=1, keepdim=True)
    if blocks.has_second_scale:
        assert maximum is not None
        scales_N1 = _two_level_scales(maxima_N1, maximum, as_packed=as_packed)
        rounded_NB = round_to(values_NB / scales_N1, blocks.number)
    else:
        exponents_N1 = _scale_exponents(maxima_N1, blocks.number)
        scales_N1 = _power_of_two(exponents_N1).masked_fill_(maxima_N1.isnan(), float("nan"))
        rounded_NB = round_to(values_NB * _power_of_two(-exponents_N1), blocks.number)
    return _in_rows(rounded_NB.mul_(scales_N1), values.shape).to(values.dtype)


@torch.no_grad()
def quantize_static_blocks(
    values_NB: torch.Tensor, maxima_N1: torch.Tensor, largest: torch.Tensor, scale_at_largest: float
) -> torch.Tensor:
    """Quantize and dequantize NVFP4 blocks whose maxima are given.

    As ModelOpt's ``compute_fp4_scales`` and ``static_blockwise_fp4_fake_quant_kernel``: scales are
    ``e4m3(m / 6 s) s`` with ``s = largest / (6 * scale_at_largest)``; one that rounds to 0 there is
    that of the packed tensor.

    Args:
        values_NB: Blocks, any float dtype.
        maxima_N1: What each block counts as its maximum; float32.
        largest: That of the tensor, or of all that share its second scale; float32.
        scale_at_largest: e4m3 scale of a block with that maximum: 448, or 256 where the choice
            between the maxima ``m`` and ``1.5 m`` needs room above ("four over six").
    """
    scales_N1, _ = _static_scales(maxima_N1, largest, scale_at_largest)
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


def _in_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Rows filled up with zeros and cut into blocks ``(N, size)``, float32."""
    padding = -values.shape[-1] % size
    return torch.nn.functional.pad(values.float(), (0, padding)).reshape(-1, size)


def _in_rows(values_NB: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The rows that blocks were cut from."""
    return values_NB.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _two_level_scales(
    maxima_N1: torch.Tensor, maximum: torch.Tensor, *, as_packed: bool
) -> torch.Tensor:
    """NVFP4's scales: ``e4m3(m / 6 s) s`` with ``s = maximum / (6 * 448)``.

    As in ModelOpt's ``fp4_fake_quant_kernel``, where a scale below 1e-5 counts as 1, so the values
    of such a block become 0; or as in its ``NVFP4QTensor``, where no e4m3 number is below the
    smallest.
    """
    second = maximum.float().amax() / (E2M1.largest * E4M3.largest)
    second = torch.where(second <= 0, 1e-12, second)
    wanted_N1 = maxima_N1 / (E2M1.largest * second)
    if not as_packed:
        scales_N1 = round_to(wanted_N1, E4M3).mul_(second)
        return scales_N1.masked_fill_(scales_N1 < _SMALLEST_KERNEL_SCALE, 1.0)
    scales_N1 = round_to(wanted_N1.clamp_(min=_SMALLEST_E4M3), E4M3).mul_(second)
    return scales_N1.masked_fill_(scales_N1 == 0, 1.0)  # no float32 number is so small


def _static_scales(
    maxima_N1: torch.Tensor, largest: torch.Tensor, scale_at_largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4's scales from given maxima, float32, and which of them are 0 in ModelOpt's kernel."""
    maxima_N1 = maxima_N1.float()
    second = largest.float() * (E4M3.largest / scale_at_largest) / E2M1.largest
    scales_N1 = scaled_e4m3_impl(maxima_N1 / E2M1.largest, second)
    is_lost_N1 = (scales_N1 == 0) & (maxima_N1 > 0)
    if not is_lost_N1.any():
        return scales_N1, is_lost_N1
    unit = second / E4M3.largest
    wanted_N1 = (maxima_N1 / E2M1.largest / unit).clamp_(min=_SMALLEST_E4M3)
    return torch.where(is_lost_N1, round_to(wanted_N1, E4M3) * unit, scales_N1), is_lost_N1


@torch.no_grad()
def packed_static_scales(quantizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of a static NVFP4 weight as they are stored: those that its quantizer computes.

    ModelOpt's own packing divides in another order, which rounds some ties of e4m3 otherwise.

    Args:
        quantizer: From :meth:`StaticBlocks.from_tensor_quantizer`, calibrated.

    Returns:
        Of the blocks ``(N, 1)``, e4m3 numbers in float32, and of the whole weight, float32.
    """
    top = fp8_max_for_normalization(quantizer)
    largest = quantizer.global_amax.float()
    scales_N1, _ = _static_scales(quantizer.amax.reshape(-1, 1), largest, top)
    second = largest / (E2M1.largest * top)
    return round_to(scales_N1 / second, E4M3), second


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


class StraightThrough(torch.autograd.Function):
    """A quantized forward; backward as if nothing happened, like ModelOpt's default."""

    @staticmethod
    def forward(
        context: Any, values: torch.Tensor, quantize: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return quantize(values)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class StaticBlocks(StaticBlockQuantizer):
    """ModelOpt's quantizer of static NVFP4 weights, which asks no backend: on CPU too, and with the
    small scales of the packed tensor.

    Made of another quantizer by ``from_tensor_quantizer``, before or after its calibration.
    """

    def quantized(self, inputs: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize blocks ``(N, B)``."""
        maxima_N1 = self.amax.reshape(-1, 1)
        largest = self.amax.amax() if self.global_amax is None else self.global_amax
        top = fp8_max_for_normalization(self)
        quantize = partial(
            quantize_static_blocks, maxima_N1=maxima_N1, largest=largest, scale_at_largest=top
        )
        if not inputs.is_cuda:
            values: torch.Tensor = StraightThrough.apply(inputs, quantize)
            return values
        on_cuda = super().quantized(inputs)
        _, is_lost_N1 = _static_scales(maxima_N1, largest, top)
        if not is_lost_N1.any():
            return on_cuda
        values_NB = inputs.reshape(len(maxima_N1), -1)
        is_lost_NB = is_lost_N1.expand_as(values_NB)
        return torch.where(
            is_lost_NB.reshape(inputs.shape), quantize(values_NB).reshape(inputs.shape), on_cuda
        )


def _entry_point(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """What ModelOpt calls for a quantizer that names :data:`BACKEND`."""
    return _by_modelopt(inputs, quantizer) if inputs.is_cuda else _here(inputs, quantizer)


def _weights_entry_point(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """What ModelOpt calls for a quantizer that names :data:`WEIGHTS_BACKEND`."""
    if not inputs.is_cuda:
        return _here(inputs, quantizer, as_packed=True)
    on_cuda = _by_modelopt(inputs, quantizer)
    blocks, maximum = _blocks_of(quantizer), largest_of(quantizer, inputs)
    values_NB = _in_blocks(inputs, blocks.size)
    maxima_N1 = values_NB.abs().amax(dim=1, keepdim=True)
    of_kernel_N1, packed_N1 = (
        _two_level_scales(maxima_N1, maximum, as_packed=packed) for packed in (False, True)
    )
    is_lost_N1 = (of_kernel_N1 != packed_N1) & (maxima_N1 > 0)
    if not is_lost_N1.any():
        return on_cuda
    is_lost = _in_rows(is_lost_N1.expand_as(values_NB), inputs.shape)
    return torch.where(is_lost, quantize_blocks(inputs, blocks, maximum, as_packed=True), on_cuda)


def _by_modelopt(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    backend, quantizer.backend = quantizer.backend, None
    try:
        return fake_quantize(quantizer, inputs)
    finally:
        quantizer.backend = backend


def _here(inputs: torch.Tensor, quantizer: Any, *, as_packed: bool = False) -> torch.Tensor:
    blocks = _blocks_of(quantizer)
    maximum = largest_of(quantizer, inputs) if blocks.has_second_scale else None
    quantize = partial(quantize_blocks, blocks=blocks, maximum=maximum, as_packed=as_packed)
    quantized: torch.Tensor = StraightThrough.apply(inputs, quantize)
    return quantized


def _blocks_of(quantizer: Any) -> Blocks:
    attributes = {"num_bits": quantizer.num_bits, "block_sizes": quantizer.block_sizes}
    return blocks_of(attributes)


for _name, _function in ((BACKEND, _entry_point), (WEIGHTS_BACKEND, _weights_entry_point)):
    if not is_registered_quant_backend(_name):
        register_quant_backend(_name, _function)
