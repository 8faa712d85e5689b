"""The command ``import``: what other tools chose, as a run or as a solution of one."""

from __future__ import annotations

import click

from autoquant_ray.cli.edge import Result, grave_notes, only_ours_on_stdout, prints_result
from autoquant_ray.errors import ConfigError


@click.command(name="import")
@click.argument("file")
@click.option("--out", help="Run directory to write, from a ModelOpt AutoQuant JSON manifest.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out first.")
@click.option(
    "--into",
    metavar="RUN",
    help="Scanned run that gets a solution, from AutoRound's layer_config, mlx-lm's "
    "quantization or sensitivities, or llm-compressor's config of HIGGS.",
)
@click.option("--name", help="Name of that solution.  [default: the file's]")
@prints_result
def import_(
    file: str,
    out: str | None,
    overwrite: bool,
    into: str | None,
    name: str | None,
) -> Result:
    """Take in what another tool found: a ModelOpt manifest, or an allocation for a scanned run.

    \b
    Example:
      autoquant-ray import autoquant.json --out runs/imported
      autoquant-ray solve runs/imported --bits 6 --bits-over all --cost modelopt
      autoquant-ray import layer_config.json --into runs/qwen3 --name autoround
      autoquant-ray evaluate runs/qwen3 --against autoround
    """
    if (out is None) == (into is None):
        raise ConfigError(
            "give --out DIR for a ModelOpt manifest, or --into RUN for an allocation of "
            "AutoRound, mlx-lm or llm-compressor"
        )
    if out is not None and name is not None:
        raise ConfigError("--name is for --into RUN; leave it out")
    if into is not None and overwrite:
        raise ConfigError("--overwrite is for --out DIR; leave it out")
    from autoquant_ray.cli.output import print_solution
    from autoquant_ray.imports.modelopt import import_manifest
    from autoquant_ray.imports.tool_allocations import import_allocation
    from autoquant_ray.runs.directory import RunDirectory

    with only_ours_on_stdout():
        if out is not None:
            solution = import_manifest(file, RunDirectory(out), overwrite=overwrite)
        else:
            solution = import_allocation(file, RunDirectory(str(into)), name)
    return Result(
        json=solution.to_json,
        show=lambda: print_solution(str(out or into), solution),
        notes=grave_notes(solution.grave),
    )
