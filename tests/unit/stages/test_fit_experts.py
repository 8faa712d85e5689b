"""The stage that fits scales, on routed experts: blocks smaller than a layer, and few tokens."""

from __future__ import annotations

from typing import Any

import pytest
from stage_pool import Pool

from autoquant_ray.calibrate.files import channels_of_table
from autoquant_ray.calibrate.portions import blocks_of, smallest_portions
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import changed_fields
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.quantizable import quantizable_modules
from autoquant_ray.quantize.calibration import can_be_halved
from autoquant_ray.runs.names import CHANNELS, SAMPLES, part_name
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.calibrate import calibrate
from autoquant_ray.stages.fit import fit

FORMATS = ("wfp8_afp8:gptq", "wint4_g32_afp16:weighted", "wint4_g64_afp16:gptq")
NUM_EXPERTS = 8


@pytest.fixture
def run_stages(make_run: Any, make_scorer: Any, make_samples: Any) -> Any:
    """Calibrate and fit a small Qwen3-MoE; returns the run's directory and what was fitted."""

    def run(name: str, lengths: tuple[int, int], **spec: Any) -> tuple[Any, Any]:
        prepared = make_scorer("qwen3_moe", FORMATS, **spec)
        directory = make_run("qwen3_moe", formats=FORMATS, name=name)
        for shard, length in enumerate(lengths):
            rows = [{"sample": shard, "tokens": make_samples([length], seed=shard)[0]}]
            directory.write_table(part_name(SAMPLES, shard), rows)
        state, pool = RunState.open(directory), Pool(prepared.scorer)
        calibration = calibrate(state, pool, prepared.plan, "mark")  # type: ignore[arg-type]
        return directory, fit(state, pool, prepared.plan, calibration, "mark")  # type: ignore[arg-type]

    return run


def experts_with_codes(calibration: Any) -> set[str]:
    return {
        f"{module}.{part.split('.')[1]}"
        for (module, part, _), fit in calibration.rounding.items()
        if part and fit.codes is not None
    }


def tokens_in(directory: Any, shard: int) -> dict[str, int]:
    """Routed expert -> tokens that it got in a shard."""
    channels = channels_of_table(directory.read_table(part_name(CHANNELS, shard))).channels()
    return {
        f"{module}.{part.split('.')[1]}": record.num_tokens
        for (module, part), record in channels.items()
        if part
    }


def test_any_memory_for_second_moments_gives_the_same_bytes(run_stages: Any) -> None:
    """From an expert at a time to all at once."""
    files = {
        room: run_stages(f"run-{room}", (200, 180), moment_bytes=room)[0].read_bytes(
            "rounding.parquet"
        )
        for room in (1, 400_000, 2**30)
    }
    assert len(set(files.values())) == 1


def test_blocks_hold_parts_of_a_layer(make_model: Any) -> None:
    """An expert's moments: inputs of 64 and 48 channels, two halves of float32."""
    planned = next(m for m in quantizable_modules(make_model("qwen3_moe")) if m.kind == "experts")
    formats = resolve_formats(FORMATS[:1], device="cpu")
    portions = list(smallest_portions(3, planned, None, formats))
    assert [portion.experts for portion in portions] == [(n,) for n in range(NUM_EXPERTS)]
    size = 2 * 4 * (64**2 + 48**2)
    for room, numbers in (
        (3 * size, [(0, 1, 2), (3, 4, 5), (6, 7)]),
        (3 * size - 1, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (1, [(n,) for n in range(NUM_EXPERTS)]),
        (2**30, [tuple(range(NUM_EXPERTS))]),
    ):
        blocks = blocks_of(portions, room)
        assert [portion.experts for block in blocks for portion in block] == numbers
        assert all(len(block) == 1 for block in blocks)


def test_experts_that_saw_few_tokens_keep_plain_rounding_and_are_logged(
    run_stages: Any, caplog: pytest.LogCaptureFixture
) -> None:
    directory, every = run_stages("all", (120, 110))
    caplog.clear()
    _, fitted = run_stages("some", (120, 110), min_expert_tokens=32)  # as the run's config has it
    counts = dict.fromkeys(
        (f"model.layers.{layer}.mlp.experts.{n}" for layer in (0, 1) for n in range(NUM_EXPERTS)), 0
    )
    for shard in (0, 1):
        counts.update({e: counts[e] + n for e, n in tokens_in(directory, shard).items()})
    few = {expert for expert, seen in counts.items() if seen < 32}
    assert 0 < len(few) < len(counts)
    assert few & experts_with_codes(every)
    assert experts_with_codes(fitted) == experts_with_codes(every) - few
    assert f"{len(few)} expert(s) saw fewer than 32 tokens (`min_expert_tokens`)" in caplog.text
    assert min(few) in caplog.text
    thin = f"of {len(counts)} expert(s) saw fewer than 256 tokens, 4 per input channel"
    assert f"{len(counts) - len(few)} {thin}" in caplog.text


def test_expert_without_tokens_in_a_half_keeps_plain_rounding(run_stages: Any) -> None:
    _, both = run_stages("both", (250, 200))
    directory, fitted = run_stages("one", (250, 3))
    reached = set(tokens_in(directory, 1))
    assert experts_with_codes(fitted) <= reached
    assert experts_with_codes(both) - reached
    assert can_be_halved([30, 2], 32)
    assert not can_be_halved([30, 1], 32)
    assert not can_be_halved([0, 99], 0)


@pytest.mark.parametrize(
    ("name", "is_used"), [("wint4_afp16:gptq", True), ("mine", True), ("wint4_afp16:max", False)]
)
def test_run_notices_another_least_number_of_tokens(name: str, is_used: bool) -> None:
    mine = {"mine": {"weight": {"num_bits": 8, "axis": 0}, "algorithm": {"method": "gptq"}}}
    config = ScanConfig(
        model="model",
        data="made-up.txt",
        out="run",
        formats=(name,),
        custom_formats=mine if name == "mine" else {},
        bits=8,
    )
    other = config.model_copy(update={"min_expert_tokens": 5})
    changes = changed_fields(config.model_dump(mode="json"), other)
    assert changes == (["min_expert_tokens: 32 -> 5"] if is_used else [])
