"""Weight scales by squared error weighted by channel: by hand, and within ``mtq.quantize``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from families import family_model
from modelopt_scores import NOTHING, quantized_by_modelopt
from weight_formats import FP8, INT4, INT8, searched

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.errors import FormatError
from autoquant_ray.formats.algorithms import of_allocation
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import (
    BLOCK_INTEGERS,
    PAIRS,
    WEIGHTED_BY_DEFAULT,
    known_formats,
    resolve_formats,
)
from autoquant_ray.formats.smoothed import needs_calibration
from autoquant_ray.models.find import find_model
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.make import make_plan
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize import calibration_mode  # noqa: F401 (registers the mode)
from autoquant_ray.quantize.calibration import Calibration, Channels, ModuleCalibration
from autoquant_ray.quantize.experts import FusedExperts
from autoquant_ray.quantize.quantizers import (
    fake_quantize_weight,
    fit_weight,
    make_weight_quantizer,
    quantized_weight,
)
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.solve import solve_run

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
MULTIPLIERS = np.linspace(0.7, 1.05, 15).astype(np.float32)


def format_of(name: str) -> Format:
    return resolve_formats((name,), device="cpu")[0]


def weighted(weight: Any) -> Format:
    return searched(weight, "weighted")


def drawn(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def squares_of(width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).lognormal(0, 2, width).astype(np.float32))


@pytest.mark.parametrize("width", [64, 40], ids=["whole blocks", "a partial block"])
@pytest.mark.parametrize("weight", [INT4, INT8, FP8], ids=["int4", "int8", "fp8"])
def test_scales_are_those_of_the_smallest_weighted_error_by_hand(weight: Any, width: int) -> None:
    weight_OI, squares_I = drawn((6, width)), squares_of(width)
    format_ = weighted(weight)
    ours = fake_quantize_weight(format_.weight, weight_OI, format_.algorithm, squares_I=squares_I)
    plain = fake_quantize_weight(format_.weight, weight_OI)
    size = {4: 16, 8: width}.get(weight["num_bits"], 0)
    regions = (
        [np.s_[o, start : start + size] for o in range(6) for start in range(0, width, size)]
        if size
        else [np.s_[:, :]]
    )
    is_better = 0
    for region in regions:
        values = weight_OI.numpy()[region].astype(np.float64)
        weights = np.broadcast_to(squares_I.numpy(), (6, width))[region]
        errors = []
        for multiplier in MULTIPLIERS:
            largest = np.abs(values).max() * multiplier
            if size:
                top = 2 ** (weight["num_bits"] - 1) - 1
                step = largest / top
                on_grid = np.clip(np.round(values / step), -top - 1, top) * step
            else:
                step = largest / 448
                scaled = torch.from_numpy(np.clip(values / step, -448, 448)).float()
                on_grid = scaled.to(torch.float8_e4m3fn).double().numpy() * step
            errors.append((weights * (on_grid - values) ** 2).sum())
        error = (weights * (ours.numpy()[region].astype(np.float64) - values) ** 2).sum()
        assert error == pytest.approx(min(errors), rel=1e-4)
        is_better += error < 0.999 * (weights * (plain.numpy()[region] - values) ** 2).sum()
    assert is_better


def test_static_nvfp4_takes_the_best_of_its_candidates() -> None:
    weight_OI, squares_I = drawn((8, 64)), squares_of(64)
    format_ = weighted(NVFP4)
    quantizer = make_weight_quantizer(
        format_.weight, weight_OI, format_.algorithm, squares_I=squares_I
    )
    ours = quantizer(weight_OI)
    largest = make_weight_quantizer(format_.weight, weight_OI)

    def errors(quantized_OI: torch.Tensor) -> torch.Tensor:
        return ((quantized_OI - weight_OI).square() * squares_I).unflatten(1, (-1, 16)).sum(dim=2)

    tried = []
    for multiplier in MULTIPLIERS:
        candidate = make_weight_quantizer(format_.weight, weight_OI)
        candidate.amax = largest.amax * float(multiplier)
        tried.append(errors(candidate(weight_OI)))
    assert torch.equal(errors(ours), torch.stack(tried).amin(dim=0))
    assert errors(ours).sum() < 0.95 * errors(largest(weight_OI)).sum()


def test_result_does_not_depend_on_the_type_of_the_model() -> None:
    weight_OI, squares_I = drawn((6, 64)).bfloat16(), squares_of(64)
    algorithm = weighted(INT4).algorithm
    maxima = [
        make_weight_quantizer(INT4, values, algorithm, squares_I=squares_I).amax
        for values in (weight_OI, weight_OI.float())
    ]
    assert torch.equal(*maxima)


def test_channels_that_were_never_used_are_rounded_by_plain_squared_error() -> None:
    weight_OI, squares_I = drawn((4, 32)), torch.ones(32)
    squares_I[:16] = 0
    algorithm = weighted(INT4).algorithm
    plain = fake_quantize_weight(INT4, weight_OI, algorithm, squares_I=torch.ones(32))
    for seen_I in (squares_I, torch.zeros(32), squares_I * 1e-30):
        ours = fake_quantize_weight(INT4, weight_OI, algorithm, squares_I=seen_I)
        assert torch.equal(ours, plain)


def test_without_statistics_scales_stay_at_the_maxima() -> None:
    format_ = weighted(INT4)
    scales = WeightScales(torch.nn.Identity())
    ours = quantized_weight(format_, drawn((4, 32)), scales, "nowhere")
    assert torch.equal(ours, fake_quantize_weight(INT4, drawn((4, 32))))


@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE", "GPT-OSS"])
def test_scan_and_mtq_quantize_find_the_same_scales(
    family: str, make_spec: Any, make_samples: Any
) -> None:
    """ModelOpt's hooks see the inputs of a whole model, ours those of a layer or an expert."""
    model = family_model(family)
    formats = [format_of("wint4_afp16:weighted"), format_of("wint8_aint8:weighted")]
    plan = build_plan(model, formats)
    samples = make_samples([24, 24, 24])
    calibration = Scorer(make_spec(plan), model=model).calibrate(samples)
    modules = [module for group in plan.searched for module in group.modules]
    entries, algorithms = [*NOTHING], {}
    for number, module in enumerate(modules):
        for prefix in module.quantizer_prefixes:
            entries += quantizer_entries(f"{module.name}.{prefix}", formats[number % 2])
            for part in ("weight_quantizer", "input_quantizer"):
                algorithms[f"{module.name}.{prefix}{part}"] = formats[number % 2].algorithm
    batches = [torch.tensor([sample]) for sample in samples]
    theirs = quantized_by_modelopt(model, batches, entries, of_allocation(algorithms))
    scales = WeightScales(model, calibration)
    for number, planned in enumerate(modules):
        module, their = (m.get_submodule(planned.path) for m in (model, theirs))
        for ours, expected in weights_of(module, their, planned, formats[number % 2], scales):
            assert torch.equal(ours, expected), planned.name


