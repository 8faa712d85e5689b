"""The edge of the program: what a command returns is printed in one of two ways, then it ends."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from command_line import refusal
from command_line import run as run_command

from autoquant_ray.api import Run
from autoquant_ray.cli.edge import Result, prints_result, wants_json
from autoquant_ray.errors import AutoQuantError
from autoquant_ray.serving.table import ENGINES, GENERATIONS
from autoquant_ray.wording import as_flags, fitted


@click.command()
@click.argument("name")
@prints_result
def greet(name: str) -> Result:
    """Greet NAME."""
    return Result(
        json=lambda: {"hello": name, "wants_json": wants_json()},
        show=lambda: click.echo(f"hello {name}"),
        notes=["a shard was left out"],
        exit_code=3,
    )


@pytest.mark.parametrize(
    ("flags", "stdout"),
    [([], "hello Ada\n"), (["--json"], json.dumps({"hello": "Ada", "wants_json": True}, indent=2))],
)
def test_result_is_printed_for_people_or_as_json(flags: list[str], stdout: str) -> None:
    result = CliRunner().invoke(greet, ["Ada", *flags])
    assert result.stdout.strip() == stdout.strip()
    assert result.stderr == "a shard was left out\n"
    assert result.exit_code == 3


def test_log_lines_of_others_keep_their_words() -> None:
    """transformers says ``dtype`` of an argument in Python, and a command has such a flag."""
    text = "give `dtype`, or start again: autoquant-ray greet"

    @click.group()
    def program() -> None:
        """Has the flag."""

    @program.command()
    @click.option("--dtype")
    @prints_result
    def greet_us(dtype: str | None) -> Result:
        for name in ("transformers.loading", "autoquant_ray.models"):
            logging.getLogger(name).warning(text)
        return Result(json=dict, show=lambda: None)

    theirs, ours = CliRunner().invoke(program, ["greet-us"]).stderr.splitlines()
    assert theirs == text
    assert ours == text.replace("`dtype`", "--dtype")


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    """A broken allocation loses infinitely much; other programs read no ``Infinity``."""
    values = {"rows": [{"kl": math.inf, "p": -math.inf}, (math.nan, 1.5)], "text": "NaN", "n": 3}

    @click.command()
    @prints_result
    def show() -> Result:
        return Result(json=lambda: values, show=lambda: None)

    result = CliRunner().invoke(show, ["--json"])
    assert result.exit_code == 0, result.output
    assert "Infinity" not in result.stdout
    assert json.loads(result.stdout) == {
        "rows": [{"kl": None, "p": None}, [None, 1.5]],
        "text": "NaN",
        "n": 3,
    }


def test_command_keeps_its_help_and_gets_two_options() -> None:
    text = CliRunner().invoke(greet, ["--help"]).stdout
    assert "Greet NAME." in text
    assert "--json" in text
    assert "-v, --verbose" in text


@pytest.mark.parametrize(("flags", "level"), [(["-v"], logging.DEBUG), ([], logging.INFO)])
def test_logging_is_set_up_before_the_command_runs(flags: list[str], level: int) -> None:
    levels = []

    @click.command()
    @prints_result
    def look() -> Result:
        levels.append(logging.getLogger("autoquant_ray").level)
        return Result(json=dict, show=lambda: None)

    assert CliRunner().invoke(look, flags).exit_code == 0
    assert levels == [level]


@pytest.mark.parametrize(
    ("options", "words", "name"),
    [
        ({"bits": 1.0}, ("--bits", "1"), "bits"),
        ({"bits": 20.0}, ("--bits", "20"), "bits"),
        ({"bits": 6.0, "engine": "tgi"}, ("--bits", "6", "--engine", "tgi"), "engine"),
        (
            {"bits": 6.0, "kv_bytes_per_token": 9.0},
            ("--bits", "6", "--kv-bytes-per-token", "9"),
            "kv_bytes_per_token",
        ),
    ],
)
def test_error_names_a_field_in_python_and_its_flag_on_the_command_line(
    make_run: Any, options: dict[str, Any], words: tuple[str, ...], name: str
) -> None:
    run = make_run()
    with pytest.raises(AutoQuantError) as caught:
        Run.open(run.uri).solve(**options)
    assert f"`{name}`" in str(caught.value)
    assert "--" not in str(caught.value)
    result = run_command("solve", run.uri, *words)
    assert result.exit_code == caught.value.exit_code
    assert f"--{name.replace('_', '-')}" in result.stderr
    assert "`" not in result.stderr


def test_only_options_become_flags() -> None:
    text = "give `autoquant-ray scan` or `max_formats`, not `weights`; `pins` too"
    assert as_flags(text, {"max_formats", "pin"}) == (
        "give `autoquant-ray scan` or --max-formats, not `weights`; --pin too"
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gpu", GENERATIONS)
def test_remedy_is_whole_however_many_formats_are_complained_of(
    engine: str, gpu: str, scan: Any
) -> None:
    formats = "wint4_aint4,wint3_afp16,wint5_afp16,wint6_afp16,wint6_g32_afp16,q4_k,q5_k"
    line = refusal(scan(formats=formats, engine=engine, gpu=gpu))
    assert "serves no format of the menu (wint4_aint4: " in line
    remedy = f"scan with --formats {engine}-{gpu}, or choose another --engine or --gpu"
    assert line.endswith(f"...); {remedy} (docs/engines.md)")
    assert len(line) <= 400


def test_remedy_of_a_long_value_is_whole(scan: Any, tmp_path: Path) -> None:
    place = "/".join(["long" * 40] * 3)
    line = refusal(scan(data=f"./{place}/a.jsonl"))
    assert len(line) <= 400
    assert line.startswith("error: data source ./longlong")
    assert line.endswith(
        "; give a file of text, JSONL, CSV or Parquet, a folder, a hub id or 'pydoc'"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short; do it", "short; do it"),
        ("a" * 50 + "; do it", "a" * 29 + "...; do it"),
        ("a (" + "b" * 50 + "); do it", "a (" + "b" * 26 + "...); do it"),
        ("a" * 50 + "b" * 50, "a" * 16 + "..." + "b" * 20),
        ("x; " + "a" * 50 + "b" * 50, "x; " + "a" * 13 + "..." + "b" * 20),
    ],
)
def test_long_message_loses_its_middle(text: str, expected: str) -> None:
    assert fitted(text, 40) == expected
    assert len(fitted(text, 40)) <= 40


def test_file_that_this_user_may_not_open_is_named(tmp_path: Path) -> None:
    """Root may open all, unless its process gave that up."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model").chmod(0)
    words = [sys.executable, "-m", "autoquant_ray", "plan", str(tmp_path / "model")]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not installed")
        rights = "-dac_override,-dac_read_search"
        words = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    (tmp_path / "model").chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "model/config.json' is not for this user (Permission denied); give it" in done.stderr


@pytest.mark.parametrize("words", [("solve", "--help"), ("--help",), ("--version",)])
def test_reader_that_has_seen_enough_is_no_error(words: tuple[str, ...]) -> None:
    """As in ``autoquant-ray solve --help | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "autoquant_ray", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
