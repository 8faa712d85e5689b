"""NVFP4 and MX numbers, value by value, against ``ml_dtypes`` and ModelOpt's own tensors."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

from autoquant_ray.formats.numbers import NUMBERS, Blocks, blocks_of
from autoquant_ray.quantize.backends.block_formats import BACKEND, quantize_blocks, round_to
from autoquant_ray.quantize.quantizers import fake_quantize_weight, make_input_quantizer

DTYPES: dict[Any, Any] = {
    (2, 1): ml_dtypes.float4_e2m1fn,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
}
LARGEST = {key: float(ml_dtypes.finfo(dtype).max) for key, dtype in DTYPES.items()} | {8: 127.0}
MX = [*DTYPES, 8]
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


def mx(num_bits: Any) -> dict[str, Any]:
    sizes = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
    return {"num_bits": num_bits, "block_sizes": sizes}


def cast(values: np.ndarray, num_bits: Any) -> np.ndarray:
    """Nearest values of a number format, saturating: by ``ml_dtypes``, or numpy for int8."""
    clipped = np.clip(values, -LARGEST[num_bits], LARGEST[num_bits]).astype(np.float32)
    if num_bits == 8:
        return np.rint(clipped)
    return clipped.astype(DTYPES[num_bits]).astype(np.float32)


def expected_mx(row: np.ndarray, num_bits: Any) -> np.ndarray:
    """One block: the scale is the e8m0 number at or above maximum / largest."""
    ratio = np.float32(np.abs(row).max() / np.float32(LARGEST[num_bits]))
    exponent = -127 if ratio == 0 else max(-127, min(127, math.ceil(math.log2(float(ratio)))))
    scale = np.float64(np.array(2.0**exponent).astype(ml_dtypes.float8_e8m0fnu).astype(np.float64))
    assert scale == 2.0**exponent
    scaled = (row.astype(np.float64) / scale).astype(np.float32)
    with np.errstate(over="ignore"):
        return (cast(scaled, num_bits).astype(np.float64) * scale).astype(np.float32)


def expected_nvfp4(row: np.ndarray, maximum: float) -> np.ndarray:
    """One block: an e4m3 scale under a float32 one; scales below 1e-5 make zeros."""
    second = np.float32(maximum) / np.float32(6 * 448)
    wanted = np.float32(np.abs(row).max()) / (np.float32(6) * second)
    scale = cast(np.array([wanted]), (4, 3))[0] * second
    if scale < 1e-5:
        scale = np.float32(1)
    return cast(row / scale, (2, 1)) * scale


def sweep(rows: int, columns: int, low: int, high: int, seed: int = 0) -> np.ndarray:
    """Random blocks of all magnitudes; some zeros, negative zeros, and single large values."""
    generator = np.random.default_rng(seed)
    sizes = np.exp2(generator.uniform(low, high, size=(rows, 1)))
    values = generator.standard_normal((rows, columns)) * sizes
    values[generator.random((rows, columns)) < 0.1] = 0.0
    values[generator.random((rows, columns)) < 0.05] = -0.0
    values[::7, 0] *= 1000
    values[::11] = 0.0
    return values.astype(np.float32)


@pytest.mark.parametrize("num_bits", MX, ids=str)
def test_round_to_every_value_tie_and_neighbour_equals_ml_dtypes(num_bits: Any) -> None:
    if num_bits == 8:
        grid = np.arange(-127, 128, dtype=np.float32)
    else:
        width = ml_dtypes.finfo(DTYPES[num_bits]).bits
        codes = np.arange(2**width, dtype=np.uint8).view(DTYPES[num_bits])
        grid = np.unique(codes.astype(np.float32))
        grid = grid[np.isfinite(grid)]
    ties = (grid[1:] + grid[:-1]) / 2
    exact = np.concatenate([grid, ties, [-0.0, 0.0, 1e30, -1e30, np.inf, -np.inf, 2.0**-140]])
    exact = exact.astype(np.float32)
    around = [np.nextafter(exact, np.float32(end)) for end in (np.inf, -np.inf)]
    values = np.concatenate([exact, *around])
    ours = round_to(torch.from_numpy(values), NUMBERS[num_bits]).numpy()
    np.testing.assert_array_equal(ours, cast(values, num_bits))
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(values))
    assert NUMBERS[num_bits].largest == LARGEST[num_bits]


def test_round_to_nan_stays_nan() -> None:
    assert round_to(torch.tensor([float("nan")]), NUMBERS[2, 1]).isnan().all()


@pytest.mark.parametrize("num_bits", MX, ids=str)
def test_mx_all_magnitudes_equal_ml_dtypes(num_bits: Any) -> None:
    values = sweep(3000, 32, -140, 118)
    ours = fake_quantize_weight(mx(num_bits), torch.from_numpy(values)).numpy()
    expected = np.stack([expected_mx(row, num_bits) for row in values])
    np.testing.assert_array_equal(ours, expected)
    assert np.abs(ours).max() > 2.0**100


@pytest.mark.parametrize("exponent", [-149, -140, -130, -127, -126, -10, 0, 100])
@pytest.mark.parametrize("num_bits", MX, ids=str)
def test_mx_maximum_at_a_power_of_two_of_the_largest_value(num_bits: Any, exponent: int) -> None:
    """The largest element is the format's largest value: the scale is that power itself."""
    largest = np.float32(LARGEST[num_bits] * 2.0**exponent)
    steps = np.linspace(-1, 1, 31, dtype=np.float32) * largest
    for top in (largest, np.nextafter(largest, np.float32(np.inf))):
        row = np.append(steps, top).astype(np.float32)
        ours = fake_quantize_weight(mx(num_bits), torch.from_numpy(row)[None])[0].numpy()
        np.testing.assert_array_equal(ours, expected_mx(row, num_bits))


