"""Other tools' allocations: read back from our own recipes, by hand, and refused in one line."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scored_run import put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun, solution_formats
from autoquant_ray.api import Run
from autoquant_ray.cli.main import main
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.export.recipes import make_recipe
from autoquant_ray.export.solution import read_solution
from autoquant_ray.report.concerns import find_concerns
from autoquant_ray.report.evidence import Evidence
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run

MENU = ("wint4_afp16", "wint8_afp16", "wfp8_afp8")
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A scored run with two weight-only formats, solved for 7 bits without fp8."""
    folder = tmp_path_factory.mktemp("foreign") / "run"
    directory = put_scored_run(folder, formats=MENU, num_layers=2)
    Run.open(directory.uri).solve(bits=7.0, allow={"*": ["wint4_afp16", "wint8_afp16", "none"]})
    solve_run(directory, SolveOptions(bits=6.0), folder="")
    return directory


def put(folder: Path, content: Any) -> str:
    """Write a file of a tool."""
    path = folder / "Their Plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def rival(run: RunDirectory, path: str) -> dict[str, str]:
    """The formats of a file as a rival of the scan's own solution."""
    _, candidate, *_ = collect_candidates(ScoredRun.read(RunState.open(run)), "", (path,))
    assert candidate.name == f"file {Path(path).name}"
    return candidate.formats


@pytest.mark.parametrize("tool", ["auto-round", "mlx-lm"])
def test_allocation_comes_back_from_its_own_recipe(
    run: RunDirectory, tmp_path: Path, tool: str
) -> None:
    (name,) = Run.open(run.uri).solutions[:1]
    exported = read_solution(run, name)
    path = put(tmp_path, make_recipe(exported.chosen, exported.formats, tool))
    state = RunState.open(run)
    problem = ScoredRun.read(state).problem
    assert rival(run, path) == solution_formats(state, f"solutions/{name}/", problem)
    assert {"wint4_afp16", "wint8_afp16"} <= set(rival(run, path).values())


def test_tied_head_comes_back_by_the_name_of_its_embedding(tmp_path: Path) -> None:
    """In recipes of mlx-lm, and in its sensitivities."""
    run = put_scored_run(tmp_path / "run", formats=MENU, num_layers=1)
    record = run.read_json("run.json")
    record["plan"]["tied_groups"] = ["lm_head"]
    run.write_json("run.json", record)
    allow = {"lm_head": ("wint4_afp16",), "*mlp*": ("wint8_afp16",), "*attn*": ("none",)}
    solve_run(run, SolveOptions(bytes=10**10, allow=allow), folder="")
    solve_run(run, SolveOptions(bytes=10**10, allow=allow))
    (name,) = Run.open(run.uri).solutions[:1]
    exported = read_solution(run, name)
    text = make_recipe(exported.chosen, exported.formats, "mlx-lm", tied=exported.tied)
    assert "model.embed_tokens" in text
    assert rival(run, put(tmp_path, text))["lm_head"] == "wint4_afp16"
    values = [["model.embed_tokens", 2.0]]
    values += [
        [m, 1.0] for m in exported.chosen if m not in ("lm_head", "visual.blocks.0.attn.qkv")
    ]
    assert rival(run, put(tmp_path, values)).keys() == rival(run, put(tmp_path, text)).keys()


def test_quantization_config_of_autoround_has_defaults_and_patterns(
    run: RunDirectory, tmp_path: Path
) -> None:
    config = {
        "quant_method": "auto-round", "bits": 4, "group_size": 128, "data_type": "int", "sym": True,
        "extra_config": {
            r".*mlp\.down_proj.*": {"bits": 8},
            f"{LAYER}self_attn.o_proj": {"bits": 16, "data_type": "fp"},
        },
    }  # fmt: skip
    formats = rival(run, put(tmp_path, {"model_type": "llama", "quantization_config": config}))
    assert (
        formats[f"{LAYER}mlp.down_proj"] == formats["model.layers.1.mlp.down_proj"] == "wint8_afp16"
    )
    assert formats[f"{LAYER}self_attn.o_proj"] == formats["lm_head"] == "none"
    assert formats["model.layers.1.self_attn.o_proj"] == "wint4_afp16"
    assert formats[f"{LAYER}mlp.gate_proj"] == "wint4_afp16"


