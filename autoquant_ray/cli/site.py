"""``autoquant-ray site``: the history page of a folder of runs."""

from __future__ import annotations

import click

from autoquant_ray.cli.edge import common_options, print_json, set_up_logging


@click.command()
@click.argument("directory")
@click.option("--out", help="Page to write.  [default: DIRECTORY/index.html]")
@common_options
def site(directory: str, out: str | None, as_json: bool, verbose: bool) -> None:
    """Write one self-contained HTML page of all runs below DIRECTORY, with their trends.

    It reads the runs' files and the history of nightly jobs, and needs no server.

    \b
    Example:
      autoquant-ray site runs
    """
    set_up_logging(verbose)
    from autoquant_ray.compare.site_page import write_site
    from autoquant_ray.runs.directory import RunDirectory

    path = write_site(RunDirectory(directory), out)
    if as_json:
        print_json({"path": path})
    else:
        click.echo(path)
