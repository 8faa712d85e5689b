"""Searches for an engine: against all allocations that it could serve, and by the command line."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scored_run import put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun, solution_options
from autoquant_ray.allocate.search import search, served_problem
from autoquant_ray.api import Run
from autoquant_ray.cli.main import main
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.swaps import Swaps
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.menu import PAIRS
from autoquant_ray.report.concerns import find_concerns
from autoquant_ray.report.evidence import Evidence
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.serving.menus import why_unserved
from autoquant_ray.serving.rules import named, violations
from autoquant_ray.serving.table import layouts_of

_FP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_PER_TOKEN = {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}}
FORMATS = {
    name: Format(name=name, weight=weight, input=inputs, modelopt_compression=0.5)
    for name, (weight, inputs) in {
        "fp8": PAIRS["wfp8_afp8"],
        "int4": PAIRS["wint4_afp16"],
        "int8": PAIRS["wint8_aint8"],
        "nvfp4": (_FP4, _FP4),
        "w4a16_nvfp4": (_FP4, None),
        "odd": PAIRS["wint4_aint4"],
        "fp8_rows": ({"num_bits": (4, 3), "axis": 0}, _PER_TOKEN),
        "nvfp4_32": tuple([{**_FP4, "block_sizes": {**_FP4["block_sizes"], -1: 32}}] * 2),  # type: ignore[dict-item]
    }.items()
}
_BYTES = {"fp8": 8, "int4": 4.125, "int8": 8, "nvfp4": 4.5, "w4a16_nvfp4": 4.5, "nvfp4_32": 4.25}
LAYER = "model.layers.0."
DENSE = {
    "q": [f"{LAYER}self_attn.{p}_proj" for p in "qkv"],
    "o": [f"{LAYER}self_attn.o_proj"],
    "down": [f"{LAYER}mlp.down_proj"],
    "lm_head": ["lm_head"],
}
MLA = {
    "q_a": [f"{LAYER}self_attn.q_a_proj"],
    "kv_a": [f"{LAYER}self_attn.kv_a_proj_with_mqa"],
    "o": [f"{LAYER}self_attn.o_proj"],
    "expert 0": [f"{LAYER}mlp.experts.0.{p}_proj" for p in ("gate", "up", "down")],
    "expert 1": [f"{LAYER}mlp.experts.1.{p}_proj" for p in ("gate", "up", "down")],
}
SHARED = {
    "experts": [f"{LAYER}mlp.experts"],
    "shared": [f"{LAYER}mlp.shared_expert.{p}_proj" for p in ("gate", "up")],
    "shared down": [f"{LAYER}mlp.shared_expert.down_proj"],
    "o": [f"{LAYER}self_attn.o_proj"],
}


def make_problem(groups: dict[str, list[str]], menu: list[str], seed: int) -> tuple[Problem, Any]:
    """Groups of random sizes with random scores."""
    random = np.random.default_rng(seed)
    rows, scores = [], {}
    for group, modules in groups.items():
        weights = int(random.integers(1, 9)) * 64
        for format_ in [*menu, NONE]:
            bits = 16.0 if format_ == NONE else float(_BYTES.get(format_, 8))
            rows.append(
                {
                    "group": group,
                    "format": format_,
                    "module_names": modules,
                    "num_weights": weights,
                    "weight_bits": bits,
                    "weight_bytes": bits * weights / 8,
                    "modelopt_cost": bits * weights / 16,
                    "is_searched": True,
                }
            )
            scores[group, format_] = float(random.random() * 2 ** (8 - bits))
    summary = {
        "formats": [FORMATS[name].to_json() for name in menu],
        "tied_groups": [],
        "other_bytes": 0,
        "modules": {},
    }
    return Problem.from_plan(rows, summary), scores


def best_by_hand(problem: Problem, scores: Any, options: SolveOptions) -> float:
    """The least score of all allocations that fit and that the engine would serve as exported."""
    groups = problem.searched
    (budget,) = problem.budgets(options)
    best = math.inf
    for names in itertools.product(*(group.rows for group in groups)):
        allocation = {group.name: name for group, name in zip(groups, names, strict=True)}
        cost = sum(group.cost(allocation[group.name], budget.resource) for group in groups)
        if cost > budget.limit * (1 + 1e-12) or not is_served(groups, allocation, options):
            continue
        best = min(best, sum(scores[pair] for pair in allocation.items() if pair[1] != NONE))
    return best


def is_served(groups: Any, allocation: dict[str, str], options: SolveOptions) -> bool:
    """Whether some layout of the engine holds an allocation as it was chosen."""
    engine = str(options.engine)
    for layout in layouts_of(engine):
        algos = {name: named(format_, layout) for name, format_ in FORMATS.items()} | {NONE: None}
        layers = {m: algos[allocation[g.name]] for g in groups for m in g.module_names}
        has_names = all(name == NONE or algos[name] for name in allocation.values())
        if has_names and not violations(layers, engine, options.gpu, layout=layout):
            return True
    return False


@pytest.mark.parametrize(
    ("groups", "menu", "engine", "gpu"),
    [
        (DENSE, ["fp8", "int4", "int8"], "vllm", "hopper"),  # by compressed-tensors
        (DENSE, ["fp8", "int4", "nvfp4_32"], "vllm", "blackwell"),  # each in a layout of its own
        (SHARED, ["fp8", "int4", "int8"], "vllm", "hopper"),  # no int8 inputs of experts
        (DENSE, ["fp8", "nvfp4", "w4a16_nvfp4"], "vllm", "hopper"),
        (DENSE, ["fp8", "nvfp4", "fp8_rows"], "vllm", "ada"),  # mixed, or rows of fp8 alone
        (DENSE, ["fp8", "nvfp4", "nvfp4_32"], "vllm", "blackwell"),  # two group sizes
        (DENSE, ["fp8", "int4"], "sglang", "hopper"),
        (DENSE, ["fp8", "nvfp4"], "sglang", "blackwell"),
        (DENSE, ["fp8", "int4"], "trtllm", "ada"),
        (MLA, ["fp8", "nvfp4"], "vllm", "blackwell"),  # tied across groups
        (MLA, ["fp8", "nvfp4"], "sglang", None),
    ],
)
def test_search_finds_the_best_of_all_allocations_that_are_served(
    groups: dict[str, list[str]], menu: list[str], engine: str, gpu: str | None
) -> None:
    for seed, bits in itertools.product(range(3), (5.0, 8.5, 12.0, 16.0)):
        problem, scores = make_problem(groups, menu, seed)
        options = SolveOptions(bits=bits, engine=engine, gpu=gpu)
        best = best_by_hand(problem, scores, options)
        if math.isinf(best):
            with pytest.raises(InfeasibleBudgetError, match=f"that {engine}.*serves together"):
                search(problem, scores, options)
            continue
        assert search(problem, scores, options).score == pytest.approx(best, rel=1e-9)


def test_experts_never_stay_behind_neighbours_that_vllm_would_read_them_by() -> None:
    for seed, bits in itertools.product(range(5), (6.0, 9.0, 12.0, 15.0)):
        problem, scores = make_problem(SHARED, ["fp8", "nvfp4"], seed)
        options = SolveOptions(bits=bits, engine="vllm", gpu="b200")
        allocation = search(problem, scores, options)
        assert served_problem(problem, options, allocation.formats).served is not None
        assert allocation.score >= best_by_hand(problem, scores, options) - 1e-12


def test_moves_of_a_refinement_keep_what_the_engine_needs() -> None:
    problem, scores = make_problem(MLA, ["fp8", "nvfp4"], 0)
    options = SolveOptions(bits=10, engine="vllm", gpu="blackwell")
    formats = search(problem, scores, options).formats
    served = served_problem(problem, options, formats)
    swaps = Swaps(served, scores, options)
    changes = list(swaps.proposals(formats))
    assert {group for change in changes for group, _ in change} == {"o"}
    for change in changes:
        served_problem(problem, options, formats | dict(change))


def test_menu_of_which_nothing_is_served_is_refused_with_the_remedy() -> None:
    problem, scores = make_problem(DENSE, ["int4", "int8"], 0)
    with pytest.raises(
        ConfigError, match=r"sglang on hopper serves no format.*int4: sglang on hopper does not"
    ) as e:
        search(problem, scores, SolveOptions(bits=8, engine="sglang", gpu="h100"))
    assert "choose another `engine` or `gpu`" in str(e.value)
    assert "\n" not in str(e.value)


def test_pin_that_the_engine_does_not_serve_is_refused() -> None:
    problem, scores = make_problem(DENSE, ["fp8", "int4"], 0)
    options = SolveOptions(bits=12, engine="sglang", pins={"o": "int4"})
    with pytest.raises(ConfigError, match="group 'o' is to take int4, and sglang serves there fp8"):
        search(problem, scores, options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A scored run with int4, fp8 and int8."""
    folder = tmp_path_factory.mktemp("engines") / "run"
    menu = ("wint4_afp16", "wfp8_afp8", "wint8_aint8")
    directory = put_scored_run(folder, num_layers=2, formats=menu)
    Run.open(str(folder)).solve(bits=10.0)
    return directory


