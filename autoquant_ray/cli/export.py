"""The command ``export``: a solution for where it is to be used."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoquant_ray.cli.edge import Result, only_ours_on_stdout, prints_result, show_lines
from autoquant_ray.cli.solve import engine_options
from autoquant_ray.config.values import place_problem
from autoquant_ray.errors import ConfigError, ModelError, StoreLostError, one_line
from autoquant_ray.export.layouts import LAYOUTS
from autoquant_ray.export.recipes import TOOLS

if TYPE_CHECKING:
    from autoquant_ray.export.checkpoint import Checkpoint

RECIPE = "recipe"
FORMATS = (*LAYOUTS, RECIPE)
_LONGEST_NOTE, _LONGEST_REASON = 400, 100
_SERVED = ("--formats", "NVFP4_DEFAULT_CFG,wfp8_afp8", "--engine", "vllm")


@click.command()
@click.argument("run")
@click.option("--out", required=True, help="Folder to write; for a recipe, the file.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="modelopt, compressed-tensors: a checkpoint that engines load. recipe: for a tool that "
    "quantizes by itself. Default: the layout in which the engine of --engine, or of the solution, "
    "serves it; without one modelopt.",
)
@engine_options
@click.option("--tool", type=click.Choice(TOOLS), help="For a recipe: the tool that reads it.")
@click.option(
    "--base",
    help="For a recipe of a solution with awq: folder to write the model that the tool starts "
    "from, in 16 bits, with folded factors.",
)
@click.option("--solution", default="", help="Folder below solutions/. Default: the scan's own.")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="For a checkpoint: largest size of a file of weights, such as 500MB. Default: 50GB.",
)
@click.option(
    "--extra-heads",
    metavar="FORMAT",
    help="For a checkpoint of compressed-tensors: format of the linears of heads that transformers "
    "does not load (mtp.*), such as wint4_afp16. Default: 16 bits.",
)
@click.option("--overwrite", is_flag=True, help="For a recipe: replace an existing file.")
@prints_result
def export(
    run: str,
    out: str,
    kind: str | None,
    engine: str | None,
    gpu: str | None,
    tool: str | None,
    base: str | None,
    solution: str,
    max_shard_size: str | None,
    extra_heads: str | None,
    overwrite: bool,
) -> Result:
    """Write a solution of RUN in the form that another program reads.

    A checkpoint is a folder with the packed weights, checked against the solution. One decoder
    layer is in memory at a time; an export that was killed goes on when it is started again. With
    --engine nothing is written that this engine would not serve as it was chosen.

    \b
    Example:
      autoquant-ray export runs/qwen3 --out qwen3-5bit --engine vllm --gpu hopper
      autoquant-ray export runs/qwen3 --format recipe --tool llama.cpp \\
          --out quantize.sh
      autoquant-ray export runs/qwen3 --format recipe --tool mlx-lm \\
          --out quantization.json
    """
    if kind != RECIPE:
        if tool is not None or base is not None or overwrite:
            raise ConfigError(
                f"--tool, --base and --overwrite are for --format {RECIPE}; leave them out"
            )
        more = {"engine": engine, "gpu": gpu, "extra_heads": extra_heads}
        return _export_checkpoint(run, solution, kind, out, max_shard_size, more)
    if any(value is not None for value in (engine, gpu, max_shard_size, extra_heads)):
        raise ConfigError(
            "--engine, --gpu, --max-shard-size and --extra-heads are for a checkpoint, not for "
            f"--format {RECIPE}"
        )
    written, notes = _export_recipe(run, solution, tool, out, base, overwrite)
    return Result(json=lambda: {"paths": written}, show=lambda: show_lines(written), notes=notes)


def _export_checkpoint(
    run: str,
    solution: str,
    layout: str | None,
    out: str,
    max_shard_size: str | None,
    more: dict[str, str | None],
) -> Result:
    from autoquant_ray.export.checkpoint import MAX_SHARD_SIZE, export_run
    from autoquant_ray.runs.directory import RunDirectory

    with only_ours_on_stdout():
        written = export_run(
            RunDirectory(run),
            out,
            solution=solution,
            layout=layout,
            max_shard_size=max_shard_size or MAX_SHARD_SIZE,
            **more,
        )
    is_served = written.layout in written.served_layouts
    notes = [] if is_served else [_unserved_note(run, solution, written)]
    return Result(json=written.to_json, show=lambda: show_lines(written.lines()), notes=notes)


def _unserved_note(run: str, solution: str, written: Checkpoint) -> str:
    """That no engine serves a checkpoint, and the command that makes one that is served."""
    from autoquant_ray.allocate.options import SolveOptions
    from autoquant_ray.report.reproduce import solve_command
    from autoquant_ray.runs.directory import RunDirectory
    from autoquant_ray.runs.names import MANIFEST_JSON, solution_folder
    from autoquant_ray.runs.state import RunState
    from autoquant_ray.serving.table import ENGINES
    from autoquant_ray.solve import served_options

    directory = RunDirectory(run)
    state = RunState.open(directory)
    engines = f"none of {', '.join(ENGINES)} serves this {written.layout} checkpoint as chosen"
    unserved = f"warning: {written.unread_caches or engines}"
    if written.served_layouts:
        other = written.served_layouts[0]
        words = ["autoquant-ray", "export", run, "--format", other, "--out", "FOLDER"]
        words += ["--solution", solution] if solution else []
        return f"{unserved}; it is served in the other layout: {shlex.join(words)}"
    budget = directory.read_json(f"{solution_folder(solution)}{MANIFEST_JSON}")["budget"]
    options = served_options(state, SolveOptions.from_json(budget))
    if options is None:
        command = shlex.join(["autoquant-ray", "scan", state.config["model"], *_SERVED])
        nor = "nor" if written.unread_caches is None else "nor does any serve"
        return (
            f"{unserved}, {nor} formats of the scan at this budget; scan others, such as: {command}"
        )
    start = f"{unserved}; export what this solves, with --solution {options.name}: "
    command = solve_command(run, options)
    if len(start + command) > _LONGEST_NOTE:
        engine = str(options.engine)
        shorter = shlex.join(["autoquant-ray", "solve", run, "--engine", engine])
        command = f"{shorter}, with the rest of the solution's budget"
    return start + command


def _export_recipe(
    run: str, solution: str, tool: str | None, out: str, base: str | None, overwrite: bool
) -> tuple[list[str], list[str]]:
    """Paths of what was written, and what differs from what was scored."""
    from autoquant_ray.export.folder import require_outside_runs
    from autoquant_ray.export.kv_caches import require_caches
    from autoquant_ray.export.recipes import make_recipe, recipe_notes
    from autoquant_ray.export.solution import read_solution, require_fused, unfused_names
    from autoquant_ray.runs.directory import RunDirectory
    from autoquant_ray.runs.filesystems import disk_problem

    if tool is None:
        raise ConfigError(f"--format recipe needs --tool {', '.join(TOOLS)}")
    exported = read_solution(RunDirectory(run), solution)
    require_caches(exported.caches, RECIPE)
    chosen = exported.chosen
    if tool == "auto-round":
        chosen = unfused_names(chosen, exported.modules)
    require_fused(chosen, exported.modules, tool)
    facts: dict[str, Any] = {"tied": exported.tied, "modules": exported.modules}
    text = make_recipe(
        chosen,
        exported.formats,
        tool,
        is_quantized=_is_gguf(exported.state),
        model_type=exported.state.plan.get("model_type", ""),
        **facts,
    )
    path = _recipe_file(out, overwrite)
    if base is not None and Path(base).resolve() == path.resolve():
        raise ConfigError(f"--base {base} is the file of --out too; give a folder of its own")
    require_outside_runs(path, out)
    folders = _export_base(run, solution, exported, base)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        if (lost := disk_problem(error, path)) is not None:
            raise StoreLostError(lost) from None
        reason = one_line(error, limit=_LONGEST_REASON)
        raise ConfigError(f"--out {out} cannot be written: {reason}; give another file") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return [out, *folders], recipe_notes(chosen, exported.formats, tool, **facts)


def _recipe_file(out: str, overwrite: bool) -> Path:
    """The file to write.

    Raises:
        ConfigError: It is there, or is none.
    """
    if (problem := place_problem(out)) is not None:
        raise ConfigError(f"--out: {problem}")
    if "://" in out:
        raise ConfigError(f"--out {out}: a recipe is written to a local file; copy it then")
    path = Path(out)
    if path.is_dir() or not path.name:
        raise ConfigError(f"--out {out} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists; give another name, or --overwrite")
    return path


def _is_gguf(state: Any) -> bool:
    """Whether a run's model is a GGUF file; a recipe needs none, so it may be elsewhere."""
    from autoquant_ray.models.find import find_model

    name = str(state.config["model"])
    try:
        return find_model(name).gguf_file is not None
    except ModelError:
        return name.endswith(".gguf")


def _export_base(run: str, solution: str, exported: Any, base: str | None) -> list[str]:
    """The folder with the folded model, where a solution has factors."""
    from autoquant_ray.export.checkpoint import export_base
    from autoquant_ray.formats.smoothed import takes_factors
    from autoquant_ray.runs.directory import RunDirectory

    used = set(exported.chosen.values())
    names = [f.name for f in exported.formats if f.name in used and takes_factors(f)]
    if names and base is None:
        raise ConfigError(
            f"--format {RECIPE}: the solution has {names[0]}, whose factors no recipe can say; "
            "give --base FOLDER, which gets the model that the tool starts from, with these folded "
            "in"
        )
    if base is None:
        return []
    if not names:
        raise ConfigError("--base is for a solution with awq; leave it out")
    with only_ours_on_stdout():
        return [export_base(RunDirectory(run), base, solution=solution)]
