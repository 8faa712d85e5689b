"""Formats as ModelOpt's checkpoints name them: quantizer attributes -> ``quant_algo``.

ModelOpt derives the name from a few attributes (``get_quantization_format`` and
``process_layer_quant_config`` of ``modelopt/torch/export/quant_utils.py``) and drops the rest: FP8
weights are called ``FP8`` whatever the inputs are, int4 weights ``W4A16_AWQ``. An engine then
computes what the name says. Here a format has a name only where the name says all of it. A format
that scales input channels has none yet: the names do not say where its factors are applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_smoothed

E4M3, E2M1, E8M0 = (4, 3), (2, 1), (8, 0)


@dataclass(frozen=True)
class LayerAlgo:
    """How a quantized layer is described to an engine.

    Attributes:
        algo: ModelOpt's ``quant_algo``.
        group_size: Weights that share a scale; 0 where all of a tensor or a channel do.
    """

    algo: str
    group_size: int = 0


@dataclass(frozen=True)
class Numbers:
    """The attributes of a quantizer that the names go by.

    Attributes:
        block: Numbers per block along the input; 0 without blocks.
        scale: Bits of the blocks' scales; None for 16-bit ones.
        is_dynamic: Scales are made while the model runs.
    """

    bits: Any
    axis: Any
    block: int
    scale: Any
    is_flat: bool
    is_dynamic: bool

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Numbers:
        """Read them."""
        blocks = attributes.get("block_sizes") or {}
        return cls(
            bits=_plain(attributes.get("num_bits")),
            axis=attributes.get("axis"),
            block=blocks.get(-1) or 0,
            scale=_plain(blocks.get("scale_bits")),
            is_flat=-2 not in blocks,
            is_dynamic="dynamic" in (attributes.get("type"), blocks.get("type")),
        )

    @property
    def is_per_tensor(self) -> bool:
        """One static scale for a whole tensor."""
        return self.axis is None and not self.block and not self.is_dynamic


def layer_algo(format_: Format) -> LayerAlgo | None:
    """The name of a format in ModelOpt's checkpoints; None where no name says all of it."""
    if is_smoothed(format_):
        return None
    weight = Numbers.of(format_.weight)
    inputs = None if format_.input is None else Numbers.of(format_.input)
    if weight.bits == E2M1 and weight.block and weight.is_flat:
        return _fp4(weight, inputs)
    if weight.bits == E4M3:
        return _fp8(weight, inputs)
    if weight.bits == 4 and weight.block and weight.is_flat and weight.scale is None:
        return LayerAlgo("W4A16_AWQ", weight.block) if inputs is None else None
    if weight.bits == 8 and weight.axis == 0 and not weight.block:
        if inputs is None:
            return LayerAlgo("W8A16")
        return LayerAlgo("W8A8_SQ_PER_CHANNEL") if _is_static(inputs, 8) else None
    return None


def _fp4(weight: Numbers, inputs: Numbers | None) -> LayerAlgo | None:
    is_nvfp4, is_mxfp4 = weight.scale == E4M3, weight.scale == E8M0
    if inputs is None:
        return LayerAlgo("W4A16_NVFP4", weight.block) if is_nvfp4 else None
    if _is_static(inputs, E4M3) and weight.is_dynamic and (is_nvfp4 or is_mxfp4):
        return LayerAlgo("W4A8_NVFP4_FP8" if is_nvfp4 else "W4A8_MXFP4_FP8", weight.block)
    is_same = (inputs.bits, inputs.block, inputs.scale) == (E2M1, weight.block, weight.scale)
    if is_same and (is_nvfp4 or is_mxfp4):
        return LayerAlgo("NVFP4" if is_nvfp4 else "MXFP4", weight.block)
    return None


def _fp8(weight: Numbers, inputs: Numbers | None) -> LayerAlgo | None:
    if weight.block and weight.scale == E8M0:
        is_same = inputs is not None and (inputs.bits, inputs.block, inputs.scale) == (
            (E4M3, weight.block, E8M0)
        )
        return LayerAlgo("MXFP8", weight.block) if is_same and weight.is_dynamic else None
    if weight.block:
        is_square = not weight.is_flat and weight.scale is None
        return LayerAlgo("FP8_PB_WO", weight.block) if is_square and inputs is None else None
    if inputs is None or inputs.bits != E4M3 or inputs.block:
        return None
    if weight.axis == 0:
        return LayerAlgo("FP8_PER_CHANNEL_PER_TOKEN") if inputs.is_dynamic else None
    return LayerAlgo("FP8") if inputs.is_per_tensor else None


def _is_static(inputs: Numbers, bits: Any) -> bool:
    return bool(inputs.bits == bits) and inputs.is_per_tensor


def _plain(bits: Any) -> Any:
    """Exponent and mantissa bits as a tuple, whether they were a list, a tuple or a text."""
    if isinstance(bits, str):
        return {"e4m3": E4M3, "e2m1": E2M1, "e8m0": E8M0}.get(bits.lower(), bits)
    return tuple(bits) if isinstance(bits, list | tuple) else bits