def invoke(*words: str) -> Any:
    """Run the command line."""
    return CliRunner().invoke(main, list(words))


def test_solve_for_an_engine_writes_an_allocation_that_it_serves(run: RunDirectory) -> None:
    result = invoke(
        "solve", run.uri, "--bits", "9", "--engine", "trtllm", "--gpu", "H100", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["name"] == "bits-9.00-trtllm-hopper"
    folder = "solutions/bits-9.00-trtllm-hopper/"
    manifest = run.read_json(f"{folder}manifest.json")
    assert (manifest["budget"]["engine"], manifest["budget"]["gpu"]) == ("trtllm", "hopper")
    rows = run.read_table(f"{folder}manifest.parquet").to_pylist()
    used = {row["format"] for row in rows}
    assert used <= {"wint4_afp16", "wfp8_afp8", NONE}
    assert next(row["format"] for row in rows if row["group"] == "lm_head") == NONE
    report = Path(run.uri, folder, "report.md").read_text()
    assert "served by trtllm on hopper" in report
    assert "--engine trtllm --gpu hopper" in report
    options = solution_options(RunState.open(run), folder)
    assert (options.engine, options.gpu) == ("trtllm", "hopper")


def test_rivals_and_explanations_keep_to_the_engine(run: RunDirectory) -> None:
    solution = Run.open(run.uri).solve(bits=9.5, engine="trtllm", gpu="hopper")
    state, start = RunState.open(run), f"solutions/{solution.name}/"
    rivals = collect_candidates(ScoredRun.read(state), start, ("uniform", "modelopt"), num_random=1)
    assert "uniform wint8_aint8" not in {rival.name for rival in rivals}
    assert all("wint8_aint8" not in rival.formats.values() for rival in rivals)
    explanation = Run.open(run.uri).explain("0.mlp.down_proj", solution=solution.name)
    assert explanation.budget == "--bits 9.5 --engine trtllm --gpu hopper"
    by_name = {entry.format: entry for entry in explanation.formats}
    assert "trtllm on hopper serves there" in (by_name["wint8_aint8"].flip.reason or "")
    assert by_name["wfp8_afp8"].flip.reason is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--engine", "tgi"), "--engine 'tgi' is unknown; known: vllm, sglang, trtllm"),
        (("--gpu", "hopper"), "--gpu hopper needs an engine"),
        (("--engine", "vllm", "--gpu", "v100"), "--gpu 'v100' is unknown; known: ampere"),
        (
            ("--engine", "sglang", "--gpu", "ampere"),
            "sglang on ampere serves no format of the menu (wint4_afp16: sglang on ampere does not",
        ),
    ],
)
def test_wrong_engine_or_gpu_is_one_line(
    run: RunDirectory, words: tuple[str, ...], line: str
) -> None:
    result = invoke("solve", run.uri, "--bits", "9", *words)
    assert result.exit_code == 2
    assert line in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_budget_below_what_the_engine_serves_names_its_formats(run: RunDirectory) -> None:
    result = invoke("solve", run.uri, "--bits", "5", "--engine", "sglang", "--gpu", "hopper")
    assert result.exit_code == 4
    assert "formats that sglang on hopper serves together: wfp8_afp8" in result.output
    result = invoke("solve", run.uri, "--bits", "2", "--engine", "vllm", "--gpu", "hopper")
    assert result.exit_code == 4  # of its two layouts, the one that reaches further
    assert result.output.strip().endswith("together: wint4_afp16, wfp8_afp8, wint8_aint8")


