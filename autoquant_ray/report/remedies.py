"""Commands that mend what a report has doubts about."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.report.reproduce import needs_file, scan_command, solve_command

_MORE = 4
"""Factor of the samples of another scan: it halves the standard errors."""


def remedies(
    run: str, solution: str, options: SolveOptions, config: Mapping[str, Any] | None
) -> dict[str, str]:
    """Name of a remedy -> command line.

    ``evaluate``, ``refine``, ``frontier``, ``served`` (another solution, of what an engine serves),
    ``explain`` (which a group's name follows), and of a run that was scanned ``samples`` (another
    scan of more data) and ``labels`` (another scan with labels from the model).

    Args:
        run: Run directory.
        solution: Name of the solution; '' for the scan's own.
        options: Budget and constraints of the solution.
        config: Resolved config of the scan; None for an imported run.
    """
    of = ["--solution", solution] if solution else []

    def line(*words: str) -> str:
        return shlex.join(["autoquant-ray", *words])

    if options.engine is None:
        options = options.model_copy(update={"engine": "vllm"})
    commands = {
        "evaluate": line("evaluate", run, *of),
        "refine": line("refine", run, *of),
        "frontier": line("frontier", run),
        "served": solve_command(run, options),
        "explain": line("explain", run, *of),
    }
    if config is None:
        return commands
    samples = config.get("samples", ScanConfig.model_fields["samples"].default)
    return commands | {
        "samples": _scan(config, samples=_MORE * samples, out=f"{run}-more"),
        "labels": _scan(config, labels="model", out=f"{run}-labels"),
    }


def _scan(config: Mapping[str, Any], **changes: Any) -> str:
    """The scan with other values; those of a config in a file are given as flags."""
    command = scan_command({**config, **changes})
    if not needs_file(config):
        return command
    return (
        f"{command} {shlex.join(w for name, v in changes.items() for w in (f'--{name}', str(v)))}"
    )
