"""The commands that measure: ``evaluate`` and ``refine``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import click

from autoquant_ray.cli.edge import Result, grave_notes, only_ours_on_stdout, prints_result
from autoquant_ray.cli.options import config_options, given_fields
from autoquant_ray.cli.workers import warm_workers
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import LARGEST_SEED
from autoquant_ray.errors import EXIT_DONE, EXIT_NEEDS_A_LOOK

_OF_EVALUATE = ("against", "num_random", "audit", "tasks", "tasks_dir", "task_limit")
"""Fields that only ``evaluate`` uses."""


@click.command()
@click.argument("run")
@config_options(EvaluationConfig, exclude=("run",))
@prints_result
def evaluate(run: str, **flags: Any) -> Result:
    """Measure what RUN's allocation really loses, by running the quantized model.

    KL divergence, perplexity and agreement of the likeliest token on data that the scan has not
    seen, beside other allocations within the same budget. May be killed and started again.

    \b
    Example:
      autoquant-ray evaluate runs/qwen3 --samples 64
      autoquant-ray evaluate runs/qwen3 --solution bits-4.50 \\
          --data chat.jsonl --against uniform
      autoquant-ray evaluate runs/qwen3 --audit 32
      autoquant-ray evaluate runs/qwen3 --tasks arc_easy,gsm8k --against none
    """
    from autoquant_ray.cli.output import print_audit, print_evaluation

    config = validate(EvaluationConfig, given_fields(flags) | {"run": run})
    with _workers_of(config), only_ours_on_stdout():
        from autoquant_ray.evaluate.evaluate import evaluate_run

        result = evaluate_run(config)

    def show() -> None:
        if result.audit is not None:
            print_audit(result.audit)
        print_evaluation(result.rows, result.tasks, result.paths)

    return Result(
        json=result.to_json,
        show=show,
        notes=[
            *grave_notes(result.grave),
            *(f"shard {shard} was left out: {why}" for shard, why in result.left_out.items()),
        ],
        exit_code=EXIT_NEEDS_A_LOOK if result.left_out else EXIT_DONE,
    )


@click.command()
@click.argument("run")
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Allocations to try.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, LARGEST_SEED),
    default=0,
    show_default=True,
    help="Seed for the choice of swaps.",
)
@config_options(EvaluationConfig, exclude=("run", *_OF_EVALUATE))
@prints_result
def refine(run: str, trials: int, seed: int, **flags: Any) -> Result:
    """Search around RUN's allocation by measured KL, within the same budget.

    On half of the unseen data the solution's neighbours are measured, around the quantized model,
    and swaps are tried, in the order that a backward pass on a quarter predicts; the best
    allocations race on that quarter, and what is said about the winner is measured on the rest.
    Writes solutions/NAME-refined. May be killed and started again.

    \b
    Example:
      autoquant-ray refine runs/qwen3 --trials 200 --samples 64
    """
    return refinement(given_fields(flags) | {"run": run}, trials, seed)


def refinement(fields: dict[str, Any], trials: int, seed: int) -> Result:
    """Refine a solution.

    Args:
        fields: Of :class:`EvaluationConfig`.
        trials: Allocations to try.
        seed: Of the choice of swaps.
    """
    from autoquant_ray.cli.output import print_refinement

    config = validate(EvaluationConfig, fields)
    with _workers_of(config), only_ours_on_stdout():
        from autoquant_ray.evaluate.refine import refine_run

        result = refine_run(config, trials, seed)
    return Result(
        json=lambda: result.solution.to_json() | {"refinement": result.to_json()},
        show=lambda: print_refinement(config.run, result),
        notes=grave_notes(result.solution.grave),
    )


def _workers_of(config: EvaluationConfig) -> AbstractContextManager[None]:
    """How the workers of a measurement start."""
    from autoquant_ray.runs.directory import RunDirectory
    from autoquant_ray.runs.state import RunState

    scan = RunState.open(RunDirectory(config.run)).record.config or {}
    address = str(config.address or scan.get("address", "auto"))
    device, placement = str(scan.get("device")), str(scan.get("placement"))
    return warm_workers(address, device, placement, measures=True)