@pytest.mark.parametrize(
    ("chosen", "engine", "expected"),
    [
        ({"o": "fp8", "down": "int4"}, None, None),  # trtllm, and vllm by compressed-tensors
        ({"o": "fp8", "down": "int8"}, None, None),
        ({"o": "int8"}, None, None),
        ({"o": "fp8", "down": "odd"}, None, "serves odd in a checkpoint of several formats"),
        ({"o": "odd"}, None, "serves odd ("),
        ({"o": "int4", "down": "nvfp4_32"}, None, "serves int4 and nvfp4_32 together"),
        ({"o": "fp8", "down": "int4"}, "vllm", None),
        ({"o": "fp8", "down": "int4"}, "sglang", "down: sglang does not serve W4A16_AWQ"),
        ({"o": "fp8", "down": NONE}, "vllm", None),
    ],
)
def test_report_says_what_no_engine_serves(
    chosen: dict[str, str], engine: str | None, expected: str | None
) -> None:
    modules = {"q": DENSE["q"], "o": ["model.layers.0.self_attn.o_proj"], "down": DENSE["down"]}
    reason = why_unserved(modules, chosen, list(FORMATS.values()), engine, None)
    assert (reason is None) == (expected is None)
    assert expected is None or expected in (reason or "")
    evidence = Evidence(predicted=1.0, stderr=None, effective_bits=8, choices=[], unserved=reason)
    titles = [concern.title for concern in find_concerns(evidence)]
    assert titles == ([] if expected is None else ["No engine serves it as it is"])
