"""The command that runs a job file in this process: a scan, a sweep of several, or a night."""

from __future__ import annotations

import os
from typing import Any

import click

from autoquant_ray.cli.compare import run_and_show
from autoquant_ray.cli.edge import common_options, only_ours_on_stdout, print_json, set_up_logging
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_NEEDS_A_LOOK, ConfigError
from autoquant_ray.jobs.file import NightlyJob, ScanJob, SweepJob, load_job, require_runs
from autoquant_ray.jobs.names import check_run_id


def scan_and_show(config: ScanConfig, mode: Any, as_json: bool, run_id: str | None = None) -> None:
    """Run a scan, print its solution, and end with the scan's exit code."""
    from autoquant_ray.cli.output import print_solution
    from autoquant_ray.scan import run_search

    with only_ours_on_stdout():
        result = run_search(config, mode, run_id)
    if as_json:
        print_json(result.solution.to_json())
    else:
        print_solution(config.out, result.solution)
    for entry in result.quarantined:
        click.echo(f"shard {entry['shard']} was left out: {entry['reason']}", err=True)
    raise click.exceptions.Exit(EXIT_NEEDS_A_LOOK if result.quarantined else EXIT_DONE)


@click.command()
@click.argument("job_file", metavar="JOB.yaml")
@click.option("--run-id", help="Id of the run, in run.json. Default: the job's name and digest.")
@click.option("--runs", help="Folder of the runs of a nightly job, which needs it.")
@click.option("--address", help="Ray cluster, instead of the job file's: see scan --address.")
@common_options
def run(
    job_file: str,
    run_id: str | None,
    runs: str | None,
    address: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Run the scan, the sweep or the night that JOB.yaml describes, here, or go on with it.

    Run again, a finished job is shown and an unfinished one goes on, so that a retry is always
    safe.

    \b
    Example:
      autoquant-ray run jobs/scan.yaml
    """
    set_up_logging(verbose)
    job = load_job(job_file)
    require_runs(job, runs, job_file)
    if isinstance(job, NightlyJob) and runs is not None:
        if run_id is not None:
            raise ConfigError("--run-id does not go with a nightly job: its date names the run")
        run_and_show(job.at(address), runs, keep=None, date=None, as_json=as_json)
    run_id = job.run_id if run_id is None else check_run_id(run_id)
    job = job.at(address)
    job.require_secrets(os.environ)
    try:
        if isinstance(job, SweepJob):
            _sweep_and_show(job, run_id, as_json)
        elif isinstance(job, ScanJob):
            scan_and_show(job.config(), "resume", as_json, run_id)
    except KeyboardInterrupt:
        click.echo("interrupted; finished shards are kept, run the job again to go on", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def _sweep_and_show(job: SweepJob, run_id: str, as_json: bool) -> None:
    from autoquant_ray.cli.output import print_sweep
    from autoquant_ray.jobs.sweep import run_sweep, worst_code

    with only_ours_on_stdout():
        rows = run_sweep(job, run_id)
    if as_json:
        print_json({"run_id": run_id, "rows": [row.to_json() for row in rows]})
    else:
        print_sweep(rows)
    raise click.exceptions.Exit(worst_code(rows))
