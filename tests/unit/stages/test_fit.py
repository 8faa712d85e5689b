"""The stage that fits scales on files: in any order, killed, resumed, lost; and used everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_pool import Killed, Pool

from autoquant_ray.calibrate.files import calibration_of
from autoquant_ray.errors import DataError, StoreError
from autoquant_ray.quantize.calibration import FittedCodes, FittedWeight
from autoquant_ray.quantize.quantizers import fake_quantize_weight, quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import ROUNDING, SAMPLES, part_name
from autoquant_ray.runs.rounding import drop_rounding
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.calibrate import calibrate, is_calibrated
from autoquant_ray.stages.fit import fit, halves_of

FORMATS = (
    "wint4_afp16:max",
    "wint4_g32_afp16:weighted",
    "wint8_afp16:weighted",
    "wint8_aint8:weighted",
    "wint4_g64_afp16:gptq",
    "wfp8_afp8:gptq",
)
NUM_SHARDS, NUM_PARTS = 2, 3
PARTS = list(range(NUM_PARTS))


@pytest.fixture(params=["llama", "qwen3_moe"])
def started(request: Any, make_run: Any, make_scorer: Any, make_samples: Any) -> Any:
    """A run directory with samples and no more; returns its state, its plan and a scorer."""
    prepared = make_scorer(request.param, FORMATS)

    def start(name: str) -> tuple[RunState, Any, Any]:
        directory = make_run(request.param, formats=FORMATS, name=name, num_shards=NUM_SHARDS)
        for shard in range(NUM_SHARDS):
            rows = [{"sample": shard, "tokens": make_samples([160], seed=shard)[0]}]
            directory.write_table(part_name(SAMPLES, shard), rows)
        return RunState.open(directory), prepared.plan, prepared.scorer

    return start


def run_stages(state: RunState, plan: Any, scorer: Any, pool: Any = None) -> Any:
    calibration = calibrate(state, Pool(scorer), plan, "mark")  # type: ignore[arg-type]
    return fit(state, pool or Pool(scorer), plan, calibration, "mark")


def test_files_are_the_same_in_any_order_of_arrival_and_after_a_kill(started: Any) -> None:
    state, plan, scorer = started("whole")
    run_stages(state, plan, scorer)
    expected = state.directory.read_bytes("rounding.parquet")
    assert state.directory.list_parts(ROUNDING) == PARTS

    state, plan, scorer = started("mixed")
    run_stages(state, plan, scorer, Pool(scorer, last_first=True))
    assert state.directory.read_bytes("rounding.parquet") == expected

    state, plan, scorer = started("killed")
    with pytest.raises(Killed):
        run_stages(state, plan, scorer, Pool(scorer, dies_after=2))
    assert not state.directory.exists("rounding.parquet")
    Path(state.directory.path(part_name(ROUNDING, 0))).write_bytes(b"PAR1 cut off")
    resumed = Pool(scorer)
    run_stages(RunState.open(state.directory), plan, scorer, resumed)
    assert resumed.done == [0, 2]
    assert state.directory.read_bytes("rounding.parquet") == expected


def test_lost_file_is_missed_and_made_again_from_the_parts(started: Any) -> None:
    state, plan, scorer = started("run")
    run_stages(state, plan, scorer)
    expected = state.directory.read_bytes("rounding.parquet")
    assert is_calibrated(state, plan)
    path = Path(state.directory.path("rounding.parquet"))
    for content in (None, expected[:-30]):
        path.unlink() if content is None else path.write_bytes(content)
        assert not is_calibrated(state, plan)
        with pytest.raises(StoreError, match=r"rounding.parquet is lost or damaged.*`resume`"):
            calibration_of(state)
        again = Pool(scorer)
        run_stages(state, plan, scorer, again)
        assert again.done == []
        assert state.directory.read_bytes("rounding.parquet") == expected


def files_of(state: RunState) -> list[str]:
    """The fitted weights of a run, as files."""
    parts = [part_name(ROUNDING, layer) for layer in state.directory.list_parts(ROUNDING)]
    return [*parts, *(["rounding.parquet"] if state.directory.exists("rounding.parquet") else [])]


def test_dropped_fit_is_refused_with_the_remedy_and_made_again(started: Any) -> None:
    state, plan, scorer = started("run")
    run_stages(state, plan, scorer)
    expected = state.directory.read_bytes("rounding.parquet")
    calibration = calibration_of(state)
    drop_rounding(state)
    state = RunState.open(state.directory)
    assert files_of(state) == []
    assert not Path(state.directory.path(ROUNDING)).exists()
    assert not is_calibrated(state, plan)
    assert is_calibrated(state, plan, has_rounding=False)
    with pytest.raises(StoreError) as refused:
        calibration_of(state)
    assert "scanned with `keep_rounded` no" in str(refused.value)
    assert "in wint4_g32_afp16:weighted; scan again with `resume`" in str(refused.value)
    assert len(str(refused.value)) < 400
    left = calibration_of(state, ["wint4_afp16:max", "none"])
    assert left.rounding == {}
    assert left.modules.keys() == calibration.modules.keys()
    again = Pool(scorer)
    run_stages(state, plan, scorer, again)
    assert again.done != []
    assert state.directory.read_bytes("rounding.parquet") == expected
    assert calibration_of(state).rounding.keys() == calibration.rounding.keys()
    assert not state.has_dropped_rounding


@pytest.mark.parametrize("num_deleted", range(NUM_PARTS + 1))
def test_drop_that_is_killed_is_finished_or_taken_back(
    num_deleted: int, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, plan, scorer = started("run")
    run_stages(state, plan, scorer)
    expected = state.directory.read_bytes("rounding.parquet")
    deleted: list[str] = []

    def delete(name: str) -> None:
        if len(deleted) == num_deleted:
            raise Killed
        deleted.append(name)
        Path(state.directory.path(name)).unlink()

    monkeypatch.setattr(state.directory, "delete", delete)
    with pytest.raises(Killed):
        drop_rounding(state)
    kept = len(files_of(state))
    assert kept == NUM_PARTS + 1 - num_deleted

    state = RunState.open(RunDirectory(state.directory.uri))
    pool = Pool(scorer)
    run_stages(state, plan, scorer, pool)
    assert state.directory.read_bytes("rounding.parquet") == expected
    assert state.directory.list_parts(ROUNDING) == PARTS
    assert bool(pool.done) == (num_deleted > 0)

    drop_rounding(state)
    assert files_of(state) == []
    drop_rounding(state)


def test_scores_are_those_of_a_search_in_every_worker(started: Any, make_samples: Any) -> None:
    """What was fitted once is what each use would find; and it is used, not found again."""
    state, plan, scorer = started("run")
    fitted = run_stages(state, plan, scorer)
    statistics = calibrate(state, Pool(scorer), plan, "mark")  # type: ignore[arg-type]
    object.__setattr__(statistics, "rounding", {})
    samples = make_samples([24])
    searched = [not name.endswith(":gptq") for name in FORMATS]
    scores = [
        scorer.score(samples, 0, calibration).sums.elementwise_GF[:, searched]
        for calibration in (fitted, statistics)
    ]
    assert np.array_equal(*scores)
    moved = {
        key: FittedWeight(multipliers=np.zeros_like(fit.multipliers))
        for key, fit in fitted.rounding.items()
        if fit.multipliers is not None
    }
    object.__setattr__(fitted, "rounding", moved)
    changed = scorer.score(samples, 0, fitted).sums.elementwise_GF[:, searched]
    is_fitted = [":" in name for name in FORMATS if not name.endswith(":gptq")]
    assert (changed[:, is_fitted] != scores[0][:, is_fitted]).any()
    assert np.array_equal(changed[:, 0], scores[0][:, 0])


def test_formats_that_round_a_weight_alike_share_what_was_fitted(started: Any) -> None:
    state, plan, scorer = started("run")
    run_stages(state, plan, scorer)
    table = state.directory.read_table("rounding.parquet")
    assert set(table.column("format").to_pylist()) == {*FORMATS[1:3], *FORMATS[4:]}
    calibration = calibration_of(state)
    name = "model.layers.0.self_attn.q_proj"
    weight = scorer.model.get_submodule(name).weight
    scales = WeightScales(scorer.model, calibration)
    int8, both = (quantized_weight(f, weight, scales, name) for f in plan.formats[2:4])
    assert torch.equal(int8, both)
    assert not torch.equal(int8, fake_quantize_weight(plan.formats[2].weight, weight))


def test_shard_is_scored_under_the_rounding_that_has_not_seen_it(
    started: Any, make_samples: Any
) -> None:
    """Roundings of the same half and of all data may be anything; measurements take the last."""
    state, plan, scorer = started("run")
    fitted = run_stages(state, plan, scorer)
    samples = make_samples([24])
    by_gptq = [name.endswith(":gptq") for name in FORMATS]

    def spoilt(*places: int | None) -> Any:
        """The calibration with zeros in place of roundings without these halves, None: of all."""

        def spoil(codes: FittedCodes) -> FittedCodes:
            without = [np.zeros_like(c) if n in places else c for n, c in enumerate(codes.without)]
            whole = np.zeros_like(codes.whole) if None in places else codes.whole
            return FittedCodes(damping=codes.damping, whole=whole, without=tuple(without))

        rounding = {
            key: fit if fit.codes is None else FittedWeight(codes=spoil(fit.codes))
            for key, fit in fitted.rounding.items()
        }
        return replace(fitted, rounding=rounding)

    def scores(calibration: Any, shard: int | None) -> Any:
        return scorer.score(samples, 0, calibration, shard).sums.elementwise_GF

    assert any(fit.codes is not None for fit in fitted.rounding.values())
    for shard in (0, 1):
        assert np.array_equal(scores(spoilt(None, 1 - shard), shard), scores(fitted, shard))
        changed = scores(spoilt(shard), shard) != scores(fitted, shard)
        assert changed[:, by_gptq].any()
        assert not changed[:, [not is_gptq for is_gptq in by_gptq]].any()
    assert (scores(spoilt(None), None) != scores(fitted, None))[:, by_gptq].any()


def test_halves_hold_every_domain(make_run: Any, make_scorer: Any, make_samples: Any) -> None:
    """Shards of domains take turns: the parity of their numbers would part them."""
    formats = ("wint4_afp16:gptq",)
    prepared = make_scorer("llama", formats)
    directory = make_run("llama", formats=formats, num_shards=5)
    domains = ["a", "b", "a", "b", "c"]
    rows = [
        {"shard": shard, "domain": domain, "num_samples": 1, "num_tokens": 24}
        for shard, domain in enumerate(domains)
    ]
    directory.write_table("domains.parquet", rows)
    for shard in range(5):
        sample = {"sample": shard, "tokens": make_samples([24], seed=shard)[0]}
        directory.write_table(part_name(SAMPLES, shard), [sample])
    state = RunState.open(directory)
    assert halves_of(state) == {0: 0, 1: 0, 2: 1, 3: 1, 4: 0}
    fitted = run_stages(state, prepared.plan, prepared.scorer)
    assert [fitted.for_shard(shard).unseen_half for shard in range(5)] == [0, 0, 1, 1, 0]
    assert fitted.for_shard(None).unseen_half is None
    Path(directory.path("domains.parquet")).unlink()
    assert halves_of(state) == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}


def test_single_shard_is_refused_in_one_line(
    make_run: Any, make_scorer: Any, make_samples: Any
) -> None:
    formats = ("wint4_afp16:max", "wint4_afp16:gptq")
    prepared = make_scorer("llama", formats)
    directory = make_run("llama", formats=formats, num_shards=1)
    rows = [{"sample": 0, "tokens": make_samples([24])[0]}]
    directory.write_table(part_name(SAMPLES, 0), rows)
    with pytest.raises(
        DataError, match=r"wint4_afp16:gptq needs two shards of one kind of data.*1 shard"
    ):
        run_stages(RunState.open(directory), prepared.plan, prepared.scorer)
    assert not directory.exists("rounding.parquet")


def test_layers_that_are_fitted_together_change_no_byte(started: Any) -> None:
    state, plan, scorer = started("together")
    pool = Pool(scorer)
    pool.num_workers = 1
    run_stages(state, plan, scorer, pool)
    assert pool.done == [0]
    expected = state.directory.read_bytes("rounding.parquet")
    state, plan, scorer = started("apart")
    pool = Pool(scorer)
    pool.num_workers = NUM_PARTS
    run_stages(state, plan, scorer, pool)
    assert pool.done == PARTS
    assert state.directory.read_bytes("rounding.parquet") == expected


@pytest.mark.parametrize(("num_tokens", "is_few"), [(319, True), (320, False)])
def test_few_tokens_are_logged(
    num_tokens: int,
    is_few: bool,
    make_run: Any,
    make_scorer: Any,
    make_samples: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The widest input of the model has 160 channels."""
    formats = ("wint4_afp16:gptq",)
    prepared = make_scorer("llama", formats)
    directory = make_run("llama", formats=formats, num_shards=NUM_SHARDS)
    for shard, length in enumerate((300, num_tokens - 300 + 320)):
        rows = [{"sample": shard, "tokens": make_samples([length], seed=shard)[0]}]
        directory.write_table(part_name(SAMPLES, shard), rows)
    run_stages(RunState.open(directory), prepared.plan, prepared.scorer)
    text = f"{num_tokens + 320} tokens are few for GPTQ on inputs of 160 channels"
    assert (text in caplog.text) == is_few
