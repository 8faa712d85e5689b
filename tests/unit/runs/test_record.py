"""The record of a run: what is written is what was read, in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from records import make_record
from scored_run import put_scored_run

from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.record import RunRecord
from autoquant_ray.runs.state import RunState


def test_run_that_is_opened_and_saved_keeps_every_byte(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", later_version={"a": [1, None]}, weights={})
    before = directory.read_bytes("run.json")
    assert b'"later_version"' in before
    RunState.open(directory).save()
    assert directory.read_bytes("run.json") == before


def test_entries_that_do_not_apply_are_absent_and_a_missing_config_is_null() -> None:
    content = make_record(config=None).to_json()
    assert content["config"] is None
    assert not {"plan", "weights", "stopping", "used", "imported_from", "created"} & set(content)


def test_new_entries_come_last_in_the_order_in_which_they_were_written() -> None:
    record = make_record(used={"num_shards": 1, "num_samples": 2, "num_tokens": 3})
    before = list(record.to_json())
    stopping: Any = {"threshold": 0.1}
    record.stopping = stopping
    assert list(record.to_json()) == [*before, "stopping"]
    record.stopping = None
    assert list(record.to_json()) == before
    record.weights = {"group": "3f"}
    record.to_json()
    record.stopping = stopping
    assert list(record.to_json()) == [*before, "weights", "stopping"]


def test_file_that_lacks_a_key_is_damaged_and_the_error_names_it() -> None:
    values = make_record().to_json()
    del values["dataset"], values["stages"]
    with pytest.raises(StoreError, match=r"^RUN/run\.json is damaged: it lacks \['dataset', 'sta"):
        RunRecord.from_json(values, "RUN/run.json")


def test_scan_without_a_plan_is_unfinished_and_an_imported_run_has_no_config(
    tmp_path: Path,
) -> None:
    directory = RunDirectory(str(tmp_path))
    directory.write_text("run.json", json.dumps(make_record(config=None).to_json()))
    state = RunState.open(directory)
    with pytest.raises(StoreError, match="has no plan yet; finish the scan with `resume`"):
        _ = state.plan
    with pytest.raises(StoreError, match="was imported"):
        _ = state.config