def weights_of(
    module: Any, their: Any, planned: PlannedModule, format_: Format, scales: WeightScales
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights as we quantize them, and as a module of ``mtq.quantize`` does."""
    if planned.kind == "linear":
        ours = quantized_weight(format_, module.weight, scales, planned.name)
        yield ours, their.weight_quantizer(module.weight)
        return
    experts = FusedExperts(module, planned)
    for name in planned.parameters:
        ours = experts.quantized_weight(name, format_, scales)
        if planned.is_transposed:
            weight = getattr(module, name).mT.contiguous()
            yield ours.mT, getattr(their, f"{name}_weight_quantizer")(weight)
            continue
        for expert, quantizer in enumerate(getattr(their, f"{name}_weight_quantizers")):
            yield ours[expert], quantizer(getattr(module, name)[expert])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wint4_afp16:nearest", "'nearest' is no method of rounding"),
        ("kv_fp8:weighted", "has no stored scales"),
        ("INT4_AWQ_CFG:weighted", "has the algorithm awq_lite already"),
        ("MXFP4_DEFAULT_CFG:weighted", "type: dynamic"),
        ("wint_afp16:weighted", "unknown format .wint_afp16."),
    ],
)
def test_method_that_a_format_cannot_have_is_refused(name: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as error:
        format_of(name)
    assert len(str(error.value)) <= 400


def test_format_of_the_config_takes_a_method_behind_its_name() -> None:
    custom = {"mine": {"weight": INT4}}
    (named,) = resolve_formats(("mine:weighted",), device="cpu", custom=custom)
    assert (named.weight, named.algorithm) == (INT4, weighted(INT4).algorithm)


def test_method_keeps_the_stored_bytes_and_gives_nvfp4_stored_scales() -> None:
    assert format_of("wint4_afp16:max").algorithm is None
    nvfp4 = format_of("wfp4_afp16:weighted")
    assert nvfp4.weight["block_sizes"]["type"] == "static"
    assert format_of("wfp4_afp16:max").weight["block_sizes"]["type"] == "dynamic"


@pytest.mark.parametrize("name", sorted(WEIGHTED_BY_DEFAULT))
def test_few_bits_without_a_method_are_weighted_under_their_bare_name(name: str) -> None:
    bare, plain = format_of(name), format_of(f"{name}:max")
    assert bare == replace(format_of(f"{name}:weighted"), name=name)
    assert bare.weight_key == format_of(f"{name}:weighted").weight_key
    assert plain.algorithm is None
    weight, input_ = (PAIRS | BLOCK_INTEGERS)[name]
    assert (plain.weight, plain.input) == (weight, input_)
    assert needs_calibration([bare])
    assert needs_calibration([plain]) == (input_ is not None)


def test_which_names_are_weighted_by_default() -> None:
    assert {f.name for f in map(format_of, known_formats_of_cpu()) if is_weighted(f)} == {
        *(f"w{weight}_a{a}" for weight in ("int4", "fp4") for a in ("fp16", "fp8", "int8", "int4")),
        *(f"wint{bits}_afp16" for bits in (3, 5, 6)),
        *(f"wint{bits}_g{block}_afp16" for bits in (3, 4, 5, 6) for block in (32, 64)),
    }
    custom = {"wint4_afp16": {"weight": INT4}}
    (mine,) = resolve_formats(("wint4_afp16",), device="cpu", custom=custom)
    assert mine.algorithm is None, "a format of the config is what the config says"


def known_formats_of_cpu() -> list[str]:
    """Names that can be scanned."""
    names = []
    for name in known_formats():
        with suppress(FormatError):
            names.append(format_of(name).name)
    return names


def is_weighted(format_: Format) -> bool:
    return (format_.algorithm or {}).get("method") == "weighted"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_bare_name_scores_as_weighted_and_max_as_the_preset(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    names = ("wint4_afp16", "wint4_afp16:weighted", "wint4_afp16:max")
    names = (*names, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "wfp4_afp16", "wfp4_afp16:weighted")
    names = (*names, "wfp4_afp16:max", "W4A16_NVFP4_CFG")
    prepared = make_scorer(family, names)
    samples = make_samples([24, 24])
    calibration = prepared.scorer.calibrate(samples)
    sums = prepared.scorer.score(samples, 0, calibration).sums.elementwise_GF
    of = dict(zip(names, sums.T, strict=True))
    for bare, preset in (
        ("wint4_afp16", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
        ("wfp4_afp16", "W4A16_NVFP4_CFG"),
    ):
        assert np.array_equal(of[bare], of[f"{bare}:weighted"])
        assert np.array_equal(of[f"{bare}:max"], of[preset])
        assert of[bare].sum() < of[f"{bare}:max"].sum()


def test_mtq_quantize_without_inputs_says_what_is_missing(make_run: Any, make_model: Any) -> None:
    directory = make_run("llama", ("wint4_afp16",), disable=())
    solve_run(directory, SolveOptions(bits=5), folder="")
    manifest = directory.read_json("manifest.json")
    with pytest.raises(ValueError, match=r"give mtq\.quantize a forward_loop") as error:
        mtq.quantize(make_model("llama"), load_quantization_config(manifest, device="cpu"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 400


def test_experts_that_saw_few_tokens_keep_their_maxima(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("qwen3_moe", ("wint4_afp16:max", "wint4_afp16:weighted"))
    samples = make_samples([24, 24])
    calibration = prepared.scorer.calibrate(samples)
    counts = {
        (module, part): channels.num_tokens
        for (module, part), channels in calibration.channels().items()
        if part
    }
    assert counts
    least = sorted(counts.values())[len(counts) // 2] + 1
    enough, few = calibration.with_enough_tokens(least)
    assert few
    assert set(few) == {
        f"{module}.{part.partition('.')[2]}" for (module, part), n in counts.items() if n < least
    }
    without, every = calibration.with_enough_tokens(10**9)
    assert set(few) < set(every)
    scores = {
        name: prepared.scorer.score(samples, 0, statistics).sums.elementwise_GF
        for name, statistics in (("all", calibration), ("few", enough), ("none", without))
    }
    for number, group in enumerate(prepared.names):
        plain, by_all = scores["all"][number]
        if group.endswith("experts"):
            assert by_all < plain
            assert scores["none"][number, 1] == plain
            assert scores["few"][number, 1] not in (plain, by_all)
        else:
            assert scores["none"][number, 1] == by_all != plain


def test_plan_of_a_run_has_the_formats_that_the_run_recorded(model_folder: Any) -> None:
    """Earlier versions rounded a bare name plainly."""
    ref = find_model(str(model_folder("llama")))
    space = SearchSpace(model=ref.name, formats=("wint4_afp16", "wfp8_afp8"))
    earlier = [format_of(f"{name}:max").to_json() | {"name": name} for name in space.formats]
    plan = make_plan(space, ref, device="cpu", menu=earlier)
    assert [(f.name, f.algorithm) for f in plan.formats] == [(n, None) for n in space.formats]
    assert plan.summary()["formats"] == earlier
    now = make_plan(space, ref, device="cpu")
    assert now.formats[0].algorithm == format_of("wint4_afp16:weighted").algorithm
    assert now.rows() == plan.rows(), "the same bytes"
    other = make_plan(space, ref, device="cpu", menu=earlier[:1])
    assert other.formats == now.formats, "formats of another menu do not count"


def test_mse_of_4_bit_integers_is_cautioned_and_nothing_else(
    model_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("wint4_afp16:mse", "wint8_afp16:mse", "wint4_afp16", "wint4_afp16:weighted")
    ref = find_model(str(model_folder("llama")))
    make_plan(SearchSpace(model=ref.name, formats=names), ref, device="cpu")
    (caution,) = caplog.messages
    assert caution.startswith("wint4_afp16:mse: ")
    assert "weighted" in caution


@pytest.mark.parametrize("name", ["wint4_g64_afp16:weighted", "wint8_afp16:weighted"])
def test_large_weight_is_searched_as_its_rows_alone(name: str) -> None:
    format_, (rows, width) = format_of(name), (3000, 448)
    weight_OI, sums_I = drawn((rows, width)), drawn((width,), seed=1).double().square().numpy()
    channels = Channels(largest_I=None, sum_I=None, square_sum_I=sums_I, num_tokens=9)
    calibration = Calibration({"layer": ModuleCalibration(channels=channels)})
    scales = WeightScales(torch.nn.Identity(), calibration)
    parts = [fit_weight(format_, some, scales, "layer") for some in weight_OI.split(700)]
    whole = fit_weight(format_, weight_OI, scales, "layer")
    assert whole is not None
    assert np.array_equal(whole, np.concatenate(parts))
    assert len(np.unique(whole)) > 5
