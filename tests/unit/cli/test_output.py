"""What commands print for people."""

from __future__ import annotations

import pytest

from autoquant_ray.cli.output import print_jobs, print_sweep
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
