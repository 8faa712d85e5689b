"""Cards of measured products: what their figures are, and that predictions give the times back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import refusal, run
from families import family_model

from autoquant_ray.allocate.cards import Hardware, load_hardware
from autoquant_ray.config.latency_measurement import LatencyMeasurement
from autoquant_ray.distributed.products import Product, TimedProduct, spread_of, time_products
from autoquant_ray.errors import ClusterError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.jobs.latency_card import card_of, products_of
from autoquant_ray.plan.plan import build_plan

SHAPES = {(64, 32): 3, (128, 64): 1}


def timed(pair: str, *, seconds: Any, problem: str | None = None) -> list[TimedProduct]:
    """Products of all shapes with 1 and 8 tokens; ``seconds`` of (shape, tokens)."""
    weight, _, activation = pair.partition("x")
    size = 2 if weight == "16" else 1
    return [
        TimedProduct(
            product=Product(
                weight=weight,
                activation=activation,
                tokens=tokens,
                out_features=num_out,
                in_features=num_in,
            ),
            kernel="kernel",
            weight_bytes=size * num_out * num_in,
            seconds=() if problem else seconds((num_out, num_in), tokens),
            problem=problem,
        )
        for num_out, num_in in SHAPES
        for tokens in (1, 8)
    ]


def rounds(shape: tuple[int, int], tokens: int) -> tuple[float, ...]:
    """The small weight takes 1, the large one 10 us; a round of five is an outlier."""
    base = (1e-6 if shape == (64, 32) else 1e-5) * tokens
    return (base, base, base, base, 100 * base)


def test_figures_are_those_with_which_the_whole_model_takes_its_time() -> None:
    content = card_of("card", "model", timed("16x16", seconds=rounds), SHAPES)
    hardware = Hardware.model_validate(content)
    num_weights = 3 * 64 * 32 + 128 * 64
    step = 3 * 1e-6 + 1e-5
    assert hardware.bytes_per_second() == pytest.approx(2 * num_weights / step, rel=1e-3)
    assert hardware.rate("16", "16") == pytest.approx(2 * 8 * num_weights / (8 * step), rel=1e-3)
    assert hardware.is_measured
    assert "4 of 4 weights of model" in hardware.memory_bandwidth.source
    assert hardware.products == ()
    assert len(content["products"]) == 4


def test_pair_without_kernel_counts_as_16_bits_and_is_named() -> None:
    both = [*timed("16x16", seconds=rounds), *timed("fp4x16", seconds=rounds, problem="no kernel")]
    hardware = Hardware.model_validate(card_of("card", "model", both, SHAPES))
    assert hardware.without_kernel == {"fp4x16": "no kernel"}
    assert hardware.bytes_per_second("fp4", "16") == hardware.bytes_per_second()


def test_kernel_that_refuses_a_shape_is_measured_on_the_others() -> None:
    some = [
        entry if entry.product.shape == (64, 32) else refused
        for entry, refused in zip(
            timed("int4x16", seconds=rounds),
            timed("int4x16", seconds=rounds, problem="refused"),
            strict=True,
        )
    ]
    hardware = Hardware.model_validate(
        card_of("card", "model", [*timed("16x16", seconds=rounds), *some], SHAPES)
    )
    assert hardware.bytes_per_second("int4", "16") == pytest.approx(64 * 32 / 1e-6, rel=1e-3)
    assert "3 of 4 weights" in hardware.weight_reads["int4x16"].source
    assert hardware.without_kernel == {}


def test_device_that_multiplies_nothing_in_16_bits_is_an_error() -> None:
    with pytest.raises(ClusterError, match="no kernel"):
        card_of("card", "model", timed("16x16", seconds=rounds, problem="no kernel"), SHAPES)


def test_products_are_those_of_the_plan(make_model: Any) -> None:
    plan = build_plan(make_model("qwen3_moe"), resolve_formats(["wint8_aint8"], device="cpu"))
    products, counts = products_of(plan, (1, 4))
    total = sum(m.num_elements for group in plan.groups for m in group.modules if not m.is_cache)
    assert sum(n * num_out * num_in for (num_out, num_in), n in counts.items()) == total
    assert {product.pair for product in products} == {"16x16", "int8xint8"}
    assert len(products) == 2 * 2 * len(counts)


@pytest.mark.parametrize("family", ["Nemotron-H", "Qwen3-VL"])
def test_products_are_those_of_a_decode_step(family: str) -> None:
    """Convolutions multiply no matrices, and a vision tower does not run while text is decoded."""
    model = family_model(family)
    _, counts = products_of(build_plan(model, resolve_formats(["wint8_aint8"], device="cpu")), (1,))
    expected: Counter[tuple[int, ...]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "visual" not in name:
            expected[tuple(module.weight.shape)] += 1
        if name.endswith("mixer.experts"):
            for weights in module.parameters():
                expected[tuple(weights.shape[1:])] += len(weights)
    assert counts == expected
    convolutions = (torch.nn.Conv1d, torch.nn.Conv3d)
    assert any(isinstance(module, convolutions) for module in model.modules())


def test_every_pair_runs_on_the_cpu_or_says_why_not() -> None:
    pairs = ("16", "16"), ("int8", "int8"), ("int8", "16"), ("int4", "16"), ("fp4", "16")
    products = [
        Product(weight=w, activation=a, tokens=2, out_features=64, in_features=128, group=64)
        for w, a in pairs
    ]
    name, results = time_products(products, device="cpu", num_threads=1, num_rounds=3)
    assert "1 thread(s), torch 2" in name
    *measured, missing = results
    assert [len(entry.seconds) for entry in measured] == [3, 3, 3, 3]
    assert all(seconds > 0 for entry in measured for seconds in entry.seconds)
    assert [entry.weight_bytes for entry in measured] == [16384, 8192, 8192, 4096]
    assert missing.problem == "torch has no kernel for fp4x16"


def test_spread_is_that_of_the_quartiles() -> None:
    assert spread_of([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread_of([7.0]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--batch", "8"), "two different numbers of tokens"),
        (("--batch", "0,8"), "from 1 to 1048576"),
        (("--batch", "a,8"), "--batch"),
        (("--rounds", "1"), "--rounds"),
        (("--cpus-per-worker", "0"), "--cpus-per-worker"),
    ],
)
def test_wrong_options_are_refused(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    line = refusal(run("measure-latency", "model", *words, "--out", tmp_path / "out"))
    assert text in line
    assert not (tmp_path / "out").exists()


def test_file_of_a_card_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    content = card_of("card", "model", timed("16x16", seconds=rounds), SHAPES)
    path.write_text(yaml.safe_dump(content))
    hardware = load_hardware(str(path))
    assert hardware == Hardware.model_validate(content)
    json.dumps(hardware.model_dump(mode="json"))


def test_defaults_are_valid() -> None:
    assert LatencyMeasurement(model="m").batch == (1, 16, 256)
