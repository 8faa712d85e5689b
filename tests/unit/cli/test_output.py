"""What commands print for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import run
from scored_run import evaluation_row, put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.output import print_evaluation, print_frontier, print_jobs, print_sweep
from autoquant_ray.jobs.cluster import JobView
from autoquant_ray.jobs.sweep import SweepRow
from autoquant_ray.solve import solve_run

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


def test_measurement_fits_into_eighty_columns_where_it_is_piped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    directory = put_scored_run(tmp_path / "run")
    solve_run(directory, SolveOptions(bits=6), folder="")
    row = evaluation_row(directory, kl_above_solution_stderr=0.01)
    names = ["uniform wint4_g64_afp16", "ModelOpt's own selection", "x" * 70]
    rivals = [row | {"name": name, "allocation": name} for name in names]
    print_evaluation([row, *rivals], [], {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4,096 tokens in 8 samples of held-out.jsonl")
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    heads = ("Allocation", "Bits", "Predicted", "Measured", "95% of", "Perplexity", "Same")
    for part in (*heads, *names[:2]):
        assert part in text
    assert "…" not in text, "nothing is cut"
