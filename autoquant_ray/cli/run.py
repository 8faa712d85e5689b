"""The command that runs a job file in this process: a scan, a sweep of several, or a night."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import Any

import click

from autoquant_ray.cli.compare import night_result
from autoquant_ray.cli.edge import (
    Result,
    grave_notes,
    only_ours_on_stdout,
    prints_result,
    show_lines,
)
from autoquant_ray.cli.input_checks import require_input
from autoquant_ray.cli.workers import warm_workers
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_NEEDS_A_LOOK, ConfigError
from autoquant_ray.jobs.file import NightlyJob, ScanJob, SweepJob, load_job, require_runs
from autoquant_ray.jobs.names import check_run_id
from autoquant_ray.runs.directory import RunDirectory


def scan_result(config: ScanConfig, mode: Any, run_id: str | None = None) -> Result:
    """Run a scan: its solution and its exit code, and the commands that people run next."""
    keeps_menu = mode == "resume" and RunDirectory(config.out).exists()
    require_input(config, keeps_menu=keeps_menu)
    with warm_workers(config.address, config.device, config.placement):
        result = plain_scan_result(config, mode, run_id)

    def show() -> None:
        result.show()
        show_lines(_next_lines(config))

    return replace(result, show=show)


def plain_scan_result(config: ScanConfig, mode: Any, run_id: str | None = None) -> Result:
    """Run a scan whose workers start as they do for the command: its solution and exit code."""
    from autoquant_ray.cli.output import print_solution
    from autoquant_ray.scan import run_search

    with only_ours_on_stdout():
        result = run_search(config, mode, run_id)
    return Result(
        json=result.solution.to_json,
        show=lambda: print_solution(config.out, result.solution),
        notes=[
            *grave_notes(result.solution.grave),
            *(f"shard {e['shard']} was left out: {e['reason']}" for e in result.quarantined),
        ],
        exit_code=EXIT_NEEDS_A_LOOK if result.quarantined else EXIT_DONE,
    )


def _next_lines(config: ScanConfig) -> list[str]:
    """What people do with a finished scan."""
    out = shlex.quote(config.out)
    gpu = "" if config.gpu is None else f" --gpu {config.gpu}"
    target = "" if config.engine is None else f" --engine {config.engine}{gpu}"
    return [
        f"next: autoquant-ray evaluate {out}",
        f"  autoquant-ray frontier {out}",
        f"  autoquant-ray export {out} --out served{target}",
    ]


@click.command()
@click.argument("job_file", metavar="JOB.yaml")
@click.option("--run-id", help="Id of the run, in run.json. Default: the job's name and digest.")
@click.option("--runs", help="Folder of the runs of a nightly job, which needs it.")
@click.option("--address", help="Ray cluster, instead of the job file's: see scan --address.")
@prints_result
def run(job_file: str, run_id: str | None, runs: str | None, address: str | None) -> Result:
    """Run the scan, the sweep or the night that JOB.yaml describes, here, or go on with it.

    Run again, a finished job is shown and an unfinished one goes on, so that a retry is always
    safe.

    \b
    Example:
      autoquant-ray run jobs/scan.yaml
    """
    job = load_job(job_file)
    require_runs(job, runs, job_file)
    if isinstance(job, NightlyJob) and runs is not None:
        if run_id is not None:
            raise ConfigError("--run-id does not go with a nightly job: its date names the run")
        return night_result(job.at(address), runs, keep=None, date=None)
    run_id = job.run_id if run_id is None else check_run_id(run_id)
    job = job.at(address)
    job.require_secrets(os.environ)
    try:
        if isinstance(job, SweepJob):
            return _sweep_result(job, run_id)
        assert isinstance(job, ScanJob)
        return scan_result(job.config(), "resume", run_id)
    except KeyboardInterrupt:
        click.echo("interrupted; finished shards are kept, run the job again to go on", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def _sweep_result(job: SweepJob, run_id: str) -> Result:
    from autoquant_ray.cli.output import print_sweep

    first = job.config(job.models[0], job.budget_fields()[0])
    with warm_workers(first.address, first.device, first.placement), only_ours_on_stdout():
        from autoquant_ray.jobs.sweep import run_sweep, worst_code

        rows = run_sweep(job, run_id)
    return Result(
        json=lambda: {"run_id": run_id, "rows": [row.to_json() for row in rows]},
        show=lambda: print_sweep(rows),
        exit_code=worst_code(rows),
    )