def test_other_layouts_of_autoround_say_layers_in_places_of_their_own(
    run: RunDirectory, tmp_path: Path
) -> None:
    """As 0.16.1 saves a mix: ``auto_gptq`` in ``dynamic``, ``auto_awq`` what it leaves out."""
    default = {"bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
    dynamic = {
        r"+:.*model\.layers\.0\.mlp\.down_proj.*": {"bits": 8, "group_size": 128, "sym": True},
        r"-:.*model\.layers\.1\.self_attn\.o_proj.*": {},
    }
    gptq = default | {"quant_method": "gptq", "desc_act": False, "dynamic": dynamic}
    formats = rival(run, put(tmp_path, gptq))
    assert formats[f"{LAYER}mlp.down_proj"] == "wint8_afp16"
    assert formats["model.layers.1.self_attn.o_proj"] == formats["lm_head"] == "none"
    assert formats["model.layers.1.mlp.down_proj"] == "wint4_afp16"
    kept = ["model.layers.1.self_attn.o_proj", "visual.blocks.7", "lm_head", "model.layers.0.ml"]
    awq = default | {"quant_method": "awq", "zero_point": False, "modules_to_not_convert": kept}
    formats = rival(run, put(tmp_path, awq))
    none = {name for name, format_ in formats.items() if format_ == "none"}
    assert none == {"model.layers.1.self_attn.o_proj", "lm_head"}
    assert set(formats.values()) == {"none", "wint4_afp16"}


def test_layers_of_a_group_share_the_widest(
    run: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = {f"{LAYER}self_attn.{p}_proj": "W4A16" for p in "qk"}
    entries[f"{LAYER}self_attn.v_proj"] = {"bits": 8, "group_size": 128}
    with caplog.at_level(logging.WARNING):
        formats = rival(run, put(tmp_path, entries))
    assert formats[f"{LAYER}self_attn.q_proj"] == "wint8_afp16"
    assert "1 group(s) different bits" in caplog.text


def test_sensitivities_of_mlx_become_as_many_larger_groups_as_fit(
    run: RunDirectory, tmp_path: Path
) -> None:
    state = RunState.open(run)
    problem = ScoredRun.read(state).problem
    modules = [m for group in problem.searched for m in group.module_names]
    values = {name: float(number) for number, name in enumerate(reversed(modules))}
    rows = [["model.embed_tokens", 1e3], *([k, v] for k, v in values.items())]
    formats = rival(run, put(tmp_path, rows))
    assert set(formats.values()) == {"wint4_afp16", "wint8_afp16"}
    order = [group.name for group in problem.searched]  # most sensitive first
    larger = [formats[name] == "wint8_afp16" for name in order]
    assert larger == sorted(larger, reverse=True)
    bits = sum(g.cost(formats[g.name], "storage") for g in problem.searched) * 8
    weights = sum(g.num_weights for g in problem.searched)
    assert bits / weights <= 6.0
    following = order[larger.index(False)]
    more = formats | {following: "wint8_afp16"}
    assert sum(g.cost(more[g.name], "storage") for g in problem.searched) * 8 / weights > 6.0


def test_tools_round_by_themselves_so_plain_rounding_comes_nearest(tmp_path: Path) -> None:
    menu = ("wint4_afp16", "wint4_afp16:max", "wint8_afp16:weighted", "wint8_afp16")
    run = put_scored_run(tmp_path / "run", formats=menu, num_layers=1)
    solve_run(run, SolveOptions(bits=6.0), folder="")
    modules = [
        m for g in ScoredRun.read(RunState.open(run)).problem.searched for m in g.module_names
    ]
    formats = rival(run, put(tmp_path, dict.fromkeys(modules, "W4A16") | {modules[0]: "W8A16"}))
    assert set(formats.values()) == {"wint4_afp16:max", "wint8_afp16"}
    formats = rival(run, put(tmp_path, [[name, 1.0] for name in modules]))
    assert set(formats.values()) == {"wint4_afp16:max", "wint8_afp16"}


def test_imported_allocation_is_a_solution_and_a_rival(run: RunDirectory, tmp_path: Path) -> None:
    path = put(tmp_path, {"bits": 8, "group_size": 64, "mode": "affine", "lm_head": False})
    words = ["import", path, "--into", run.uri, "--name", "theirs"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    rows = run.read_table("solutions/theirs/manifest.parquet").to_pylist()
    assert {r["format"] for r in rows if "layers" in r["module"]} == {"wint8_afp16"}
    manifest = run.read_json("solutions/theirs/manifest.json")
    assert manifest["imported_from"] == "Their Plan.json"
    assert manifest["stability"] is None
    _, candidate = collect_candidates(ScoredRun.read(RunState.open(run)), "", ("theirs",))
    assert (candidate.name, candidate.formats["lm_head"]) == ("solution theirs", "none")


def test_import_replaces_nothing_of_the_run(run: RunDirectory, tmp_path: Path) -> None:
    solution = Run.open(run.uri).solutions[0]
    lines = {
        solution: "is a solution of the run itself; give another --name",
        "../theirs": "--name '../theirs' is no name of a solution",
        "": "--name '' is no name of a solution",
    }
    before = [run.read_bytes(f"{start}manifest.json") for start in ("", f"solutions/{solution}/")]
    for name, line in lines.items():
        words = ["import", put(tmp_path, {"lm_head": "W4A16"}), "--into", run.uri, "--name", name]
        result = CliRunner().invoke(main, words)
        assert (result.exit_code, line in result.output) == (2, True)
    after = [run.read_bytes(f"{start}manifest.json") for start in ("", f"solutions/{solution}/")]
    assert after == before
    assert not run.exists("theirs/manifest.json")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not readable JSON"),
        ([], "has no sensitivity of"),
        ([["lm_head", "high"]], "is not a layer's name and its sensitivity"),
        ([["model.layers.9.mlp.up_proj", 1]], "names 'model.layers.9.mlp.up_proj', which is no"),
        ({"model.layers.7.x": {"bits": 4}}, "names 'model.layers.7.x', which fits no layer"),
        ({"lm_head": {"bits": 3}}, "lm_head has {'bits': 3}, and no format of the run has that"),
        ({"lm_head": {"group_size": 3}}, "says no bits"),
        ({"bits": 5, "group_size": 64}, "no format of the run has that (it could take wint4_afp16"),
        ({"bits": 4, "lm_head": 3}, "'lm_head': 3 is neither true, false nor parameters"),
        ("3", "is neither AutoRound's layer_config nor mlx-lm's"),
        ('{"lm_head": {"bits": 4}, "lm_head": {"bits": 8}}', "lm_head is there twice; keep one"),
        ('[["lm_head", NaN]]', "is not a layer's name and its sensitivity"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
            "a config of 'modelopt' says no bits of layers; give a file of AutoRound",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "a config of 'fp8' says no"),
        ({"quant_method": "auto-round", "bits": 4, "extra_config": [1]}, "extra_config [1] is no"),
        ({"quant_method": "gptq", "bits": "4"}, "bits '4': bits must be a whole number"),
        ({"quant_method": "awq", "bits": None}, "bits None: bits must be a whole number"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": "x"}, "dynamic 'x' is no mapping"),
        (
            {"quant_method": "awq", "bits": 4, "modules_to_not_convert": "lm_head"},
            "modules_to_not_convert 'lm_head' is no list",
        ),
        ({"lm_head": {"bits": 4, "sym": False}}, "the weights of lm_head are asymmetric"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "are asymmetric, and formats"),
    ],
)
def test_file_that_does_not_fit_is_one_line(
    run: RunDirectory, tmp_path: Path, content: Any, line: str
) -> None:
    result = CliRunner().invoke(main, ["import", put(tmp_path, content), "--into", run.uri])
    assert result.exit_code == 2
    assert line in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not run.exists("solutions/their-plan/manifest.json")


def test_import_needs_one_target(run: RunDirectory, tmp_path: Path) -> None:
    path = put(tmp_path, {"lm_head": "W4A16"})
    for words in ([], ["--out", "x", "--into", run.uri]):
        result = CliRunner().invoke(main, ["import", path, *words])
        assert result.exit_code == 2
        assert "give --out DIR for a ModelOpt manifest, or --into RUN" in result.output
    result = CliRunner().invoke(main, ["import", path, "--out", str(tmp_path / "x")])
    assert "goes into a scanned run: --into RUN" in result.output


def test_unknown_rival_names_what_there_is(run: RunDirectory) -> None:
    result = CliRunner().invoke(main, ["evaluate", run.uri, "--against", "nothing"])
    assert result.exit_code == 2
    assert "--against 'nothing' is unknown; known: uniform, modelopt" in result.output


def test_larger_rival_from_elsewhere_is_no_reason_for_concern() -> None:
    row: dict[str, Any] = {"name": "solution", "dataset": "d", "weight_bytes": 10}
    row |= {"kl_mean": 0.2, "predicted_kl": 0.2}
    other = row | {"kl_mean": 0.1, "kl_above_solution": -0.1, "kl_above_solution_stderr": 0.0}

    def titles(**changes: Any) -> list[str]:
        evidence = Evidence(predicted=0.2, stderr=None, effective_bits=6, choices=[])
        evidence = dataclasses.replace(evidence, measured=[[row, other | changes]])
        return [concern.title for concern in find_concerns(evidence)]

    assert titles(name="file x.json", weight_bytes=11) == []
    assert titles(name="file x.json", weight_bytes=10) == ["Another allocation loses less"]
    assert titles(name="modelopt", weight_bytes=11) == ["Another allocation loses less"]
