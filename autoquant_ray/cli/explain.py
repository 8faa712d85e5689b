"""The command ``explain``: why a group got its format, without model, torch or Ray."""

from __future__ import annotations

import click

from autoquant_ray.cli.edge import Result, only_ours_on_stdout, prints_result


@click.command()
@click.argument("run")
@click.argument("group")
@click.option(
    "--solution",
    default="",
    metavar="NAME",
    help="Folder below solutions/. Default: the scan's own solution.",
)
@prints_result
def explain(run: str, group: str, solution: str) -> Result:
    """Say why GROUP of RUN got its format.

    For every format: what it loses, what it costs, how often the resampled shards chose it, what
    the whole allocation would lose with it, and the shards that its score comes from. GROUP is the
    name of a group or of one of its layers, or a part of it that fits no other group.

    \b
    Example:
      autoquant-ray explain runs/qwen3 layers.3.self_attn.o_proj
      autoquant-ray explain runs/qwen3 lm_head --solution bits-4.50
    """
    from autoquant_ray.allocate.certainty.explain import explain_group
    from autoquant_ray.cli.output import print_explanation
    from autoquant_ray.runs.directory import RunDirectory

    with only_ours_on_stdout():
        explanation = explain_group(RunDirectory(run), group, solution)
    return Result(json=explanation.to_json, show=lambda: print_explanation(explanation))
