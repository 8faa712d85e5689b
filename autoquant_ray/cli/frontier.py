"""The command ``frontier``: all budgets of a run at once, without model, torch or Ray."""

from __future__ import annotations

import math

import click

from autoquant_ray.cli.edge import Result, grave_notes, only_ours_on_stdout, prints_result
from autoquant_ray.errors import ConfigError


@click.command()
@click.argument("run")
@click.option(
    "--points",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Points to show, the knee among them; frontier.parquet holds those of 64 budgets or more.",
)
@click.option(
    "--target-kl", type=float, help="Solve the fewest bits within this KL, in nats per token."
)
@click.option(
    "--target-ppl-increase",
    metavar="SHARE",
    help="The same as a rise of the perplexity, such as 2%: a KL of ln(1.02), which holds where "
    "the data is like the model's own text.",
)
@prints_result
def frontier(
    run: str,
    points: int,
    target_kl: float | None,
    target_ppl_increase: str | None,
) -> Result:
    """Predicted KL of RUN at every size, or the fewest bits within a loss.

    All formats of the scan count, whatever engine it was for.

    \b
    Example:
      autoquant-ray frontier runs/qwen3
      autoquant-ray frontier runs/qwen3 --target-kl 0.02
    """
    from autoquant_ray.allocate.frontier import frontier_of
    from autoquant_ray.cli.output import print_frontier, print_solution
    from autoquant_ray.runs.directory import RunDirectory
    from autoquant_ray.runs.state import RunState
    from autoquant_ray.solve import solve_within

    target = _target(target_kl, target_ppl_increase)
    directory = RunDirectory(run)
    if target is None:
        with only_ours_on_stdout():
            sizes = frontier_of(directory, points)
        has_unit = not RunState.open(directory).record.is_imported
        return Result(
            json=lambda: [vars(point) for point in sizes],
            show=lambda: print_frontier(run, sizes, has_unit=has_unit),
        )
    with only_ours_on_stdout():
        solution = solve_within(directory, target)
    return Result(
        json=solution.to_json,
        show=lambda: print_solution(run, solution),
        notes=grave_notes(solution.grave),
    )


def _target(kl: float | None, increase: str | None) -> float | None:
    from autoquant_ray.config.values import parse_share

    if kl is not None and increase is not None:
        raise ConfigError("--target-kl and --target-ppl-increase exclude each other; give one")
    if kl is not None and not 0 < kl < math.inf:
        raise ConfigError(f"--target-kl {kl:g} must be a number above 0")
    if increase is None:
        return kl
    try:
        return math.log1p(parse_share(increase))
    except ValueError as error:
        raise ConfigError(f"--target-ppl-increase: {error}") from None
