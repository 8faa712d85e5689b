"""Dropped fits of weights, on a local disk and in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore

from autoquant_ray.errors import ChangedError, StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import ROUNDING, part_name
from autoquant_ray.runs.rounding import drop_rounding, dropped_formats, require_rounding
from autoquant_ray.runs.state import RunState

FORMATS = ("wint4_afp16:max", "wint4_afp16:weighted", "wint4_afp16:gptq", "wfp8_afp16")
FITTED = list(FORMATS[1:3])


def with_fits(directory: RunDirectory) -> RunState:
    """The run after its stage ``fit``."""
    state = RunState.open(directory)
    with state.stage("fit", "mark"):
        for layer in (0, 1):
            directory.write_table(part_name(ROUNDING, layer), [])
        directory.write_table("rounding.parquet", [])
    return state


def copied(source: RunDirectory, target: RunDirectory) -> RunDirectory:
    for name in source.list_files(""):
        target.write_bytes(name, source.read_bytes(name))
    return target


@pytest.mark.parametrize("is_remote", [False, True])
def test_drop_deletes_the_fits_and_no_more(
    is_remote: bool, make_run: Any, store: ObjectStore
) -> None:
    directory = make_run(formats=FORMATS)
    if is_remote:
        directory = copied(directory, RunDirectory(store.uri("run")))
    before = set(directory.list_files(""))
    drop_rounding(RunState.open(directory))  # never fitted: nothing to drop
    state = with_fits(directory)
    assert dropped_formats(state) == []
    require_rounding(state, FORMATS)
    drop_rounding(state)
    state = RunState.open(RunDirectory(directory.uri))
    assert set(directory.list_files("")) - {"events.jsonl"} == before - {"events.jsonl"}
    assert directory.list_parts(ROUNDING) == []
    assert dropped_formats(state) == FITTED
    require_rounding(state, ["none", FORMATS[0], FORMATS[3]])
    with pytest.raises(StoreError, match=r"`keep_rounded` no, which .* in wint4_afp16:gptq; scan"):
        require_rounding(state, ["none", "wint4_afp16:gptq"])


def test_lost_fits_are_not_called_dropped(make_run: Any) -> None:
    state = with_fits(make_run(formats=FORMATS))
    Path(state.directory.path("rounding.parquet")).unlink()
    assert dropped_formats(state) == []


def test_fits_are_not_made_again_by_another_version(make_run: Any) -> None:
    """A finished run is read by any version; a dropped one only where nothing is fitted."""
    from autoquant_ray.config.scan import ScanConfig

    state = with_fits(make_run(formats=FORMATS))
    record = state.record
    assert record.versions is not None
    record.versions["torch"] = "1.0"
    config = ScanConfig(**state.config)
    identity = {"fingerprints": record.fingerprints}
    state.save()
    RunState.start(state.directory, config, "resume", identity)
    drop_rounding(state)
    kept, dropped = (config.model_copy(update={"keep_rounded": k}) for k in (True, False))
    RunState.start(state.directory, dropped, "resume", identity)
    with pytest.raises(ChangedError, match=r"was started with torch 1\.0"):
        RunState.start(state.directory, kept, "resume", identity)
