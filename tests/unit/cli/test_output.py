"""What commands print for people."""

from __future__ import annotations

from typing import Any

import pytest
from command_line import run

from autoquant_ray.cli.output import print_frontier, print_jobs, print_sweep
from autoquant_ray.jobs.cluster import JobView
from autoquant_ray.jobs.sweep import SweepRow

HOSTILE = "a\x1b]0;title\x07b\x9b31m\u202e[red]c"
SHOWN = "a\\x1b]0;title\\x07b\\x9b31m\\u202e[red]c"


def test_tables_show_the_control_characters_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    print_jobs(
        [
            JobView(
                run_id=HOSTILE,
                state="PENDING",
                exit_code=None,
                message="",
                started=None,
                ended=None,
            )
        ]
    )
    print_sweep([SweepRow(model=HOSTILE, run="run", budget="bits 4.5", error=HOSTILE)])
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 3
    assert printed.replace("\n", "").isprintable()


def test_titles_and_lines_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_frontier(f"{HOSTILE} :warning:", [])
    printed = capsys.readouterr().out
    assert printed.count(f"{SHOWN} :warning:") == 2


def test_heads_of_a_plan_are_names_not_markup(model_folder: Any, job_file: Any) -> None:
    name = "[red]mine[/red]"
    config = {"custom_formats": {name: {"weight": {"num_bits": 8, "axis": 0}}}, "formats": [name]}
    done = run("plan", model_folder("llama"), "--config", job_file(config))
    assert done.exit_code == 0, done.output
    assert f"{name} MiB" in done.stdout