@pytest.mark.parametrize("maximum_over_largest", [1.0, 0.5, 4.0])
def test_nvfp4_all_magnitudes_equal_ml_dtypes(maximum_over_largest: float) -> None:
    """The calibrated maximum may lie above or below the largest value."""
    magnitudes = [(-30, 0), (-3, 3), (0, 30), (60, 100), (-140, -100), (-24, -10), (-20, -12)]
    for seed, (low, high) in enumerate(magnitudes):
        values = sweep(600, 16, low, high, seed)
        maximum = float(np.abs(values).max() * maximum_over_largest)
        quantizer = make_input_quantizer(NVFP4, maximum, torch.empty(0))
        assert quantizer is not None
        ours = quantizer(torch.from_numpy(values)).numpy()
        expected = np.stack([expected_nvfp4(row, maximum) for row in values])
        np.testing.assert_array_equal(ours, expected)


def test_nvfp4_block_scales_are_rounded_to_even_and_saturate() -> None:
    """Block maxima chosen so that the scale falls on ties of e4m3, and above its range."""
    second = np.float32(2.0**-3)
    scales = np.array([1.0625, 1.1875, 17, 19, 2.0**-9, 1.5 * 2.0**-9, 2.0**-10, 500], np.float32)
    rows = np.outer(scales * 6 * second, np.linspace(-1, 1, 16)).astype(np.float32)
    maximum = torch.tensor(second * 6 * 448)
    ours = quantize_blocks(torch.from_numpy(rows), blocks_of(NVFP4), maximum).numpy()
    expected = np.stack([expected_nvfp4(row, float(maximum)) for row in rows])
    np.testing.assert_array_equal(ours, expected)
    rounded = np.array([1, 1.25, 16, 20, 2.0**-9, 2.0**-8, 0, 448], np.float32)
    largest_element = np.array([6, 6, 6, 6, 6, 4, 0, 6], np.float32)
    np.testing.assert_array_equal(np.abs(ours).max(axis=1), rounded * largest_element * second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attributes", [NVFP4, mx((2, 1)), mx((4, 3)), mx(8)], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(
    attributes: dict[str, Any], dtype: torch.dtype
) -> None:
    weight = torch.from_numpy(sweep(64, 64, -6, 6)).to(dtype)
    ours = fake_quantize_weight(attributes, weight)
    assert ours.dtype == dtype
    assert torch.equal(ours, fake_quantize_weight(attributes, weight.float()).to(dtype))


