"""The edge of the program: what a command returns is printed in one of two ways, then it ends."""

from __future__ import annotations

import json
import logging
from typing import Any

import click
import pytest
from click.testing import CliRunner
from command_line import run as run_command

from autoquant_ray.api import Run
from autoquant_ray.cli.edge import Result, prints_result, wants_json
from autoquant_ray.errors import AutoQuantError
from autoquant_ray.wording import as_flags


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
