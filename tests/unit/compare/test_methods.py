"""A name that is rounded by another method since is a change of the formats."""

from __future__ import annotations

from pathlib import Path

from scored_run import put_scored_run

from autoquant_ray.compare.run_changes import find_changes
from autoquant_ray.runs.record import RunRecord
from autoquant_ray.runs.state import RunState

FORMATS = ("wint4_afp16", "wint8_afp16", "wint4_afp16:weighted")


def record(folder: Path, formats: tuple[str, ...] = FORMATS, *, is_old: bool = False) -> RunRecord:
    directory = put_scored_run(folder, formats=formats, num_layers=1)
    values = directory.read_json("run.json")
    if is_old:
        values["plan"]["formats"][0].pop("algorithm")
    directory.write_json("run.json", values)
    return RunState.open(directory).record


def test_default_method_of_another_version_is_named(tmp_path: Path) -> None:
    old, new = record(tmp_path / "old", is_old=True), record(tmp_path / "new")
    (change,) = find_changes(old, new)
    assert (change.kind, str(change)) == ("formats", "rounding of wint4_afp16 max -> weighted")
    assert find_changes(new, record(tmp_path / "again")) == []


def test_formats_of_one_run_only_have_no_method_that_changed(tmp_path: Path) -> None:
    old = record(tmp_path / "old", ("wint8_afp16",))
    (change,) = find_changes(old, record(tmp_path / "new"))
    assert change.name == "menu"
