"""The doctor's table: what works, what does not, and the exit code that says so."""

from __future__ import annotations

import importlib.metadata as metadata
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import NO_CLUSTER, refusal, run


def findings(*arguments: Any) -> dict[str, tuple[str, str]]:
    """Check -> state and text; Ray, which is not there, is wrong in all of these."""
    done = run("doctor", "--address", NO_CLUSTER, "--json", *arguments)
    assert done.exit_code == 2, done.output
    rows = {row["check"]: (row["state"], row["text"]) for row in json.loads(done.stdout)}
    state, text = rows.pop("Ray")
    assert state == "wrong"
    assert "127.0.0.1:9" in text
    assert "cannot be reached" in text
    return rows


def test_environment_of_the_tests_is_well() -> None:
    rows = findings()
    assert rows["Versions"][0] == "ok"
    for name in ("torch", "ray", "nvidia-modelopt"):
        assert f"{name} {metadata.version(name)}" in rows["Versions"][1]
    assert {"Python", "Memory", "Disk"} <= set(rows)
    assert "wrong" not in {state for state, _ in rows.values()}


def test_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "1.0" if n == "torch" else version(n))
    state, text = findings()["Versions"]
    assert state == "wrong"
    assert text.startswith("torch 1.0, needs torch>=")


def test_model_data_and_engine_are_tried(model_folder: Any, text_file: Path) -> None:
    folder = model_folder("qwen3")
    rows = findings(
        *("--model", folder, "--data", text_file, "--engine", "vllm", "--gpu", "hopper")
    )
    plan = json.loads(run("plan", folder, "--formats", "wint8_afp16", "--json").stdout)
    searched = {row["group"] for row in plan["groups"] if row["is_searched"]}
    assert rows["Model"][0] == "ok"
    assert rows["Model"][1].startswith(f"{len(searched)} groups to search")
    assert rows["Data"] == ("ok", f"{text_file} can be read; first sample: a text")
    assert rows["Engine"][1].endswith("(--formats vllm-hopper)")
    assert "wfp8_afp8" in rows["Engine"][1]


def test_gpu_without_an_engine_is_refused() -> None:
    line = refusal(run("doctor", "--gpu", "hopper", "--address", NO_CLUSTER))
    assert "--gpu hopper needs an engine; give --engine vllm, sglang, trtllm" in line


def test_what_is_missing_is_wrong_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    rows = findings("--model", tmp_path / "none", "--data", empty)
    assert rows["Model"][0] == rows["Data"][0] == "wrong"
    assert "none does not exist" in rows["Model"][1]
    assert "empty.jsonl" in rows["Data"][1]


def test_table_fits_into_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    done = run("doctor", "--address", NO_CLUSTER)
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:2] == ["Ray", "wrong"] for line in lines)
