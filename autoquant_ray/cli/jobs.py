"""Commands for jobs on a Ray cluster: submit one, and look after it there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from autoquant_ray.cli.edge import common_options, print_json, set_up_logging
from autoquant_ray.errors import EXIT_DONE, EXIT_INTERRUPTED
from autoquant_ray.jobs.names import check_run_id, is_variable

if TYPE_CHECKING:
    from autoquant_ray.jobs.cluster import Jobs, JobView

_ADDRESS = click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="The cluster's dashboard, such as http://HOST:8265. Default: the environment variable "
    "RAY_API_SERVER_ADDRESS; RAY_ADDRESS is not looked at.",
)


def _parse_env(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """``K=V`` texts as a dict; a message never holds a value."""
    parsed: dict[str, str] = {}
    for number, text in enumerate(texts, start=1):
        name, equals, value = text.partition("=")
        if not equals or not is_variable(name):
            raise click.BadParameter(f"number {number} is not of the form NAME=VALUE")
        parsed[name] = value
    return parsed


@click.command()
@click.argument("job_file", metavar="JOB.yaml")
@_ADDRESS
@click.option("--follow", is_flag=True, help="Show the job's log and end with its exit code.")
@click.option(
    "--env",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_parse_env,
    help="Environment variable of the job and its workers. Ray's dashboard shows it, so that the "
    "job's secrets are refused. May be repeated.",
)
@click.option(
    "--wheel",
    metavar="FILE",
    help="Wheel of autoquant-ray to run. Default: what is installed on the cluster.",
)
@click.option("--runs", metavar="DIR", help="Folder of the runs of a nightly job, on the cluster.")
@common_options
def submit(
    job_file: str,
    address: str,
    follow: bool,
    env: dict[str, str],
    wheel: str | None,
    runs: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Submit the scan, the sweep or tonight's run of JOB.yaml to a Ray cluster, or find it there.

    The same job has the same id, a nightly job one for each date. Submitted again, a running one
    is followed and a finished one is shown; one that failed or was stopped goes on where it ended.
    Paths in JOB.yaml must be absolute, and the same on all nodes.

    The token of a cluster with token authentication is read as Ray reads it: RAY_AUTH_MODE=token,
    and RAY_AUTH_TOKEN or ~/.ray/auth_token.

    \b
    Example:
      autoquant-ray submit jobs/scan.yaml --address http://head:8265 --follow
    """
    set_up_logging(verbose)
    from autoquant_ray.config.files import read_yaml
    from autoquant_ray.jobs.package import make_package

    package = make_package(read_yaml(job_file), job_file, env=env, wheel=wheel, runs=runs)
    from autoquant_ray.jobs.cluster import Jobs

    jobs_there = Jobs(address)
    submission = jobs_there.submit(package)
    run_id = submission.run_id
    line = {
        "submitted": "submitted",
        "resubmitted": "submitted again; it goes on where it ended",
        "running": "is there already and runs",
        "finished": "has finished already",
    }[submission.outcome]
    click.echo(f"{run_id}: {line}", err=as_json or follow)
    if follow:
        _follow(jobs_there, run_id, as_json)
    if as_json:
        shown = jobs_there.view(run_id).to_json()
        print_json({"outcome": submission.outcome, **shown})
    else:
        click.echo(f"autoquant-ray jobs logs {run_id} --follow --address {jobs_there.address}")


@click.group()
def jobs() -> None:
    """Look after the jobs that 'submit' started on a Ray cluster.

    \b
    Example:
      autoquant-ray jobs list --address http://head:8265
      autoquant-ray jobs stop my-model-0a1b2c3d --address http://head:8265
    """


def _about_one_job(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("run_id")(_ADDRESS(common_options(command)))


@jobs.command(name="list")
@_ADDRESS
@common_options
def list_(address: str, as_json: bool, verbose: bool) -> None:
    """List the jobs that the cluster knows, oldest first.

    \b
    Example:
      autoquant-ray jobs list --address http://head:8265
    """
    set_up_logging(verbose)
    from autoquant_ray.cli.output import print_jobs
    from autoquant_ray.jobs.cluster import Jobs

    found = Jobs(address).all()
    if as_json:
        print_json([job.to_json() for job in found])
    else:
        print_jobs(found)


@jobs.command()
@_about_one_job
def status(run_id: str, address: str, as_json: bool, verbose: bool) -> None:
    """Show the state of the job RUN_ID and, once it is over, its exit code.

    \b
    Example:
      autoquant-ray jobs status my-model-0a1b2c3d --address http://head:8265
    """
    set_up_logging(verbose)
    check_run_id(run_id)
    from autoquant_ray.jobs.cluster import Jobs

    _show(Jobs(address).view(run_id), as_json)


@jobs.command()
@click.option("--follow", is_flag=True, help="Go on until the job ends; end with its exit code.")
@_about_one_job
def logs(run_id: str, follow: bool, address: str, as_json: bool, verbose: bool) -> None:
    """Show what the job RUN_ID has written.

    \b
    Example:
      autoquant-ray jobs logs my-model-0a1b2c3d --follow --address http://head:8265
    """
    set_up_logging(verbose)
    check_run_id(run_id)
    from autoquant_ray.jobs.cluster import Jobs

    jobs_there = Jobs(address)
    if follow:
        _follow(jobs_there, run_id, as_json)
    text = jobs_there.logs(run_id)
    if as_json:
        print_json({"run_id": run_id, "log": text})
    else:
        click.echo(text, nl=False)


@jobs.command()
@_about_one_job
def stop(run_id: str, address: str, as_json: bool, verbose: bool) -> None:
    """Stop the job RUN_ID and wait for its end; submitted again, it goes on.

    \b
    Example:
      autoquant-ray jobs stop my-model-0a1b2c3d --address http://head:8265
    """
    set_up_logging(verbose)
    check_run_id(run_id)
    from autoquant_ray.jobs.cluster import Jobs

    _show(Jobs(address).stop(run_id), as_json)


def _show(job: JobView, as_json: bool) -> None:
    if as_json:
        print_json(job.to_json())
        return
    code = "" if job.exit_code is None else f", exit code {job.exit_code}"
    click.echo(f"{job.run_id}: {job.state}{code}")


def _follow(jobs_there: Jobs, run_id: str, as_json: bool) -> None:
    """Show a job's log until it is over; end with its exit code."""

    def write(text: str) -> None:
        click.echo(text, nl=False, err=as_json)
        (sys.stderr if as_json else sys.stdout).flush()

    try:
        job = jobs_there.follow(run_id, write)
    except KeyboardInterrupt:
        click.echo(
            f"{run_id} runs on; stop it with: autoquant-ray jobs stop {run_id} "
            f"--address {jobs_there.address}",
            err=True,
        )
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print_json(job.to_json())
    elif job.state != "SUCCEEDED":
        reason = f" ({' '.join(job.message.split())[:300]})" if job.message else ""
        click.echo(f"{run_id}: {job.state}, exit code {job.exit_code}{reason}", err=True)
    raise click.exceptions.Exit(job.exit_code or EXIT_DONE)
