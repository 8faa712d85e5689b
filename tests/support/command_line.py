"""The command line in the test's own process, and the one line with which it refuses."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from autoquant_ray.cli.main import main

NO_CLUSTER = "ray://127.0.0.1:9"
COMMANDS = (
    "plan",
    "scan",
    "solve",
    "report",
    "import",
    "demo",
    "doctor",
    "run",
    "submit",
    "jobs",
    "compare",
    "nightly",
    "evaluate",
    "measure-latency",
    "frontier",
    "explain",
    "export",
    "refine",
    "site",
)

JOBS_COMMANDS = ("jobs list", "jobs status", "jobs logs", "jobs stop")


def run(*arguments: Any) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(result: Result, exit_code: int = 2) -> str:
    """The one line with which a command refused; its exit code is checked."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert NO_CLUSTER not in lines[0]
    return lines[0]
