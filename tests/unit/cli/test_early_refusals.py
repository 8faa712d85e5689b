"""What is wrong is said at once, all of it, before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, run

from autoquant_ray.formats.menu import closest_formats, known_formats, require_names
from autoquant_ray.formats.preset_names import preset_names

HEAVY = ("torch", "ray", "modelopt", "transformers", "datasets", "scipy")
_IN_FRESH_PYTHON = f"""
import json, sys
from autoquant_ray.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([end.code, loaded]))
"""


def refused(*arguments: Any, folder: Path | None = None) -> str:
    """The line with which a fresh process refuses; that it imported nothing heavy is checked."""
    done = subprocess.run(
        [sys.executable, "-c", _IN_FRESH_PYTHON, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    assert json.loads(done.stdout) == [2, []]
    (line,) = done.stderr.splitlines()
    assert len(line) <= 400
    return line


def test_names_of_presets_are_those_of_modelopt() -> None:
    from autoquant_ray.modelopt_api import mtq

    names = preset_names()
    assert names == mtq.config.choices or names == frozenset()
    require_names(known_formats())


@pytest.mark.parametrize("command", ["plan", "scan"])
def test_typo_in_a_format_and_missing_folder_are_said_together(
    command: str, tmp_path: Path, text_file: Path
) -> None:
    more = ("--data", text_file, "--out", "run", "--bits", 5) * (command == "scan")
    formats = "wint4_afp61,wint8_aint8,nvfp4,wfp8_afp8:msee"
    line = refused(command, "./no-model", "--formats", formats, *more, folder=tmp_path)
    assert "unknown format 'wint4_afp61'; closest: wint4_afp16" in line
    assert "unknown format 'nvfp4'; closest: NVFP4_DEFAULT_CFG" in line
    assert "'msee' is no method of rounding" in line
    assert "no-model does not exist" in line


def test_each_alone_is_refused_too(tmp_path: Path, text_file: Path, model_folder: Any) -> None:
    scan = ("scan", model_folder("llama"), "--out", tmp_path / "run", "--bits", 5)
    line = refused(*scan, "--formats", "wint4_afp61", "--data", text_file)
    assert line.startswith("error: unknown format 'wint4_afp61'; closest: wint4_afp16")
    line = refused(*scan, "--formats", "wint4_afp16", "--data", tmp_path / "none.jsonl")
    assert line.startswith("error: data source")
    assert not (tmp_path / "run").exists()


def test_closest_names_are_those_that_modelopt_would_give() -> None:
    for name in ("nvfp4", "int4_awq", "wint4_afp61"):
        hint = ", ".join(closest_formats(name, known_formats()))
        assert f"unknown format {name!r}; closest: {hint}" in refusal(
            run("plan", ".", "--formats", name)
        )


def test_all_errors_of_a_file_are_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "scan.yaml"
    file.write_text("smaples: 3\nseq_len: many\nbits: 99\nmodel: m\n")
    line = refused("scan", "--config", file)
    for text in (
        "scan.yaml: smaples: unknown key; closest: samples",
        "; seq_len: Input should be a valid integer",
        "; bits: Input should be less than or equal to 16 (got 99)",
        "; --data is missing",
    ):
        assert text in line
    assert line.count("scan.yaml") == 1


def test_errors_that_have_no_room_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "scan.yaml"
    file.write_text("".join(f"key_{n}: 3\n" for n in range(30)) + "model: m\n")
    line = refused("plan", "--config", file)
    assert "scan.yaml: key_0: unknown key" in line
    assert int(line.rpartition("; and ")[2].partition(" more")[0]) > 20
