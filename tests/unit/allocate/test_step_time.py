"""Time of a decode step: traffic and operations by hand, routed experts by chance."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from step_by_hand import card

from autoquant_ray.allocate.cards import Hardware
from autoquant_ray.allocate.group_choices import GroupChoices
from autoquant_ray.allocate.latency import StepTime, numeric_class, touched_share
from autoquant_ray.allocate.load import Latency, four_digits, latency_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats

PLAN: dict[str, Any] = {
    "formats": [
        {"name": "int4", "weight": {"num_bits": 4}, "input": None},
        {"name": "fp8", "weight": {"num_bits": [4, 3]}, "input": {"num_bits": [4, 3]}},
        {"name": "fp8 weights", "weight": {"num_bits": [4, 3]}, "input": None},
        {"name": "int8", "weight": {"num_bits": 8}, "input": {"num_bits": 8}},
    ],
    "step": {
        "active_expert_ratio": 0.25,
        "other_bytes": 0,
        "other_expert_bytes": 0,
        "head": "head",
        "layers": 3,
        "attention": [],
    },
}


def group(**changes: Any) -> GroupChoices:
    """A group of 1e9 weights."""
    sizes = {"int4": 0.5e9, "fp8": 1e9, "fp8 weights": 1e9, "int8": 1e9, NONE: 2e9}
    values: dict[str, Any] = {
        "name": "g",
        "module_names": ["g"],
        "num_weights": 10**9,
        "is_searched": True,
        "is_tied": False,
        "is_idle": False,
        "active_share": 1.0,
        "rows": {name: {"weight_bytes": size} for name, size in sizes.items()},
    }
    return GroupChoices(**values | changes)


def step_time(batch: int = 1, context: int = 1, **facts: Any) -> StepTime:
    """1e12 bytes per second, 1e15 operations per second in 16 bits, twice that in FP8."""
    hardware = card(1e12, _16x16=1e15, fp8xfp8=2e15)
    plan = PLAN | {"step": PLAN["step"] | facts}
    return StepTime(Latency(hardware=hardware, batch=batch, context=context), plan)


@pytest.mark.parametrize(
    ("format_", "batch", "ms"),
    [
        (NONE, 1, 2.0),  # 2e9 bytes at 1e12 per second
        ("fp8", 1, 1.0),
        ("int4", 1, 0.5),
        (NONE, 4096, 8.192),  # 2 * 1e9 * 4096 operations at 1e15 per second
        ("fp8", 4096, 4.096),  # at twice the rate
        ("int4", 4096, 8.192),  # 16-bit activations: at the 16-bit rate
        ("fp8 weights", 4096, 8.192),
        ("int8", 4096, 8.192),  # the card has no units for it
        ("int8", 1, 1.0),  # but it reads fewer bytes
    ],
)
def test_group_takes_the_longer_of_traffic_and_operations(
    format_: str, batch: int, ms: float
) -> None:
    assert step_time(batch).group_ms(group(), format_) == pytest.approx(ms, rel=1e-12)


def test_achievable_share_lengthens_traffic_alone() -> None:
    hardware = card(1e12, _16x16=1e15)
    slow = hardware.model_dump() | {"bandwidth_share": {"value": 0.8, "source": "made up"}}
    for batch, ms in ((1, 2.5), (4096, 8.192)):
        latency = Latency(hardware=Hardware.model_validate(slow), batch=batch)
        assert StepTime(latency, PLAN).group_ms(group(), NONE) == pytest.approx(ms, rel=1e-12)


def test_routed_experts_scale_traffic_and_operations() -> None:
    experts = group(active_share=0.25)
    assert step_time(1).group_ms(experts, "fp8") == pytest.approx(0.25, rel=1e-12)
    assert step_time(2).group_ms(experts, "fp8") == pytest.approx(1 - 0.75**2, rel=1e-12)
    # 2 * 1e9 * 0.25 * 8000 operations at 2e15 per second
    assert step_time(8000).group_ms(experts, "fp8") == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(("experts", "visited", "tokens"), [(8, 2, 1), (8, 2, 3), (64, 6, 16)])
def test_touched_share_is_that_of_random_routers(experts: int, visited: int, tokens: int) -> None:
    random = np.random.default_rng(experts + tokens)
    num_trials = 4000
    drawn = random.random((num_trials, tokens, experts)).argsort(axis=2)[:, :, :visited]
    shares = [len(np.unique(trial)) / experts for trial in drawn]
    error = max(np.std(shares) / math.sqrt(num_trials), 1e-12)
    assert abs(np.mean(shares) - touched_share(visited / experts, tokens)) < 4 * error


def test_idle_group_takes_no_time_and_unknown_share_is_refused() -> None:
    assert step_time().group_ms(group(is_idle=True), NONE) == 0
    with pytest.raises(ConfigError, match="share of the experts of g"):
        step_time().group_ms(group(active_share=None), NONE)


def test_time_outside_the_groups() -> None:
    # Norms and routers: 1e6 bytes. Experts that no group holds: 4e9 bytes, of which a quarter.
    step = step_time(other_bytes=1e6, other_expert_bytes=4e9)
    assert step.other_ms == pytest.approx(1e-3 + 1.0, rel=1e-12)
    # 10 layers: 2 sequences of 1000 tokens, 4096 bytes each; 3 layers look back 100 tokens.
    attention = [
        {"layers": 10, "kv_bytes": 4096, "width": 4096, "window": None},
        {"layers": 3, "kv_bytes": 4096, "width": 4096, "window": 100},
    ]
    step = step_time(2, 1000, attention=attention)
    read = 10 * 2 * 1000 * 4096 + 3 * 2 * 100 * 4096
    assert step.other_ms == pytest.approx(1000 * read / 1e12, rel=1e-12)


def test_prefill_counts_every_token_but_one_for_the_head() -> None:
    head, body = group(name="head", module_names=["head"]), group()
    attention = [{"layers": 1, "kv_bytes": 1, "width": 10**6, "window": None}]
    step = step_time(2, 5000, attention=attention)
    prediction = step.prediction([head, body], {"head": NONE, "g": "fp8"})
    # Body 2e9 * 10000 / 2e15 s, head 2e9 bytes at 1e12, attention 4 * 2 * 5000 * 5001 / 2 * 1e6.
    by_hand = 10.0 + 2.0 + 1000 * 4 * 2 * 5000 * 5001 / 2 * 1e6 / 1e15
    assert prediction["prefill_ms"] == pytest.approx(by_hand, rel=1e-12)


def test_prediction_sums_groups_and_names_formats_without_units() -> None:
    groups = [group(name=name, module_names=[name]) for name in "abc"]
    prediction = step_time(4).prediction(groups, {"a": "int4", "b": "int8", "c": NONE})
    assert prediction["ms_per_token"] == pytest.approx(0.5 + 1.0 + 2.0, rel=1e-12)
    assert prediction["tokens_per_second"] == pytest.approx(4000 / 3.5, rel=1e-12)
    assert prediction["formats_without_units"] == ["int8"]
    assert prediction["kind"] == "roofline bound, not a measurement"
    assert prediction["uncounted_layers"] == 3


@pytest.mark.parametrize(
    ("value", "nearest", "up", "down"),
    [
        (12.3456, "12.35", "12.35", "12.34"),
        (0.0012341, "0.001234", "0.001235", "0.001234"),
        (1234567, "1235000", "1235000", "1234000"),
        (9.99999, "10.000", "10.000", "9.999"),
    ],
)
def test_numbers_are_told_with_four_digits(value: float, nearest: str, up: str, down: str) -> None:
    assert four_digits(value) == nearest
    assert four_digits(value, math.ceil) == up
    assert four_digits(value, math.floor) == down


def test_numeric_classes_of_the_menu() -> None:
    menu = {
        "wint4_afp16": ("int4", "16"),
        "wfp8_afp8": ("fp8", "fp8"),
        "wfp4_afp8": ("fp4", "fp8"),
        "wint8_aint8": ("int8", "int8"),
    }
    for format_ in resolve_formats(tuple(menu), device="cuda"):
        entry = json.loads(json.dumps(format_.to_json()))
        classes = numeric_class(entry["weight"]), numeric_class(entry["input"])
        assert classes == menu[format_.name]


def test_a_speed_has_one_name_however_it_is_written() -> None:
    whole = SolveOptions(latency=latency_of("h100", tokens_per_second=10))
    fraction = SolveOptions(latency=latency_of("h100", tokens_per_second=10.0))
    assert whole.name == fraction.name
