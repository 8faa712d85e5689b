"""Weights quantized and dequantized by ggml's own library, as ``llama-quantize`` calls it.

The library of the package ``libggml-python`` is called through ``ctypes``. Every row is quantized
by itself, without an importance matrix, from its float32 values: neither the number of threads nor
the part of a weight that is at hand changes a bit. The dequantized values are rounded to the
model's own type. :data:`~autoquant_ray.formats.gguf_types.GGML_BACKEND` is registered with ModelOpt
under its hook for such functions when this module is imported.

Shape letters: R rows, I in features.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from autoquant_ray.errors import FormatError
from autoquant_ray.formats.gguf_types import (
    DISTRIBUTION,
    GGML_BACKEND,
    GGUF_TYPES,
    fitting_type,
    library_file,
)
from autoquant_ray.modelopt_api import is_registered_quant_backend, register_quant_backend
from autoquant_ray.quantize.backends.block_formats import StraightThrough

_PART_WEIGHTS = 2**20
"""Weights that a thread has in float32 at a time."""


@torch.no_grad()
def quantize_by_ggml(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Quantize and dequantize a weight, row by row.

    A row with a NaN or an infinity becomes NaN: the library's search may not end well with one.

    Args:
        weight: ``(..., in)``, any float dtype and device.
        name: A type of :data:`GGUF_TYPES`; where rows are no whole number of its blocks, the one
            that llama.cpp takes in its place is used.

    Returns:
        Tensor like ``weight``.

    Raises:
        FormatError: Rows fit no type, or the library is not installed, or is another than this
            package knows.
    """
    columns = weight.shape[-1]
    fitting = fitting_type(name, columns)
    if fitting is None:
        raise FormatError(
            f"rows of {columns} weights are no whole number of blocks of {name}; keep the layer in "
            "16 bits"
        )
    rows_RI = weight.reshape(-1, columns)
    quantized_RI = torch.empty_like(rows_RI)
    size = max(1, _PART_WEIGHTS // columns)
    round_rows = partial(_round_rows, _library(), fitting, rows_RI, quantized_RI)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = range(0, len(rows_RI), size)
        list(pool.map(round_rows, parts, (start + size for start in parts)))
    return quantized_RI.reshape(weight.shape)


def _round_rows(
    library: ctypes.CDLL,
    name: str,
    rows_RI: torch.Tensor,
    quantized_RI: torch.Tensor,
    start: int,
    stop: int,
) -> None:
    """Quantize and dequantize some rows of a weight into the same rows of another."""
    type_ = GGUF_TYPES[name]
    values_RI = rows_RI[start:stop].detach().to("cpu", torch.float32, copy=True)
    is_lost_R1 = ~values_RI.isfinite().all(dim=1, keepdim=True)
    values_RI.masked_fill_(is_lost_R1, 0.0)
    num_rows, columns = values_RI.shape
    stored = np.empty(num_rows * columns // type_.block * type_.num_bytes, np.uint8)
    place = values_RI.data_ptr()
    library.ggml_quantize_chunk(type_.number, place, stored.ctypes.data, 0, num_rows, columns, None)
    _dequantize(library, name)(stored.ctypes.data, place, num_rows * columns)
    quantized_RI[start:stop] = values_RI.masked_fill_(is_lost_R1, float("nan"))


@cache
def _library() -> ctypes.CDLL:
    """The library, with the types that this package knows.

    Raises:
        FormatError: It is not installed, or has other types.
    """
    file = library_file()
    if file is None:
        raise FormatError(f"ggml's library is not installed here; pip install {DISTRIBUTION}")
    library = ctypes.CDLL(str(file))
    address, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, address, address),
        *(count, count, count, address),
    ]
    library.ggml_blck_size.restype, library.ggml_type_size.restype = count, ctypes.c_size_t
    for name, type_ in GGUF_TYPES.items():
        sizes = library.ggml_blck_size(type_.number), library.ggml_type_size(type_.number)
        if sizes != (type_.block, type_.num_bytes):
            raise FormatError(
                f"{file}: type {type_.number} has blocks of {sizes[0]} weights in {sizes[1]} "
                f"bytes, {name} would have {type_.block} in {type_.num_bytes}; install the "
                f"version of {DISTRIBUTION} that constraints.txt names"
            )
    return library


def _dequantize(library: ctypes.CDLL, name: str) -> Any:
    """The library's function for rows of a type, such as ``dequantize_row_q4_K``."""
    function = library[f"dequantize_row_{name.replace('_k', '_K')}"]
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function


def _entry_point(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """What ModelOpt calls for a quantizer that names the backend."""
    name = str(quantizer.backend_extra_args["type"])
    quantized: torch.Tensor = StraightThrough.apply(inputs, partial(quantize_by_ggml, name=name))
    return quantized


if not is_registered_quant_backend(GGML_BACKEND):
    register_quant_backend(GGML_BACKEND, _entry_point)
