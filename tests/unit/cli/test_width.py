"""What commands print fits into 80 columns where it is piped, and is as wide as a terminal allows.

Whole stay words without blanks, such as paths, and commands to copy, which begin with blanks.
Markdown, which ``compare`` and ``nightly`` print, is a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from command_line import run
from scored_run import evaluation_row, put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.cli.output import (
    print_evaluation,
    print_jobs,
    print_refinement,
    print_sweep,
    print_table,
)
from autoquant_ray.jobs.cluster import JobView
from autoquant_ray.jobs.sweep import SweepRow
from autoquant_ray.solve import solve_run

FORMATS = ("wint4_g64_afp16", "wint4_g64_afp16:max", "wfp8_afp8", "wint8_aint8")
GROUP = "model.language_model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run with long names."""
    directory = put_scored_run(
        tmp_path_factory.mktemp("width") / "run",
        formats=FORMATS,
        first_layer="model.language_model.layers",
    )
    solve_run(directory, SolveOptions(bits=6), folder="")
    return str(directory.uri)


def require_fits(text: str, width: int = 80) -> None:
    """Check the width of every line, but for what stays whole."""
    lines = text.splitlines()
    assert lines
    wide = [line for line in lines if len(line) > width and " " in line.strip()]
    assert not wide, "\n".join(wide)
    assert "…" not in text, "nothing is cut"


@pytest.mark.parametrize(
    "arguments",
    [
        ("solve", "--bits", 5),
        ("frontier",),
        ("frontier", "--target-kl", 0.5),
        ("explain", GROUP),
        ("explain", "lm_head"),
        ("report",),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_command_on_a_run_fits(scored: str, arguments: tuple[Any, ...]) -> None:
    command, *options = arguments
    done = run(command, scored, *options)
    assert done.exit_code == 0, done.output
    require_fits(done.stdout)


@pytest.mark.parametrize(
    "formats", ["wint4_afp16,wfp8_afp8", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "vllm-blackwell"]
)
def test_plan_fits_and_names_every_format(model_folder: Any, formats: str) -> None:
    done = run("plan", model_folder("qwen3_moe"), "--formats", formats, "--card", "h100")
    assert done.exit_code == 0, done.output
    require_fits(done.stdout)
    rows = [line for line in done.stdout.splitlines() if "self_attn.o_proj " in line]
    numbers = [cell for row in rows for cell in row.split() if cell.replace(".", "").isdecimal()]
    assert numbers, done.stdout


def commands() -> Iterator[list[str]]:
    """All commands, as words."""
    for name, command in main.commands.items():
        yield [name]
        if isinstance(command, click.Group):
            yield from ([name, below] for below in command.commands)


@pytest.mark.parametrize("words", [[], *commands()], ids=" ".join)
def test_help_fits(words: list[str]) -> None:
    require_fits(run(*words, "--help").stdout)


def test_measurements_jobs_and_sweeps_fit(
    scored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = put_scored_run(tmp_path / "run")
    solution = solve_run(directory, SolveOptions(bits=6), folder="")
    row = evaluation_row(directory, kl_above_solution_stderr=0.01)
    print_evaluation([row, row | {"name": "uniform wint4_g64_afp16", "allocation": "x"}], [], {})
    figures = {"num_trials": 200, "num_flips": 150, "num_accepted": 12}
    kl = {"before": (0.1, 0.01), "after": (0.09, None), "difference": (-0.01, 0.001)}
    print_refinement("run", SimpleNamespace(solution=solution, **kl, **figures))
    print_jobs(
        [
            JobView(
                run_id=f"models-and-budgets-of-the-night-{number}-0a1b2c3d",
                state="SUCCEEDED",
                exit_code=0,
                message="",
                started=1.7e9,
                ended=1.7e9 + number,
            )
            for number in (1, 100_000)
        ]
    )
    print_sweep(
        [
            SweepRow(
                model="./models/some-model", run="run", budget="900 MiB", error="no room " * 9
            ),
            SweepRow(model="m" * 90, run="run", budget="4.5 bits", manifest="/runs/" + "m" * 90),
        ]
    )
    require_fits(capsys.readouterr().out)


def test_table_is_split_where_no_wrapping_helps(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["Name", *(f"number_{n}" for n in range(20))]
    rows = [[name, *(f"{n}00000.{n}" for n in range(20))] for name in ("first", "second")]
    print_table(heads, rows)
    printed = capsys.readouterr().out
    require_fits(printed)
    assert printed.count("second") > 1
    for n in range(20):
        assert printed.split().count(f"{n}00000.{n}") == 2


def test_wider_page_takes_a_whole_table(
    scored: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    done = run("explain", scored, GROUP)
    assert "Price of the flip" in done.stdout
    require_fits(done.stdout, 140)
