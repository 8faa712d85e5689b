"""The stages before scores on files, with workers that are this process: killed, resumed, mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stage_pool import Killed, Pool

from autoquant_ray.calibrate.files import calibration_of, read_calibration
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import CHANNELS, SAMPLES, part_name
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.calibrate import calibrate, is_calibrated, search_scales

AWQ = "wint4_g32_afp16:awq"
FORMATS = ("INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "NVFP4_AWQ_LITE_CFG", "wint8_afp16", AWQ)
NUM_SHARDS = 4


@pytest.fixture
def started(make_run: Any, make_scorer: Any, make_samples: Any) -> Any:
    """A run directory with samples and no more; returns its state, its plan and a scorer."""
    prepared = make_scorer("llama", FORMATS)

    def start(name: str) -> tuple[RunState, Any, Any]:
        directory = make_run(formats=FORMATS, name=name, num_shards=NUM_SHARDS, disable=())
        for shard in range(NUM_SHARDS):
            rows = [
                {"sample": 2 * shard + n, "tokens": tokens}
                for n, tokens in enumerate(make_samples([20, 11], seed=shard))
            ]
            directory.write_table(part_name(SAMPLES, shard), rows)
        return RunState.open(directory), prepared.plan, prepared.scorer

    return start


def contents(directory: RunDirectory) -> dict[str, bytes]:
    names = ("calibration.parquet", "channels.parquet", "search.parquet")
    return {name: directory.read_bytes(name) for name in names}


def run_stages(state: RunState, plan: Any, *pools: Any) -> Any:
    calibration = calibrate(state, pools[0], plan, "mark")
    return search_scales(state, pools[-1], plan, calibration, "mark")


def test_files_are_the_same_in_any_order_of_arrival_and_after_a_kill(started: Any) -> None:
    state, plan, scorer = started("whole")
    run_stages(state, plan, Pool(scorer))
    expected = contents(state.directory)

    state, plan, scorer = started("mixed")
    run_stages(state, plan, Pool(scorer, last_first=True))
    assert contents(state.directory) == expected

    state, plan, scorer = started("killed")
    with pytest.raises(Killed):
        run_stages(state, plan, Pool(scorer, dies_after=3))
    calibrated = Pool(scorer)
    calibrate(state, calibrated, plan, "mark")
    assert calibrated.done == [3]
    with pytest.raises(Killed):
        run_stages(state, plan, calibrated, Pool(scorer, dies_after=2))
    assert not state.directory.exists("search.parquet")
    resumed = RunState.open(state.directory)
    searched = Pool(scorer)
    run_stages(resumed, plan, calibrated, searched)
    assert searched.done == [2, 3]
    assert calibrated.done == [3]
    assert contents(state.directory) == expected
    run_stages(resumed, plan, calibrated, searched)
    assert searched.done == [2, 3]


def test_damaged_part_of_channels_is_done_again(started: Any) -> None:
    state, plan, scorer = started("run")
    with pytest.raises(Killed):
        calibrate(state, Pool(scorer, dies_after=3), plan, "mark")  # type: ignore[arg-type]
    Path(state.directory.path(part_name(CHANNELS, 1))).write_bytes(b"PAR1 cut off")
    again = Pool(scorer)
    run_stages(state, plan, again, Pool(scorer))
    assert again.done == [1, 3]


def test_best_candidates_and_channels_are_read_back(started: Any) -> None:
    state, plan, scorer = started("run")
    calibration = run_stages(state, plan, Pool(scorer))
    name = "model.layers.0.mlp.down_proj"
    assert calibration.of(name).channels.num_tokens == NUM_SHARDS * 31
    assert 0 <= calibration.of(name).alphas["INT4_AWQ_CFG"] <= 1.1
    assert "INT8_SMOOTHQUANT_CFG" not in calibration.of(name).alphas
    gate, up = (calibration.of(f"model.layers.0.mlp.{part}_proj") for part in ("gate", "up"))
    assert gate.alphas[AWQ] == up.alphas[AWQ]
    assert AWQ not in calibration.of(name).alphas  # rows under NVFP4 may not be divided
    assert calibration_of(state).folds == calibration.folds == plan.folds
    assert calibration_of(state).of(f"{name[:-9]}up_proj").alphas == up.alphas
    names = state.directory.read_table("calibration.parquet").column("statistic")
    assert set(names.to_pylist()) == {"input_amax"}
    assert read_calibration(state.directory).modules.keys() == calibration.modules.keys()


@pytest.mark.parametrize("name", ["calibration.parquet", "channels.parquet", "search.parquet"])
def test_lost_file_is_missed_and_made_again_from_the_parts(name: str, started: Any) -> None:
    """Without it a format that scales channels would be measured with scales of 1."""
    state, plan, scorer = started("run")
    run_stages(state, plan, Pool(scorer))
    expected = contents(state.directory)
    assert is_calibrated(state, plan)
    calibration = read_calibration(state.directory)
    assert calibration_of(state).modules.keys() == calibration.modules.keys()

    path = Path(state.directory.path(name))
    for content in (None, path.read_bytes()[:-30]):
        path.unlink() if content is None else path.write_bytes(content)
        assert not is_calibrated(state, plan)
        with pytest.raises(StoreError, match=rf"{name} is lost or damaged.*`resume`"):
            calibration_of(state)
        again = Pool(scorer)
        run_stages(state, plan, again)
        assert again.done == []
        assert contents(state.directory) == expected


def test_shard_left_out_of_calibration_stays_out_once_others_are_used(started: Any) -> None:
    """Also where ``calibration.parquet`` was lost and making it again was interrupted."""
    state, _, _ = started("run")
    state.record.stages["calibrate"] = {"state": "stopped", "fingerprint": "mark"}
    state.quarantine(0, "calibrate", "odd")
    state.release_quarantine()
    assert state.left_out == {0}
    for shard in range(NUM_SHARDS):
        state.directory.delete(part_name("scores", shard))
    state.release_quarantine()
    assert state.left_out == set()
    state.quarantine(0, "calibrate", "odd")
    state.directory.write_table(part_name("rounding", 0), [])
    state.release_quarantine()
    assert state.left_out == {0}


def test_menu_without_such_formats_writes_no_such_files(started: Any, make_scorer: Any) -> None:
    state, _, _ = started("run")
    prepared = make_scorer("llama", ("wint8_aint8",))
    calibration = run_stages(state, prepared.plan, Pool(prepared.scorer))
    record = calibration.of("model.layers.0.mlp.down_proj")
    assert set(record.maxima) == {"input_amax"}
    assert record.channels is None
    assert not record.alphas
    assert not state.directory.exists("channels.parquet")
    assert not state.directory.exists("search.parquet")
    assert state.directory.list_parts(CHANNELS) == []
