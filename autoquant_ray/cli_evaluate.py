"""The commands that measure: ``evaluate``."""

from __future__ import annotations

from typing import Any

import click

from autoquant_ray.cli_edge import (
    common_options,
    only_ours_on_stdout,
    print_json,
    set_up_logging,
)
from autoquant_ray.cli_options import config_options, given_fields
from autoquant_ray.config_file import validate
from autoquant_ray.errors import EXIT_DONE, EXIT_NEEDS_A_LOOK
from autoquant_ray.evaluation_config import EvaluationConfig


@click.command()
@click.argument("run")
@config_options(EvaluationConfig, exclude=("run",))
@common_options
def evaluate(run: str, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Measure what RUN's allocation really loses, by running the quantized model.

    KL divergence, perplexity and agreement of the likeliest token on data that the scan has not
    seen, beside other allocations within the same budget. May be killed and started again.

    \b
    Example:
      autoquant-ray evaluate runs/qwen3 --samples 64
      autoquant-ray evaluate runs/qwen3 --solution bits-4.50 --data chat.jsonl --against uniform
    """
    set_up_logging(verbose)
    from autoquant_ray.evaluation import evaluate_run
    from autoquant_ray.output import print_evaluation

    config = validate(EvaluationConfig, given_fields(flags) | {"run": run})
    with only_ours_on_stdout():
        result = evaluate_run(config)
    if as_json:
        print_json({"rows": result.rows, "paths": result.paths})
    else:
        print_evaluation(result.rows, result.paths)
    for shard, reason in result.left_out.items():
        click.echo(f"shard {shard} was left out: {reason}", err=True)
    raise click.exceptions.Exit(EXIT_NEEDS_A_LOOK if result.left_out else EXIT_DONE)
