"""What is wrong is said at once, all of it, before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, run

from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import require_rows
from autoquant_ray.distributed.this_machine import may_have_gpu
from autoquant_ray.errors import DataError
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


GOOD = '{"text": "a b c d e f"}\n'


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ("", (), "a.jsonl holds no usable sample: it has no row; give texts of at least 2 tokens"),
        ("\n\n", (), "a.jsonl holds no usable sample: it has no row; give texts of at least 2 to"),
        ('{"text": " "}\n' * 3, (), "of 3 texts read, 3 are empty"),
        (GOOD * 2 + '{"text": "cut', (), "(char 9); mend it, or leave it out"),
        (GOOD + "[1, 2]\n", (), "line 2 is not an object but list"),
        ('{"body": "a b c d"}\n', (), "has no field 'text'; it has: body; name one with --text-f"),
        (GOOD, ("--domain-field", "kind"), "has no field 'kind'"),
        ('{"text": 3}\n', (), "field 'text' holds int, not text"),
        ('{"messages": "hello"}\n', (), "; skip such samples with --skip-bad-samples"),
        (b"\xff\xfe{", (), "line 1 is not UTF-8 text"),
        (b"\x1f\x8bno gzip", (), "cannot be read"),
    ],
)
def test_first_rows_of_a_file_are_read_before_a_cluster_is_needed(
    content: str | bytes, options: tuple[str, ...], complaint: str, scan: Any, tmp_path: Path
) -> None:
    name = "a.jsonl.gz" if content[:2] == b"\x1f\x8b" else "a.jsonl"
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert complaint in refusal(scan(*options, data=tmp_path / name, samples=4000))


def test_first_rows_need_nothing_heavy(tmp_path: Path, model_folder: Any) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + "{")
    scan = ("scan", model_folder("llama"), "--out", tmp_path / "run", "--bits", 5)
    line = refused(*scan, "--formats", "wint4_afp16", "--data", tmp_path / "a.jsonl")
    assert "line 2 is not valid JSON" in line


@pytest.mark.skipif(may_have_gpu(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--device", "cuda"), "--device cuda needs a GPU, and this machine has none; give --dev"),
        (("--gpus-per-worker", 1), "--gpus-per-worker 1.0 needs a GPU, and this machine has none"),
        (("--accelerator", "H100"), "--accelerator H100 needs a GPU, and this machine has none"),
    ],
)
def test_gpu_that_is_not_here_is_said_before_a_cluster_is_started(
    options: tuple[Any, ...], complaint: str, text_file: Path, tmp_path: Path, model_folder: Any
) -> None:
    scan = ("scan", model_folder("llama"), "--data", text_file, "--out", tmp_path / "run")
    words = ("--formats", "wint4_afp16", "--bits", 5, "--address", "local", *options)
    line = refused(*scan, *words)
    assert line.startswith(f"error: {complaint}")
    assert line.endswith(", or with --address a Ray cluster that has GPUs")


def test_large_file_that_is_read_as_a_whole_is_left_to_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    spec = DataSpec(source=str(path), num_samples=3, seq_len=8)
    path.write_text("[\n{\n")
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        require_rows(spec, skips_bad=False)
    path.write_text("[\n{\n" + " " * 2**25)
    require_rows(spec, skips_bad=False)


def test_rows_that_are_not_read_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 3 + "{" + GOOD)
    spec = DataSpec(source=str(path), num_samples=3, seq_len=8)
    require_rows(spec, skips_bad=False)
    require_rows(replace(spec, num_samples=99, pack=True), skips_bad=False)
    with pytest.raises(DataError, match="line 4 is not valid JSON"):
        require_rows(replace(spec, num_samples=4), skips_bad=False)
    path.write_text('{"messages": "hello"}\n')
    require_rows(spec, skips_bad=True)


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
