"""Weight quantizers of tests, and formats made of one with a method of rounding."""

from __future__ import annotations

from typing import Any

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats

INT4 = {"num_bits": 4, "block_sizes": {-1: 16, "type": "static"}}
INT8 = {"num_bits": 8, "axis": 0}
FP8 = {"num_bits": (4, 3), "axis": None}


def searched(weight: Any, algorithm: Any = "mse", input_: Any = None) -> Format:
    """A custom format named ``mine``."""
    entry = {"weight": weight, "input": input_, "algorithm": algorithm}
    return resolve_formats(("mine",), device="cpu", custom={"mine": entry})[0]
