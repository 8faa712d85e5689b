"""Time of a decode step as a budget, against every allocation there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from step_by_hand import FORMATS, card, step_ms, times_sizes_losses

from autoquant_ray.allocate.load import Latency, latency_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun, solution_options
from autoquant_ray.allocate.search import search
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.swaps import Swaps
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("llama", 48), ("qwen3_moe", 4)])
@pytest.mark.parametrize("with_bytes", [False, True])
def test_limits_on_time_and_bytes_give_the_best_allocation(
    family: str, batch: int, with_bytes: bool, make_run: Any
) -> None:
    directory = make_run(family, formats=FORMATS)
    # 24 operations in the time of a byte: at batch 48 FP8 computes and INT4 reads fewer bytes.
    latency = Latency(hardware=card(1e9, _16x16=48e9, fp8xfp8=96e9), batch=batch, context=64)
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    times, sizes, losses = times_sizes_losses(directory, latency)
    for share in (0.02, 0.3, 0.55, 0.9):
        limit_ms = times.min() + share * (times.max() - times.min())
        limit_bytes = round(sizes.min() + (1.02 - share) * (sizes.max() - sizes.min()))
        is_within = times <= limit_ms * (1 + 1e-12)
        if with_bytes:
            is_within &= sizes <= limit_bytes
        within = losses[is_within].tolist()
        options = SolveOptions(
            bytes=limit_bytes if with_bytes else None,
            latency=dataclasses.replace(latency, ms_per_token=float(limit_ms)),
        )
        if not within:
            with pytest.raises(InfeasibleBudgetError):
                search(problem, scores, options)
            continue
        solution = solve_run(directory, options)
        assert solution.summary["predicted_kl_nats"] == pytest.approx(min(within), rel=1e-9)
        prediction = solution.summary["latency"]
        assert prediction["ms_per_token"] <= limit_ms * (1 + 1e-9)
        recomputed = step_ms(directory, solution.formats, latency)
        assert prediction["ms_per_token"] == pytest.approx(recomputed, rel=1e-9)


def test_throughput_counts_the_whole_batch(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    hardware = card(1e9, _16x16=48e9, fp8xfp8=96e9)
    fast = solve_run(directory, SolveOptions(bits=8, latency=Latency(hardware=hardware, batch=8)))
    speed = fast.summary["latency"]
    assert speed["tokens_per_second"] == pytest.approx(8000 / speed["ms_per_token"])
    by_speed, by_time = (
        solve_run(directory, SolveOptions(latency=Latency(hardware=hardware, batch=8, **limit)))
        for limit in (
            {"tokens_per_second": speed["tokens_per_second"] * (1 - 1e-9)},
            {"ms_per_token": speed["ms_per_token"] * (1 + 1e-9)},
        )
    )
    assert by_speed.formats == by_time.formats
    assert by_speed.summary["latency"]["tokens_per_second"] >= speed["tokens_per_second"] * 0.999999


def test_without_a_limit_the_allocation_is_that_of_the_other_budget(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    plain = solve_run(directory, SolveOptions(bits=7))
    timed = solve_run(directory, SolveOptions(bits=7, latency=latency_of("h100")))
    assert timed.formats == plain.formats
    assert "latency" not in plain.summary
    assert {plain.name, timed.name} >= {"bits-7.00"}
    assert timed.name != plain.name


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"ms_per_token": 1e-9}, r"`ms_per_token` 1e-09 on NVIDIA H100 SXM .* reachable is "),
        ({"tokens_per_second": 1e12}, r"`tokens_per_second` 1e\+12 on .* tokens per second"),
    ],
)
def test_speed_that_cannot_be_reached_names_the_range(
    limit: dict[str, float], words: str, make_run: Any
) -> None:
    directory = make_run(formats=FORMATS)
    with pytest.raises(InfeasibleBudgetError, match=words) as caught:
        solve_run(directory, SolveOptions(latency=latency_of("h100", batch=3, **limit)))
    low, high = str(caught.value).partition("reachable is ")[2].split(" ")[:3:2]
    assert float(low) < float(high)
    name = next(iter(limit))
    best = float(low) if name == "ms_per_token" else float(high)
    solution = solve_run(
        directory, SolveOptions(latency=latency_of("h100", batch=3, **{name: best}))
    )
    assert solution.summary["is_satisfied"]
    beyond = best * (0.998 if name == "ms_per_token" else 1.002)
    with pytest.raises(InfeasibleBudgetError):
        solve_run(directory, SolveOptions(latency=latency_of("h100", batch=3, **{name: beyond})))


def test_solution_keeps_the_card_and_the_load(make_run: Any, tmp_path: Path) -> None:
    directory = make_run(formats=FORMATS)
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(card(1e9, _16x16=48e9).model_dump(exclude_none=True)))
    latency = latency_of(str(path), batch=2, context=32, ms_per_token=0.2)
    solution = solve_run(directory, SolveOptions(bytes=200_000, latency=latency))
    path.unlink()
    start = f"solutions/{solution.name}/"
    state = RunState.open(directory)
    options = solution_options(state, start)
    assert options.latency == latency
    assert options.bytes == 200_000
    candidates = collect_candidates(
        ScoredRun.read(state), start, ("uniform", "modelopt", "random"), num_random=3
    )
    assert candidates[0].formats.items() <= solution.formats.items()
    assert len(candidates) >= 1 + 1 + 3
    for candidate in candidates:
        assert step_ms(directory, candidate.formats, _without_fp8(latency)) <= 0.2 * (1 + 1e-9)
    scored_run = ScoredRun.read(state)
    problem, scores = scored_run.problem, scored_run.scores
    swaps = Swaps(problem.timed(options.latency), scores, options)
    formats = candidates[0].formats
    assert swaps.fits(formats)
    tried = list(swaps.proposals(formats))
    assert tried
    for change in tried:
        changed = {**formats, **dict(change)}
        assert step_ms(directory, changed, _without_fp8(latency)) <= 0.2 * (1 + 1e-9)


def _without_fp8(latency: Latency) -> Latency:
    """The same card with the rate at which it runs FP8 written out: the 16-bit one."""
    rate = latency.hardware.rate("16", "16")
    hardware = card(latency.hardware.bytes_per_second(), _16x16=rate, fp8xfp8=rate)
    return dataclasses.replace(latency, hardware=hardware)


def test_names_differ_by_card_load_and_speed(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    loads: list[dict[str, Any]] = [{}, {"batch": 2}, {"context": 7}, {"ms_per_token": 1}]
    loads += [{"tokens_per_second": 9}]
    options = [SolveOptions(bits=8, latency=latency_of("h100", **load)) for load in loads]
    options += [SolveOptions(bits=8, latency=latency_of("a100")), SolveOptions(bits=8)]
    names = [solve_run(directory, solve_options).name for solve_options in options]
    assert len(set(names)) == len(options)
    assert names[-1] == "bits-8.00"
    assert names[3].startswith("bits-8.00-ms-1-")
    assert names[4].startswith("bits-8.00-tps-9-")


def test_three_limits_at_once_give_the_best_allocation(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    latency = Latency(hardware=card(1e9, _16x16=48e9, fp8xfp8=96e9), batch=48, context=8)
    times, sizes, losses = times_sizes_losses(directory, latency)
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    weights = sum(g.num_weights for g in problem.searched)
    outside = problem.other_bytes + sum(g.cost(NONE, "storage") for g in problem.unsearched)
    for bits, byte_share, time_share in ((9, 0.5, 0.4), (7, 0.4, 0.5), (8, 0.9, 0.3)):
        limit_bytes = round(sizes.min() + byte_share * (sizes.max() - sizes.min()))
        limit_ms = float(times.min() + time_share * (times.max() - times.min()))
        is_within = (times <= limit_ms) & (sizes <= limit_bytes)
        is_within &= (sizes - outside) * 8 / weights <= bits
        limited = dataclasses.replace(latency, ms_per_token=limit_ms)
        options = SolveOptions(bits=bits, bytes=limit_bytes, latency=limited)
        assert is_within.any()
        assert search(problem, scores, options).score == pytest.approx(
            losses[is_within].min(), rel=1e-9
        )


def test_imported_or_earlier_run_is_refused(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    values = directory.read_json("run.json")
    del values["plan"]["step"]
    directory.write_json("run.json", values)
    solve_run(directory, SolveOptions(bits=8))
    with pytest.raises(ConfigError, match="made by an earlier version"):
        solve_run(directory, SolveOptions(bits=8, latency=latency_of("h100")))


def test_card_without_a_load_is_refused() -> None:
    with pytest.raises(ConfigError, match="latency_of"):
        SolveOptions(bits=6, latency="h100")  # type: ignore[arg-type]
