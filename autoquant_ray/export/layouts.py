"""Which formats a checkpoint can hold, and under which name.

A format is known by both of its quantizers; what no name says all of is refused, because an engine
would compute something else than what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.serving.compressed_formats import (
    SIXTEEN_BITS,
    block_size,
    compressed_scheme,
    experts_problem,
    fitting_format,
    grids,
    shape_problem,
)
from autoquant_ray.serving.layer_formats import layer_algo
from autoquant_ray.serving.table import COMPRESSED_TENSORS, LAYOUTS, MODELOPT

__all__ = [
    "COMPRESSED_TENSORS",
    "LAYOUTS",
    "MODELOPT",
    "SIXTEEN_BITS",
    "block_size",
    "experts_problem",
    "fitting_format",
    "grids",
    "shape_problem",
]

NO_ZERO = 2.0**-40
"""Stands for the largest value of a tensor that is all zeros: a scale of 0 would make NaN of it,
and a larger one could spoil what engines take for several layers, the largest of their scales."""

_PACKED_BY_MODELOPT = frozenset(
    {
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "W8A16",
        "W8A8_SQ_PER_CHANNEL",
        "W4A16_AWQ",
        "NVFP4",
        "W4A16_NVFP4",
        "MXFP8",
    }
)
"""Algorithms whose tensors, as ModelOpt 0.47 packs them, hold all of a format
(``modelopt/torch/export/quant_utils.py``)."""
COMPRESSED_AS: Mapping[str, str] = {
    "W4A16": "pack-quantized",
    "W8A16": "pack-quantized",
    "W4A8_FP8": "pack-quantized",
    "W4A8_INT8": "pack-quantized",
    "W8A8_INT8": "int-quantized",
    "W8A8_INT8_PER_TOKEN": "int-quantized",
    "W8A8_FP8": "float-quantized",
    "W8A8_FP8_PER_CHANNEL_PER_TOKEN": "float-quantized",
    "W8A16_FP8": "naive-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "W4A16_NVFP4": "nvfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
    "MXFP4": "mxfp4-pack-quantized",
}
"""Scheme -> format of a group in compressed-tensors 0.20 (``compressors/format.py``)."""


def stored_as(format_: Format, layout: str) -> str | None:
    """What a layer of this format is called in a checkpoint; None where it cannot be held.

    Args:
        format_: The format.
        layout: ``modelopt`` (a name of ModelOpt's algorithms) or ``compressed-tensors`` (one of
            its formats).
    """
    if is_smoothed(format_):
        return None
    if layout == COMPRESSED_TENSORS:
        scheme = compressed_scheme(format_)
        return None if scheme is None else COMPRESSED_AS[scheme.algo]
    algo = layer_algo(format_)
    return algo.algo if algo is not None and algo.algo in _PACKED_BY_MODELOPT else None
