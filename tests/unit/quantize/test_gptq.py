"""GPTQ: ModelOpt's own result, codes that keep it, and halves that a rounding has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from weight_formats import FP8, INT4, INT8, searched

from autoquant_ray.calibrate.hessians import HessianCollector
from autoquant_ray.errors import FormatError
from autoquant_ray.formats.algorithms import of_allocation
from autoquant_ray.formats.format import Attributes
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize import calibration_mode  # noqa: F401 (registers the mode)
from autoquant_ray.quantize.calibration import (
    Calibration,
    Channels,
    FittedCodes,
    FittedWeight,
    ModuleCalibration,
)
from autoquant_ray.quantize.gptq.columns import Problem
from autoquant_ray.quantize.gptq.fit import WeightToRound, fit_codes, gptq_codes, weight_to_round
from autoquant_ray.quantize.grid import Grid, grid_of, packed, plain_codes, values_of
from autoquant_ray.quantize.quantizers import (
    make_weight_quantizer,
    quantized_weight,
)
from autoquant_ray.quantize.second_moments import SecondMoments
from autoquant_ray.quantize.weight_search import WeightScales

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
WEIGHTS = {"int4": INT4, "int8": INT8, "fp8": FP8, "nvfp4": NVFP4}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def correlated(num_tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs that a quarter as many directions explain nearly."""
    mixing = drawn(width // 4, width, seed=99)
    return drawn(num_tokens, width // 4, seed=seed) @ mixing + 0.1 * drawn(
        num_tokens, width, seed=seed + 1000
    )


def moments(*inputs_TI: torch.Tensor) -> SecondMoments:
    return SecondMoments([input_TI.T @ input_TI for input_TI in inputs_TI])


def fit(weight_OI: torch.Tensor, seen: SecondMoments, grid: Grid) -> FittedCodes | None:
    """The rounding of a single weight."""
    return fit_codes([WeightToRound(weight_OI, grid)], seen)[0]


def solved(
    weight_OI: torch.Tensor, seen: SecondMoments, problems: Sequence[Problem], grid: Grid
) -> list[torch.Tensor]:
    """What a weight is rounded to in each of some problems."""
    is_unused_I = (weight_OI == 0).all(dim=0)
    (codes,) = gptq_codes([(weight_OI, grid)], seen, problems, is_unused_I)
    assert len(codes) == len(problems)
    return [values_of(codes[n].numpy(), grid) for n in range(len(problems))]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_integers_are_those_of_modelopt(family: str, make_model: Any, make_samples: Any) -> None:
    """Its ``gptq`` without ``layerwise``, one process, damping 0.01: 99.9% of the weights."""
    import modelopt.torch.quantization as mtq

    samples = make_samples([120, 90, 150], seed=3)
    original, theirs = make_model(family), make_model(family)
    linears = {
        name: module
        for name, module in original.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name and not name.endswith("gate")
    }
    collector = HessianCollector(linears)

    def run(model: Any) -> None:
        for sample in samples:
            model(input_ids=torch.tensor(np.asarray(sample))[None], use_cache=False)

    with torch.no_grad(), collector.collecting():
        run(original)
    sums = collector.moments()
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            *({"quantizer_name": f"{name}.weight_quantizer", "cfg": INT4} for name in linears),
        ],
        "algorithm": {"method": "gptq", "layerwise": {"enable": False}},
    }
    mtq.quantize(theirs, config, run)
    num_equal = num_changed = num_weights = 0
    for name, module in linears.items():
        weight = module.weight.detach()
        grid = grid_of(make_weight_quantizer(INT4, weight), weight)
        (values,) = solved(weight, sums[name], [(None, 0.01)], grid)
        codes = (values / grid.unit_OI).round()
        expected = (theirs.get_submodule(name).weight.detach() / grid.unit_OI).round()
        num_equal += int((codes == expected).sum())
        num_changed += int((codes != plain_codes(weight, grid)).sum())
        num_weights += weight.numel()
    assert num_changed > 0.05 * num_weights
    assert num_equal > 0.999 * num_weights