@pytest.mark.parametrize("attributes", [NVFP4, mx((2, 1)), mx(8)], ids=str)
def test_partial_block_equals_the_row_filled_up_with_zeros(attributes: dict[str, Any]) -> None:
    weight = torch.from_numpy(sweep(9, 72 + 5, -4, 4))
    filled = torch.nn.functional.pad(weight, (0, 96 - 77))
    ours = fake_quantize_weight(attributes, weight)
    assert torch.equal(ours, fake_quantize_weight(attributes, filled)[:, :77])


@pytest.mark.parametrize("attributes", [NVFP4, mx((2, 1)), mx((4, 3)), mx(8)], ids=str)
def test_rows_do_not_depend_on_their_batch(attributes: dict[str, Any]) -> None:
    """What byte-identical scores for any number of workers rest on."""
    states = torch.from_numpy(sweep(30, 64, -3, 3)).view(5, 6, 64)
    quantizer = make_input_quantizer(attributes, float(states.abs().max()), torch.empty(0))
    assert quantizer is not None
    whole = quantizer(states)
    for index in range(5):
        assert torch.equal(quantizer(states[index].clone()), whole[index])
    assert torch.equal(quantizer(states.mT.contiguous().mT), whole)


@pytest.mark.parametrize("attributes", [NVFP4, mx((2, 1)), mx((4, 3)), mx(8)], ids=str)
def test_nan_and_infinity_do_not_get_lost(attributes: dict[str, Any]) -> None:
    states = torch.ones(3, 32)
    states[0, 3], states[1, 4] = float("nan"), float("-inf")
    quantizer = make_input_quantizer(attributes, 6.0, torch.empty(0))
    assert quantizer is not None
    quantized = quantizer(states)
    size = attributes["block_sizes"][-1]
    assert quantized[0, :size].isnan().all()
    assert quantized[1, 4] == (-6 if attributes is NVFP4 else float("-inf"))
    assert torch.equal(quantized[2:], quantizer(torch.ones(1, 32)))


def test_nvfp4_zero_tensor_stays_zero() -> None:
    assert torch.equal(fake_quantize_weight(NVFP4, torch.zeros(4, 32)), torch.zeros(4, 32))


@pytest.mark.parametrize("attributes", [NVFP4, mx((2, 1))], ids=str)
def test_input_is_not_changed_and_gradient_passes_through(attributes: dict[str, Any]) -> None:
    quantizer = make_input_quantizer(attributes, 3.0, torch.empty(0))
    assert quantizer is not None
    states = torch.from_numpy(sweep(4, 32, 0, 1)).requires_grad_()
    before = states.detach().clone()
    quantizer(states).sum().backward()
    assert torch.equal(states.detach(), before)
    assert torch.equal(states.grad, torch.ones(4, 32))


# --- ModelOpt's own tensors, those of its classes that run on CPU


def packed_nvfp4(weight: torch.Tensor) -> torch.Tensor:
    """A weight as ModelOpt packs it."""
    stored, scale, second = NVFP4QTensor.quantize(weight.clone(), 16)
    unpacked: torch.Tensor = stored.dequantize(
        dtype=torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16}
    )
    return unpacked


@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-24, 1), (-40, -16), (-90, -70)])
def test_nvfp4_weight_equals_what_modelopt_packs_at_all_magnitudes(low: int, high: int) -> None:
    weight = torch.from_numpy(sweep(512, 64, low, high))
    ours = fake_quantize_weight(NVFP4, weight)
    torch.testing.assert_close(ours, packed_nvfp4(weight), rtol=3e-7, atol=0)
    of_input = make_input_quantizer(NVFP4, float(weight.abs().max()), torch.empty(0))
    assert of_input is not None
    kernel_NB, ours_NB = of_input(weight).view(-1, 16), ours.view(-1, 16)
    is_kept = (kernel_NB != 0).any(dim=1)
    assert torch.equal(ours_NB[is_kept], kernel_NB[is_kept])
    assert bool((ours_NB[~is_kept] != 0).any()) == (low < -2)


