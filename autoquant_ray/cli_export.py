"""The command ``export``: a plan for where it is to be used."""

from __future__ import annotations

from pathlib import Path

import click

from autoquant_ray.cli_edge import common_options, print_json, set_up_logging
from autoquant_ray.errors import ConfigError
from autoquant_ray.recipes import TOOLS

FORMATS = ("recipe",)


@click.command()
@click.argument("run")
@click.option("--out", required=True, help="File to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="recipe: for a tool that quantizes by itself.",
)
@click.option("--tool", type=click.Choice(TOOLS), help="Of a recipe: whom it is for.")
@click.option("--solution", default="", help="Folder below solutions/. Default: the scan's own.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@common_options
def export(
    run: str,
    out: str,
    kind: str,
    tool: str | None,
    solution: str,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write RUN's plan in the form that another program reads.

    \b
    Example:
      autoquant-ray export runs/qwen3 --format recipe --tool llama.cpp --out tensor-types.txt
      autoquant-ray export runs/qwen3 --format recipe --tool mlx-lm --out quantization.json
    """
    set_up_logging(verbose)
    del kind  # one format so far
    written = _export_recipe(run, solution, tool, out, overwrite)
    if as_json:
        print_json({"paths": [written]})
    else:
        click.echo(written)


def _export_recipe(run: str, solution: str, tool: str | None, out: str, overwrite: bool) -> str:
    from autoquant_ray.exported_plan import read_plan
    from autoquant_ray.recipes import make_recipe

    if tool is None:
        raise ConfigError(f"--format recipe needs --tool {', '.join(TOOLS)}")
    plan = read_plan(run, solution)
    text = make_recipe(plan.chosen, plan.formats, tool)
    path = Path(out)
    if path.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists; give another name, or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    return out