@pytest.mark.parametrize("name", WEIGHTS)
def test_quantizer_leaves_fitted_numbers_as_they_are(name: str) -> None:
    weight_OI, inputs = drawn(24, 64), [correlated(200, 64, seed) for seed in (1, 2)]
    weight_OI[3, 16:32] = 0  # a block of zeros
    quantizer = make_weight_quantizer(WEIGHTS[name], weight_OI)
    grid = grid_of(quantizer, weight_OI)
    plain_OI = plain_codes(weight_OI, grid) * grid.unit_OI
    torch.testing.assert_close(plain_OI, quantizer(weight_OI), rtol=1e-6, atol=0)
    fitted = fit(weight_OI, moments(*inputs), grid)
    assert fitted is not None
    for codes in (fitted.whole, *fitted.without):
        values_OI = values_of(codes, grid)
        torch.testing.assert_close(quantizer(values_OI), values_OI, rtol=1e-6, atol=0)
    rounded = make_weight_quantizer(WEIGHTS[name], weight_OI.bfloat16())
    values_OI = values_of(fitted.whole, grid_of(rounded, weight_OI.bfloat16()))
    again = rounded(values_OI.bfloat16()).float()
    torch.testing.assert_close(again, values_OI, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_large_weight_is_rounded_as_a_whole(name: str) -> None:
    """Some rows at a time on the CPU: the same bytes, fitted or not."""
    weight_OI = drawn(3000, 448)
    quantizer = make_weight_quantizer(WEIGHTS[name], weight_OI)
    grid = grid_of(quantizer, weight_OI)
    codes_OI = (plain_codes(weight_OI, grid) - 1).clamp(grid.least, grid.most)
    codes = packed(codes_OI, grid).flatten().numpy()
    fitted = FittedWeight(codes=FittedCodes(damping=0.1, whole=codes, without=(codes, codes)))
    for method, given_OI in (("max", weight_OI), ("gptq", values_of(codes, grid))):
        format_ = searched(WEIGHTS[name], method)
        calibration = Calibration(rounding={("layer", "", format_.weight_key): fitted})
        scales = WeightScales(torch.nn.Identity(), calibration if method == "gptq" else None)
        ours = quantized_weight(format_, weight_OI, scales, "layer")
        assert torch.equal(ours, quantizer(given_OI))


def output_error(weight_OI: torch.Tensor, values_OI: torch.Tensor, input_TI: torch.Tensor) -> float:
    return float((input_TI @ (values_OI - weight_OI).T).square().sum())


def test_rounding_loses_less_on_tokens_that_it_has_not_seen() -> None:
    weight_OI = drawn(48, 64)
    halves = [correlated(400, 64, seed) for seed in (1, 2)]
    quantizer = make_weight_quantizer(INT4, weight_OI)
    grid = grid_of(quantizer, weight_OI)
    fitted = fit(weight_OI, moments(*halves), grid)
    assert fitted is not None
    plain = quantizer(weight_OI)
    unseen = correlated(400, 64, 3)
    whole = values_of(fitted.whole, grid)
    assert output_error(weight_OI, whole, unseen) < 0.6 * output_error(weight_OI, plain, unseen)
    for number, input_TI in enumerate(halves):
        without = values_of(fitted.without[number], grid)
        problem = (1 - number, fitted.damping)
        (alone,) = solved(weight_OI, moments(*halves), [problem], grid)
        assert torch.equal(without, alone)
        seen = output_error(weight_OI, whole, input_TI)
        assert seen < output_error(weight_OI, without, input_TI)


def test_weight_that_plain_rounding_serves_better_keeps_it() -> None:
    """Uncorrelated inputs, and fewer tokens than channels: all that could be fitted is noise."""
    weight_OI = drawn(32, 64)
    grid = grid_of(make_weight_quantizer(INT8, weight_OI), weight_OI)
    assert fit(weight_OI, moments(drawn(8, 64, seed=1), drawn(8, 64, seed=2)), grid) is None


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(32, 90), (576, 30), (576, 2000)])
def test_damping_is_chosen_by_the_loss_on_the_other_half(num_rows: int, num_tokens: int) -> None:
    """Of all rows, though some of many decide."""
    weight_OI = drawn(num_rows, 64)
    halves = [correlated(num_tokens, 64, seed) for seed in (1, 2)]
    grid = grid_of(make_weight_quantizer(INT4, weight_OI), weight_OI)
    losses = {}
    for damping in (0.01, 0.1, 1.0):
        values = solved(weight_OI, moments(*halves), [(1, damping), (0, damping)], grid)
        losses[damping] = sum(
            output_error(weight_OI, values_OI, input_TI)
            for values_OI, input_TI in zip(values, halves, strict=True)
        )
    fitted = fit(weight_OI, moments(*halves), grid)
    assert fitted is not None
    assert fitted.damping == min(losses, key=lambda damping: losses[damping])
    (given,) = resolve_formats(
        ("mine",),
        device="cpu",
        custom={"mine": {"weight": INT4, "algorithm": {"method": "gptq", "perc_damp": 0.5}}},
    )
    assert given.algorithm == {"method": "gptq", "perc_damp": 0.5}


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (
            {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
            "type: dynamic",
        ),
        ({"num_bits": 4, "block_sizes": {-2: 32, "type": "static"}}, "last axis"),
    ],
)
def test_format_without_scales_per_output_is_refused(weight: Attributes, reason: str) -> None:
    entry = {"weight": weight, "algorithm": {"method": "gptq"}}
    with pytest.raises(FormatError, match=reason):
        resolve_formats(("mine",), device="cpu", custom={"mine": entry})


