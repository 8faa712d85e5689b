"""Commands for jobs on a Ray cluster: submit one, and look after it there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from autoquant_ray.cli.edge import Result, as_started, prints_result, wants_json
from autoquant_ray.config.values import is_variable
from autoquant_ray.errors import EXIT_DONE, EXIT_INTERRUPTED
from autoquant_ray.jobs.names import check_run_id

if TYPE_CHECKING:
    from autoquant_ray.jobs.cluster import Jobs, JobView

_ADDRESS = click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="The cluster's dashboard, such as http://HOST:8265. Default: the environment variable "
    "RAY_API_SERVER_ADDRESS; RAY_ADDRESS is ignored.",
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
@prints_result
def submit(
    job_file: str,
    address: str,
    follow: bool,
    env: dict[str, str],
    wheel: str | None,
    runs: str | None,
) -> Result:
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
    from autoquant_ray.config.files import read_yaml
    from autoquant_ray.jobs.package import make_package

    package = make_package(read_yaml(job_file), job_file, env=env, wheel=wheel, runs=runs)
    from autoquant_ray.jobs.cluster import Jobs

    cluster = Jobs(address)
    submission = cluster.submit(package)
    run_id = submission.run_id
    line = {
        "submitted": "submitted",
        "resubmitted": "submitted again; it goes on where it ended",
        "running": "is there already and runs",
        "finished": "has finished already",
    }[submission.outcome]
    click.echo(f"{run_id}: {line}", err=follow or wants_json())
    if follow:
        return _follow(cluster, run_id)
    hint = f"autoquant-ray jobs logs {run_id} --follow --address {cluster.address}"
    return Result(
        json=lambda: {"outcome": submission.outcome, **cluster.view(run_id).to_json()},
        show=lambda: click.echo(as_started(hint)),
    )


@click.group()
def jobs() -> None:
    """Look after the jobs that 'submit' started on a Ray cluster.

    \b
    Example:
      autoquant-ray jobs list --address http://head:8265
      autoquant-ray jobs stop my-model-0a1b2c3d --address http://head:8265
    """


def _takes_run_id(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("run_id")(_ADDRESS(prints_result(command)))


@jobs.command(name="list")
@_ADDRESS
@prints_result
def list_(address: str) -> Result:
    """List the jobs that the cluster knows, oldest first.

    \b
    Example:
      autoquant-ray jobs list --address http://head:8265
    """
    from autoquant_ray.cli.output import print_jobs
    from autoquant_ray.jobs.cluster import Jobs

    views = Jobs(address).all()
    return Result(json=lambda: [view.to_json() for view in views], show=lambda: print_jobs(views))


@jobs.command()
@_takes_run_id
def status(run_id: str, address: str) -> Result:
    """Show the state of the job RUN_ID and, once it is over, its exit code.

    \b
    Example:
      autoquant-ray jobs status my-model-0a1b2c3d --address http://head:8265
    """
    check_run_id(run_id)
    from autoquant_ray.jobs.cluster import Jobs

    return _state(Jobs(address).view(run_id))


@jobs.command()
@click.option("--follow", is_flag=True, help="Go on until the job ends; end with its exit code.")
@_takes_run_id
def logs(run_id: str, follow: bool, address: str) -> Result:
    """Show what the job RUN_ID has written.

    \b
    Example:
      autoquant-ray jobs logs my-model-0a1b2c3d --follow \\
          --address http://head:8265
    """
    check_run_id(run_id)
    from autoquant_ray.jobs.cluster import Jobs

    cluster = Jobs(address)
    if follow:
        return _follow(cluster, run_id)
    text = cluster.logs(run_id)
    return Result(
        json=lambda: {"run_id": run_id, "log": text}, show=lambda: click.echo(text, nl=False)
    )


@jobs.command()
@_takes_run_id
def stop(run_id: str, address: str) -> Result:
    """Stop the job RUN_ID and wait for its end; submitted again, it goes on.

    \b
    Example:
      autoquant-ray jobs stop my-model-0a1b2c3d --address http://head:8265
    """
    check_run_id(run_id)
    from autoquant_ray.jobs.cluster import Jobs

    return _state(Jobs(address).stop(run_id))


def _state(job: JobView) -> Result:
    code = "" if job.exit_code is None else f", exit code {job.exit_code}"
    return Result(json=job.to_json, show=lambda: click.echo(f"{job.run_id}: {job.state}{code}"))


def _follow(cluster: Jobs, run_id: str) -> Result:
    """Show a job's log until it is over; the result has its exit code."""
    as_json = wants_json()

    def write(text: str) -> None:
        click.echo(text, nl=False, err=as_json)
        (sys.stderr if as_json else sys.stdout).flush()

    try:
        job = cluster.follow(run_id, write)
    except KeyboardInterrupt:
        stop = f"autoquant-ray jobs stop {run_id} --address {cluster.address}"
        click.echo(as_started(f"{run_id} runs on; stop it with: {stop}"), err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None

    def show() -> None:
        if job.state != "SUCCEEDED":
            reason = f" ({' '.join(job.message.split())[:300]})" if job.message else ""
            click.echo(f"{run_id}: {job.state}, exit code {job.exit_code}{reason}", err=True)

    return Result(json=job.to_json, show=show, exit_code=job.exit_code or EXIT_DONE)