@pytest.mark.parametrize("case", ["small", "a small row", "a zero row", "an outlier"])
def test_nvfp4_weight_of_any_size_is_off_by_a_tenth(case: str) -> None:
    """ModelOpt's kernel turns the first to zeros, and most of the small row."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    if case == "small":
        weight *= 1e-3
    if case == "a small row":
        weight[3] *= 1e-3
    if case == "a zero row":
        weight[3] = 0
    if case == "an outlier":
        weight[5, 7] = 20.0
    ours = fake_quantize_weight(NVFP4, weight)
    errors_O = (ours - weight).norm(dim=1) / weight.norm(dim=1).clamp(min=1e-9)
    assert errors_O.max() < 0.13
    assert torch.equal(ours[3] == 0, weight[3] == 0) or case != "a zero row"
    as_input = make_input_quantizer(NVFP4, float(weight.abs().max()), torch.empty(0))
    assert as_input is not None
    lost_O = (as_input(weight) - weight).norm(dim=1) / weight.norm(dim=1).clamp(min=1e-9)
    assert (lost_O.max() > 0.8) == (case in ("small", "a small row"))


def test_mxfp4_equals_modelopt_real_quantization_away_from_ties() -> None:
    """ModelOpt's class rounds ties down, its kernels to even; random values are no ties."""
    weight = torch.from_numpy(sweep(256, 64, -20, 20))
    weight[weight == 0] = 2.0**-30
    stored, scale = MXFP4QTensor.quantize(weight.clone(), 32)
    theirs = stored.dequantize(dtype=torch.float32, scale=scale, block_sizes={-1: 32})
    ours = fake_quantize_weight(mx((2, 1)), weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_mxfp8_equals_modelopt_real_quantization() -> None:
    weight = torch.from_numpy(sweep(256, 64, -20, 20))
    stored, scale = MXFP8QTensor.quantize(weight.clone())
    theirs = stored.dequantize(dtype=torch.float32, scale=scale, block_sizes={-1: 32})
    ours = fake_quantize_weight(mx((4, 3)), weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- what is refused


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"num_bits": (2, 1), "block_sizes": {-1: 16, "scale_bits": (4, 3)}}, "type: dynamic"),
        ({"num_bits": (2, 1)}, "type: dynamic"),
        (NVFP4 | {"num_bits": (4, 3)}, "only \\(2, 1\\)"),
        (mx((3, 0)), "num_bits \\(3, 0\\)"),
        (mx(4), "num_bits 4"),
        (mx(8) | {"block_sizes": {-1: 64, "type": "dynamic", "scale_bits": (8, 0)}}, "8, 16 or 32"),
        (mx(8) | {"block_sizes": {-2: 32, "type": "dynamic", "scale_bits": (8, 0)}}, "last axis"),
        (mx(8) | {"block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (5, 2)}}, "scale_bits"),
    ],
)
def test_blocks_that_cpu_does_not_know_say_what_is_different(
    attributes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        blocks_of(attributes)


def test_blocks_of_w4a8_nvfp4_has_blocks_of_32() -> None:
    sizes = {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}
    blocks = blocks_of({"num_bits": (2, 1), "block_sizes": sizes})
    assert blocks == Blocks(number=NUMBERS[2, 1], size=32, has_second_scale=True)


def test_backend_is_found_by_modelopt_itself() -> None:
    """A quantizer that is built from a config, as ``mtq.quantize`` builds it."""
    config = QuantizerAttributeConfig(**mx((2, 1)), backend=BACKEND, enable=True)
    quantizer = TensorQuantizer(config)
    values = torch.from_numpy(sweep(4, 32, 0, 1))
    assert torch.equal(quantizer(values), fake_quantize_weight(mx((2, 1)), values))