def test_factors_come_before_rounding(make_model: Any) -> None:
    """``W s`` is rounded for inputs ``x / s``, and the result divided by ``s`` again."""
    model = make_model("llama")
    plan = build_plan(model, resolve_formats(("wint4_g32_afp16:awq+gptq",), device="cpu"))
    (format_,), name = plan.formats, "model.layers.0.mlp.down_proj"
    weight_OI = model.get_submodule(name).weight.detach()
    width = weight_OI.shape[1]
    loud_I = drawn(width, seed=5).exp()
    halves = [correlated(400, width, seed) * loud_I for seed in (1, 2)]
    sum_I = torch.cat(halves).abs().sum(dim=0).double().numpy()
    channels = Channels(largest_I=None, sum_I=sum_I, num_tokens=800)
    record = ModuleCalibration(channels=channels, alphas={format_.name: 0.5})
    calibration = Calibration(modules={name: record}, folds=plan.folds)
    factors_I = WeightScales(model, calibration).factors((name,), format_)
    assert factors_I is not None
    assert factors_I.std() > 0.1
    scales = WeightScales(model, calibration)
    weight, seen = weight_to_round(format_, weight_OI, weight_OI, moments(*halves), scales, name)
    (fitted,) = fit_codes([weight], seen)
    assert fitted is not None
    scaled_OI = weight_OI * factors_I
    grid = grid_of(make_weight_quantizer(format_.weight, scaled_OI), scaled_OI)
    scaled = [half_TI / factors_I for half_TI in halves]
    expected = fit(scaled_OI, moments(*scaled), grid)
    assert expected is not None
    assert fitted.damping == expected.damping
    is_equal = fitted.whole == expected.whole
    assert is_equal.mean() > 0.999  # the moments are scaled after they were summed, or before
    rounding = {(name, "", format_.weight_key): FittedWeight(codes=fitted)}
    scales = WeightScales(model, replace(calibration, rounding=rounding))
    quantized_OI = quantized_weight(format_, weight_OI, scales, name)
    values_OI = values_of(fitted.whole, grid) / factors_I
    torch.testing.assert_close(quantized_OI, values_OI, rtol=1e-5, atol=1e-7)


def test_mtq_quantize_refuses_to_repeat_a_fit_that_it_has_no_data_for(make_model: Any) -> None:
    import modelopt.torch.quantization as mtq

    name = "model.layers.0.mlp.down_proj.weight_quantizer"
    (fitted,) = resolve_formats(("wint4_afp16:gptq",), device="cpu")
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": name, "cfg": fitted.weight},
        ],
        "algorithm": of_allocation({name: fitted.algorithm}),
    }
    assert config["algorithm"]["method"] == "autoquant_ray_sets"  # type: ignore[index]
    with pytest.raises(ValueError, match="get the config from the run, load_quantization_config"):
        mtq.quantize(make_model("llama"), config, lambda model: model(torch.tensor([[1, 2]])))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("width", [64, 200])
def test_weights_that_are_rounded_together_are_rounded_as_alone(name: str, width: int) -> None:
    """Several weights under several formats, of any number of rows: the same bytes."""
    seen = moments(*(correlated(300, width, seed) for seed in (1, 2)))
    weights = [drawn(rows, width, seed=rows) for rows in (48, 7, 600, 1, 33)]
    for weight_OI in weights[:3]:
        weight_OI[:, 5] = 0
    formats = [WEIGHTS[name], {**INT4, "block_sizes": {-1: 20, "type": "static"}}, INT8, FP8]
    together = [
        WeightToRound(weight_OI, grid_of(make_weight_quantizer(format_, weight_OI), weight_OI))
        for weight_OI in weights
        for format_ in formats
    ]
    num_fitted = 0
    for weight, ours in zip(together, fit_codes(together, seen), strict=True):
        (alone,) = fit_codes([weight], seen)
        assert (ours is None) == (alone is None)
        if ours is not None and alone is not None:
            assert ours.damping == alone.damping
            assert np.array_equal(ours.whole, alone.whole)
            assert all(map(np.array_equal, ours.without, alone.without))
            num_fitted += 1
    assert num_fitted > len(together) / 2


def test_rounding_is_gptq_by_the_inverse_of_the_moments() -> None:
    """Column by column in float64, as in the paper: the error over the pivot, times the rest of the
    row of the inverse's Cholesky factor."""
    weight_OI, input_TI = drawn(40, 150), correlated(500, 150, 1)
    grid = grid_of(make_weight_quantizer(INT4, weight_OI), weight_OI)
    (ours,) = solved(weight_OI, moments(input_TI), [(None, 0.1)], grid)
    hessian_II = input_TI.double().T @ input_TI.double()
    hessian_II += 0.1 * hessian_II.diagonal().mean() * torch.eye(150)
    factor_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    left_OI, unit_OI = weight_OI.double(), grid.unit_OI.double()
    expected_OI = torch.empty_like(left_OI)
    for column in range(150):
        codes_O = grid.round(left_OI[:, column] / unit_OI[:, column])
        expected_OI[:, column] = codes_O * unit_OI[:, column]
        error_O = (left_OI[:, column] - expected_OI[:, column]) / factor_II[column, column]
        left_OI[:, column + 1 :] -= error_O[:, None] * factor_II[column, column + 1 :]
    is_equal = (ours - expected_OI).abs() < 1e-5
    assert is_equal.float().mean() > 0.99
