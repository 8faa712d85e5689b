"""``solve --latency``: what it prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from step_by_hand import FORMATS

from autoquant_ray.cli.main import main


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["solve", *map(str, arguments)])


def test_command_tells_speed_card_and_that_it_is_a_bound(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    done = run(directory.uri, "--latency", "a100", "--batch", 4, "--tokens-per-second", 1000)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "ms per token" in line]
    assert "NVIDIA A100 SXM 80GB (batch 4, context 1024)" in line
    assert line.endswith("roofline bound, not a measurement")
    (name,) = directory.list_folders("solutions")
    report = Path(directory.uri, "solutions", name, "report.md").read_text()
    assert "**Predicted decode speed:**" in report
    assert "at least 1000 tokens/s on NVIDIA A100 SXM 80GB" in report


def test_command_names_formats_without_units(make_run: Any) -> None:
    directory = make_run(formats=("wfp8_afp8",))
    low = ("--latency", "a100", "--bits", 8.5)
    done = run(directory.uri, *low, "--json")
    assert json.loads(done.stdout)["latency"]["formats_without_units"] == ["wfp8_afp8"]
    done = run(directory.uri, *low)
    assert "the card has no units for wfp8_afp8" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--latency", "h1000", "--bits", 8), "'h1000' is neither a card"),
        (("--bits", 8, "--tokens-per-second", 5), "--tokens-per-second needs a card"),
        (("--bits", 8, "--batch", 5), "--batch needs a card"),
        (("--latency", "h100", "--bits", 8, "--batch", 0), "'--batch': 0 is not in the range"),
        (("--latency", "h100", "--bits", 8, "--context", 0), "'--context': 0"),
        (("--latency", "h100"), "give a budget"),
        (("--latency", "h100", "--ms-per-token", 0), "--ms-per-token 0.0 must be"),
        (("--latency", "h100", "--ms-per-token", "nan"), "--ms-per-token nan must be"),
        (("--latency", "h100", "--tokens-per-second", "inf"), "--tokens-per-second inf must be"),
        (
            ("--latency", "h100", "--tokens-per-second", 5, "--ms-per-token", 5),
            "exclude each other",
        ),
    ],
)
def test_wrong_options_are_refused(arguments: Any, words: str, make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    done = run(directory.uri, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert directory.list_folders("solutions") == []


def test_unreachable_speed_exits_4(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    done = run(directory.uri, "--latency", "h100", "--ms-per-token", 1e-7)
    assert done.exit_code == 4
    assert len(done.stderr.splitlines()) == 1
    assert "ms per token" in done.stderr
    assert directory.list_folders("solutions") == []
