"""Integers of 3 to 6 bits in blocks: rounded as by hand, stored in as many bits as they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoquant_ray.export.tool_formats import counterpart
from autoquant_ray.formats.menu import BLOCK_INTEGERS, resolve_formats
from autoquant_ray.formats.stored_size import format_bits
from autoquant_ray.quantize.quantizers import fake_quantize_weight
from autoquant_ray.serving.layer_formats import layer_algo

COUNTERPARTS = {3: "q3_k", 4: "q4_0", 5: "q5_0", 6: "q6_k"}


def name_of(bits: int, block: int) -> str:
    return f"wint{bits}_afp16" if block == 128 else f"wint{bits}_g{block}_afp16"


@pytest.mark.parametrize("block", [128, 64, 32])
@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_values_are_those_of_a_grid_by_hand(bits: int, block: int) -> None:
    (format_,) = resolve_formats((name_of(bits, block),), device="cpu")
    values = np.random.default_rng(bits).standard_normal((6, 256), dtype=np.float32)
    largest = 2 ** (bits - 1) - 1
    blocks = values.reshape(6, -1, block).astype(np.float64)
    steps = np.abs(blocks).max(axis=2, keepdims=True) / largest
    expected = (np.clip(np.round(blocks / steps), -largest - 1, largest) * steps).reshape(6, 256)
    ours = fake_quantize_weight(format_.weight, torch.from_numpy(values))
    assert ours.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert format_bits(format_, (6, 256)) == 6 * 256 * (bits + 16 / block)


def test_tools_that_have_the_width_are_named_and_engines_that_lack_it_are_not() -> None:
    for name in BLOCK_INTEGERS:
        (format_,) = resolve_formats((name,), device="cpu")
        bits, block = format_.weight["num_bits"], format_.weight["block_sizes"][-1]
        assert counterpart(format_, "llama.cpp") == COUNTERPARTS[bits]
        assert counterpart(format_, "mlx-lm") == {
            "group_size": block,
            "bits": bits,
            "mode": "affine",
        }
        assert (counterpart(format_, "auto-round") is None) == (bits in (5, 6))
        assert (layer_algo(format_) is None) == (bits != 4)
