"""Fake-quantized values as integers: the same values to the bit, and sums without an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import Attributes
from autoquant_ray.formats.integer_pairs import fits_int_mm, is_integer_pair
from autoquant_ray.formats.menu import OURS, resolve_formats
from autoquant_ray.quantize.grid import Integers, integers_of
from autoquant_ray.quantize.quantizers import (
    integer_weight,
    make_input_quantizer,
    make_weight_quantizer,
    quantized_weight,
)
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.integer_products import multiplied, require_exact_sums

PER_TOKEN: Attributes = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
PER_CHANNEL: Attributes = {"num_bits": 8, "axis": 0}
PRESETS = {
    "INT8_DEFAULT_CFG": True,
    "INT8_SMOOTHQUANT_CFG": True,
    "INT8_WEIGHT_ONLY_CFG": False,
    "MXINT8_DEFAULT_CFG": False,
}
CUSTOM: dict[str, Any] = {
    "per token": {"weight": {"num_bits": 8, "axis": None}, "input": PER_TOKEN},
    "blocks": {"weight": {"num_bits": 8, "block_sizes": {-1: 32}}, "input": PER_TOKEN},
    "16 bits": {"weight": PER_CHANNEL, "input": {"num_bits": 16, "axis": None}},
    "rotated": {"weight": PER_CHANNEL, "input": {**PER_TOKEN, "rotate": True}},
}


def test_pairs_of_integers_are_found_by_their_attributes() -> None:
    names = (*OURS, *PRESETS, *CUSTOM)
    menu = resolve_formats(names, device="cpu", custom=CUSTOM)
    pairs = {format_.name for format_ in menu if is_integer_pair(format_)}
    presets = {name for name, is_pair in PRESETS.items() if is_pair}
    assert pairs == {"wint8_aint8", "wint8_aint4", *presets, "per token"}


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((64, 160), True), ((60, 64), False), ((64, 100), False), ((8, 131064), True)],
)
def test_shapes_are_those_that_cuda_multiplies(shape: tuple[int, int], fits: bool) -> None:
    assert fits_int_mm(shape) == fits


def test_weight_whose_sums_may_not_fit_32_bits_is_not_multiplied() -> None:
    assert 131072 * 128 * 128 > 2**31 - 1
    assert not fits_int_mm((8, 131072))


def values(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random numbers; the second row is zero."""
    numbers = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    numbers[1] = 0.0
    return numbers


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("axis", [0, None])
def test_codes_of_a_weight_divided_by_modelopts_scale_are_its_values(
    num_bits: int, axis: int | None
) -> None:
    weight_OI = values(24, 64)
    quantizer = make_weight_quantizer({"num_bits": num_bits, "axis": axis}, weight_OI)
    codes_OI, unit_O = integers_of(quantizer, weight_OI)
    most = torch.tensor(2.0 ** (num_bits - 1) - 1)
    largest = weight_OI.abs().amax(dim=1, keepdim=True) if axis == 0 else weight_OI.abs().amax()
    assert torch.equal(codes_OI / (most / largest), quantizer(weight_OI))
    assert codes_OI.abs().amax() == most
    assert unit_O.shape == (24 if axis == 0 else 1,)
    torch.testing.assert_close(unit_O, (largest / most).reshape(-1), rtol=1e-6, atol=0)


def test_codes_of_inputs_beyond_the_calibrated_maximum_are_the_last() -> None:
    states_TI = values(40, 64)
    quantizer = make_input_quantizer({"num_bits": 8, "axis": None}, 1.5, states_TI)
    assert quantizer is not None
    codes_TI, _ = integers_of(quantizer, states_TI)
    assert torch.equal(codes_TI / (torch.tensor(127.0) / 1.5), quantizer(states_TI))
    assert (int(codes_TI.min()), int(codes_TI.max())) == (-128, 127)


def test_codes_of_inputs_with_a_scale_per_token_are_their_values() -> None:
    states_TI = values(40, 64)
    quantizer = make_input_quantizer(PER_TOKEN, None, states_TI)
    assert quantizer is not None
    codes_TI, unit_T = integers_of(quantizer, states_TI)
    largest_T1 = states_TI.abs().amax(dim=1, keepdim=True)
    assert torch.equal(codes_TI / (torch.tensor(127.0) / largest_T1), quantizer(states_TI))
    assert unit_T.shape == (40,)


@pytest.mark.parametrize("name", ["wint8_aint8", "wint8_aint8:mse", "wint8_aint4"])
def test_weight_in_chunks_is_that_of_its_format(name: str) -> None:
    (format_,) = resolve_formats((name,), device="cpu")
    weight_OI = values(1200, 1024)  # more than a chunk
    scales = WeightScales(torch.nn.Module())
    codes_OI, unit_O = integer_weight(format_, weight_OI, scales, "linear")
    exact_OI = quantized_weight(format_, weight_OI, scales, "linear")
    torch.testing.assert_close(codes_OI * unit_O[:, None], exact_OI, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("attributes", [{"num_bits": 8, "axis": None}, PER_TOKEN])
def test_product_is_that_of_the_values(rows: int, attributes: Attributes) -> None:
    states_TI, weight_OI = values(40, 512)[40 - rows :], values(24, 512, seed=1)
    inputs = make_input_quantizer(attributes, 2.0, states_TI)
    weight = make_weight_quantizer(PER_CHANNEL, weight_OI)
    assert inputs is not None
    exact_TO = inputs(states_TI).double() @ weight(weight_OI).double().T
    out_TO = torch.full((rows, 24), torch.nan)
    result_TO = multiplied(
        integers_of(inputs, states_TI), integers_of(weight, weight_OI), out=out_TO
    )
    assert result_TO is out_TO
    error = (out_TO.double() - exact_TO).abs().amax() / exact_TO.abs().amax()
    assert error < 1e-6


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_sums_have_no_error(rows: int) -> None:
    """The only rounding is that of the sum to float32."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (2, 40, 4096), dtype=torch.int8, generator=generator)
    codes[:, 0] = -128  # the largest sum
    codes_TI, codes_OI = codes[0][:rows], codes[1]
    unit = torch.ones(1)
    result_TO = multiplied(
        Integers(codes_TI, unit), Integers(codes_OI, unit), out=torch.empty(rows, 40)
    )
    assert torch.equal(result_TO, (codes_TI.double() @ codes_OI.double().T).float())
    assert result_TO.max() == 4096 * 2**14


def test_device_with_exact_sums_is_taken() -> None:
    require_exact_sums(torch.device("cpu"))


def saturating(left_TI: torch.Tensor, right_IO: torch.Tensor) -> torch.Tensor:
    """What CPUs without VNNI compute by ``vpmaddubsw``: sums of two in 16 bits."""
    unsigned_TI = left_TI.int() + 128
    terms_TOI = unsigned_TI[:, None] * right_IO.T.int()[None]
    pairs = terms_TOI.unflatten(2, (-1, 2)).sum(dim=3).clamp(-(2**15), 2**15 - 1)
    return pairs.sum(dim=2) - 128 * right_IO.int().sum(dim=0)


def test_device_whose_sums_saturate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.raises(ConfigError, match=r"int8: torch .* wrongly on this cpu device; give float"):
        require_exact_sums(torch.device("cpu"))
