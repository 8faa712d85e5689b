"""Commands about several runs: ``compare`` and ``nightly``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from autoquant_ray.cli.edge import Result, only_ours_on_stdout, prints_result
from autoquant_ray.errors import EXIT_DONE, EXIT_NEEDS_A_LOOK, ConfigError
from autoquant_ray.wording import printable

if TYPE_CHECKING:
    from autoquant_ray.config.scan import ScanConfig
    from autoquant_ray.jobs.file import NightlyJob
    from autoquant_ray.runs.state import Mode


@click.command()
@click.argument("before", metavar="RUN_A")
@click.argument("after", metavar="RUN_B")
@click.option(
    "--significance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="False discovery rate of the groups reported as moved.",
)
@prints_result
def compare(before: str, after: str, significance: float) -> Result:
    """Say what changed from RUN_A to RUN_B, and whether it is more than noise.

    Prints Markdown: the verdict (same, noise or drift), why, what to do, then tables. The exit
    code is 3 for drift, else 0.

    \b
    Example:
      autoquant-ray compare runs/monday runs/tuesday > drift.md
    """
    from autoquant_ray.compare.drift import render_drift
    from autoquant_ray.compare.runs import compare_runs
    from autoquant_ray.runs.directory import RunDirectory

    if not 0 < significance < 1:  # NaN passes the range of click
        raise ConfigError(f"--significance {significance} must be above 0 and below 1")
    comparison = compare_runs(RunDirectory(before), RunDirectory(after), significance)
    return Result(
        json=comparison.to_json,
        show=lambda: click.echo(render_drift(comparison), nl=False),
        exit_code=EXIT_NEEDS_A_LOOK if comparison.verdict == "drift" else EXIT_DONE,
    )


@click.command()
@click.argument("job_file", metavar="JOB.yaml")
@click.option("--runs", required=True, help="Folder of the runs and of history.parquet.")
@click.option(
    "--keep", type=click.IntRange(min=1), help="Runs to keep, instead of the job's number."
)
@click.option("--date", metavar="YYYY-MM-DD", help="Night to run. [default: today in UTC]")
@click.option("--address", help="Ray cluster, instead of the job file's: see scan --address.")
@prints_result
def nightly(
    job_file: str,
    runs: str,
    keep: int | None,
    date: str | None,
    address: str | None,
) -> Result:
    """Scan tonight's run of the nightly job JOB.yaml and compare it with the last good one.

    Goes on with a half-finished night, shows a finished one, and does nothing while another
    process is at work on the job. Writes drift.md and drift.json into the run, a row into
    history.parquet, and deletes the oldest runs. The exit code is 3 for drift or a quarantined
    shard.

    \b
    Example:
      autoquant-ray nightly jobs/nightly.yaml --runs s3://bucket/runs
    """
    from autoquant_ray.jobs.file import NightlyJob, load_job

    job = load_job(job_file)
    if not isinstance(job, NightlyJob):
        raise ConfigError(f"{job_file}: kind: nightly runs a nightly job, this is a {job.kind} job")
    return night_result(job.at(address), runs, keep=keep, date=date)


def night_result(job: NightlyJob, runs: str, *, keep: int | None, date: str | None) -> Result:
    """Run a night."""
    from autoquant_ray.compare.nightly import run_night

    with only_ours_on_stdout():
        night = run_night(job, runs, _scan, keep=keep, date=date)
    return Result(
        json=lambda: night.document,
        show=lambda: click.echo(printable("\n".join(night.lines))),
        exit_code=night.exit_code,
    )


def _scan(config: ScanConfig, mode: Mode) -> object:
    """Scan; a night that is held or finished never gets here and starts without torch and Ray."""
    from autoquant_ray.scan import run_search

    return run_search(config, mode)


@click.command()
@click.argument("directory")
@click.option("--out", help="Page to write.  [default: DIRECTORY/index.html]")
@prints_result
def site(directory: str, out: str | None) -> Result:
    """Write one self-contained HTML page of all runs below DIRECTORY, with their trends.

    It reads the runs' files and the history of nightly jobs, and needs no server.

    \b
    Example:
      autoquant-ray site runs
    """
    from autoquant_ray.compare.site_page import write_site
    from autoquant_ray.runs.directory import RunDirectory

    path = write_site(RunDirectory(directory), out)
    return Result(json=lambda: {"path": path}, show=lambda: click.echo(path))
