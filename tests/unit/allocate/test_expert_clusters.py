"""Experts in clusters: which, what they share, and other numbers of them from the same run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from families import family_model
from written_runs import made_up_config

from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.expert_clusters import clusters
from autoquant_ray.allocate.frontier import frontier_of, rounded_up
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun, solution_formats, solution_options
from autoquant_ray.allocate.search import search
from autoquant_ray.cli.main import main
from autoquant_ray.compare.runs import compare_runs
from autoquant_ray.errors import ConfigError, ScoreError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.calibration import calibration_of_maxima
from autoquant_ray.report.content import collect_content
from autoquant_ray.report.expert_rows import by_format
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.solve import solve_run
from autoquant_ray.stages.score import write_plan

FORMATS = ("wint4_afp16", "wfp8_afp8", "wfp8_afp16")
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
SILENT = f"{LAYERS[1]}.2"


@pytest.mark.parametrize("count", [1, 2, 3, 6, 9])
def test_clusters_have_least_squares_of_all_partitions(count: int) -> None:
    values = np.random.default_rng(count).normal(size=7).round(1)
    named = {f"e{n}": float(v) for n, v in enumerate(values)}

    def spread(parts: Any) -> float:
        return sum(float(np.var(part) * len(part)) for part in parts)

    ordered = np.sort(values)
    cuts = itertools.combinations(range(1, 7), min(count, 7) - 1)
    best = min(spread(np.split(ordered, list(cut))) for cut in cuts)
    groups = clusters(named, count)
    assert sorted(itertools.chain(*groups)) == sorted(named)
    assert len(groups) == min(count, 7)
    assert spread([[named[name] for name in group] for group in groups]) == pytest.approx(
        best, abs=1e-12
    )


@pytest.fixture(scope="module")
def scored(make_spec: Any, make_samples: Any) -> Any:
    """A plan with experts apart, and the scores of three shards; one expert saw no token."""
    model = family_model("Qwen3-MoE")
    plan = build_plan(model, resolve_formats(FORMATS, device="cpu"), expert_groups=2)
    scorer = Scorer(make_spec(plan), model=model)
    names = [module.name for group in plan.searched for module in group.modules]
    calibration = calibration_of_maxima({(name, "input_amax"): 8.0 for name in names})
    shards = [scorer.score(make_samples([20, 20], seed=n), 0, calibration) for n in range(3)]
    return plan, [_without(shard, plan, SILENT) for shard in shards]


def _without(shard: Any, plan: Any, expert: str) -> Any:
    """The same where an expert saw nothing."""
    number = [group.name for group in plan.searched].index(expert)
    rows_G = shard.sums.num_rows_G.copy()
    rows_G[number] = 0
    tokens = dict(shard.sums.expert_tokens) | {expert: [0]}
    sums = dataclasses.replace(shard.sums, num_rows_G=rows_G, expert_tokens=tokens)
    return dataclasses.replace(shard, sums=sums)


@pytest.fixture
def expert_run(scored: Any, write_run: Any, tmp_path: Path) -> Any:
    """The run of a scan with two clusters, solved."""

    def build(shards: Any = None, **more: Any) -> RunDirectory:
        plan, bits = scored[0], 8.0
        config = made_up_config(
            "qwen3_moe", tmp_path / "run", FORMATS, bits=bits, expert_groups="2"
        )
        identity = {
            "model": {"name": "qwen3_moe", "fingerprint": "model"},
            "dataset": {
                "name": "made-up.txt",
                "max_samples": 128,
                "seq_len": 512,
                "counts": {"read": 6, "used": 6, "empty": 0, "too_short": 0, "cut": 0},
                "num_samples": 6,
                "num_tokens": 120,
                "num_shards": 3,
                "tokens_sha256": "tokens",
            },
            "fingerprints": {"model": "model", "data": "data"},
        }
        directory: RunDirectory = write_run(config, plan, identity, shards or scored[1], **more)
        solve_run(directory, SolveOptions(bits=bits, expert_groups=2), folder="")
        return directory

    return build


def _formats(directory: RunDirectory, start: str) -> dict[str, str]:
    state = RunState.open(directory)
    return solution_formats(state, start, ScoredRun.read(state).problem)


def _experts(formats: dict[str, str], layer: str) -> list[str]:
    return [name for group, name in formats.items() if group.startswith(f"{layer}.")]


def test_number_of_clusters_is_solved_again_and_recorded(expert_run: Any) -> None:
    directory = expert_run()
    losses = {}
    for asked in (None, "layer", 3, "expert"):
        solution = solve_run(directory, SolveOptions(bits=6, expert_groups=asked))
        name = "bits-6.00" if asked is None else f"bits-6.00-experts-{asked}"
        assert solution.name == name
        manifest = directory.read_json(f"solutions/{name}/manifest.json")
        assert manifest["budget"]["expert_groups"] == (2 if asked is None else asked)
        options = solution_options(RunState.open(directory), f"solutions/{name}/")
        assert options.expert_groups == (2 if asked is None else asked)
        losses[asked] = solution.summary["predicted_kl_nats"]
        most = {None: 2, "layer": 1, 3: 3, "expert": 4}[asked]
        for layer in LAYERS:
            assert len(set(_experts(solution.formats, layer)) - {"none"}) <= most
        problem = ScoredRun.read(RunState.open(directory)).problem
        for tie in problem.experts.ties(asked):
            assert len({solution.formats[group] for group in tie}) == 1
    assert losses["expert"] <= losses[3] <= losses[None] <= losses["layer"]
    assert losses["expert"] < losses["layer"]


def test_expert_without_tokens_stays_in_16_bits_and_is_named(expert_run: Any) -> None:
    directory = expert_run()
    rows = directory.read_table("sensitivity.parquet").to_pylist()
    assert SILENT not in {row["group"] for row in rows}
    solution = solve_run(directory, SolveOptions(bits=5, expert_groups="layer"))
    assert solution.formats[SILENT] == "none"
    assert set(_experts(solution.formats, LAYERS[1])) != {"none"}
    report = directory.read_bytes(f"solutions/{solution.name}/report.md").decode()
    assert f"1 routed expert saw no token, the first {SILENT}" in report
    explanation = explain_group(directory, SILENT, solution.name)
    assert explanation.reason == "this expert saw no token, so that it has no score"


def test_shards_are_read_by_name_where_an_expert_has_no_score(
    scored: Any, expert_run: Any, tmp_path: Path
) -> None:
    """Parts have its rows, ``sensitivity.parquet`` has not."""
    plan, shards = scored
    before = expert_run([shards[0]] * 3)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    last = plan.searched[-1].name
    assert before.read_table("sensitivity.parquet").column("group")[-1].as_py() == last
    sums = shards[0].sums
    elementwise_GF = sums.elementwise_GF.copy()
    elementwise_GF[-1] *= 1.5
    louder = dataclasses.replace(sums, elementwise_GF=elementwise_GF)
    after = expert_run([dataclasses.replace(shards[0], sums=louder)] * 3, mode="overwrite")
    comparison = compare_runs(RunDirectory(str(tmp_path / "before")), after)
    assert comparison.test == "paired"
    assert [moved.group for moved in comparison.moved] == [last]

    explanation = json.loads(
        CliRunner().invoke(main, ["explain", after.uri, f"{LAYERS[0]}.1", "--json"]).stdout
    )
    assert explanation["without_shard"]
    assert all(entry["format"] is not None for entry in explanation["without_shard"])


def test_plan_that_is_written_again_knows_the_expert_without_tokens(
    scored: Any, expert_run: Any
) -> None:
    state = RunState.open(expert_run())
    fingerprint = state.record.stages["plan"]["fingerprint"]
    Path(state.directory.path("plan.parquet")).unlink()
    write_plan(state, scored[0], fingerprint)
    problem = ScoredRun.read(RunState.open(state.directory)).problem
    assert not problem.groups[SILENT].is_searched


def test_layer_without_tokens_is_an_error(scored: Any, expert_run: Any) -> None:
    plan, shards = scored
    for number in range(4):
        shards = [_without(shard, plan, f"{LAYERS[1]}.{number}") for shard in shards]
    with pytest.raises(ScoreError, match=r"4 group\(s\) received no gradient"):
        expert_run(shards)


def test_domain_that_never_visits_an_expert_loses_nothing_there(expert_run: Any) -> None:
    directory = expert_run(domains=("code", "code", "talk"))
    rows = directory.read_table("domain_sensitivity.parquet").to_pylist()
    assert {row["domain"] for row in rows} == {"code", "talk"}
    assert SILENT not in {row["group"] for row in rows}
    weights = {"code": 1.0, "talk": 3.0}
    solution = solve_run(directory, SolveOptions(bits=6, domains=weights))
    assert solution.summary["is_satisfied"]
    with pytest.raises(ConfigError, match="cannot be solved for clusters of experts"):
        solve_run(directory, SolveOptions(bits=6, worst_domain=True))


def test_engine_gives_a_layers_experts_one_format(expert_run: Any) -> None:
    directory = expert_run()
    budgets = [SolveOptions(bits=bits, expert_groups="expert") for bits in (5, 6, 7, 9, 12)]
    apart = [solve_run(directory, budget).formats for budget in budgets]
    assert any(len(set(_experts(formats, layer))) > 1 for formats in apart for layer in LAYERS)
    asked = {"bits": 14.5, "engine": "trtllm", "gpu": "hopper"}
    formats = solve_run(directory, SolveOptions(**asked, expert_groups="expert")).formats
    for layer in LAYERS:  # int4 does not fit rows of so few weights, and FP8 not single experts
        assert _experts(formats, layer) == ["none"] * 4


def test_commands_take_runs_with_clusters(expert_run: Any) -> None:
    directory = expert_run()
    assert len(frontier_of(directory, 5)) > 2
    run = directory.uri
    for words in (
        ["explain", run, f"{LAYERS[0]}.1"],
        ["explain", run, f"{LAYERS[0]}.1", "--json"],
        ["frontier", run, "--points", "4"],
        ["report", run],
    ):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    asked = ["solve", run, "--bits", "5", "--expert-groups", "4", "--json"]
    solution = json.loads(CliRunner().invoke(main, asked).stdout)
    assert solution["name"] == "bits-5.00-experts-4"
    command = directory.read_bytes("solutions/bits-5.00-experts-4/report.md").decode()
    assert "--expert-groups 4" in command


@pytest.mark.parametrize("value", ["1", "0", "-2", "many", "2.5"])
def test_bad_numbers_of_clusters_are_refused(value: str, expert_run: Any) -> None:
    run = expert_run().uri
    result = CliRunner().invoke(main, ["solve", run, "--bits", "6", "--expert-groups", value])
    assert result.exit_code == 2
    assert f"{value!r} must be 'layer', 'expert', or a number of clusters" in result.stderr
    with pytest.raises(ConfigError, match="number of clusters per layer of at least 2"):
        SolveOptions(**{"bits": 6, "expert_groups": value})


def test_run_scored_by_layer_has_no_single_experts(make_run: Any) -> None:
    directory = make_run("qwen3_moe")
    with pytest.raises(ConfigError, match="scan the model again with `expert_groups` expert"):
        solve_run(directory, SolveOptions(bits=6, expert_groups="expert"))
    assert solve_run(directory, SolveOptions(bits=6, expert_groups="layer")).summary["is_satisfied"]


@pytest.mark.parametrize("tool", ["llama.cpp", "mlx-lm", "auto-round"])
def test_recipes_of_mixed_experts_only_for_tools_with_linears(
    tool: str, expert_run: Any, tmp_path: Path
) -> None:
    directory = expert_run()
    pins = {f"{LAYERS[0]}.{n}": "none" if n else "wint4_afp16" for n in range(4)}
    allow = {"*": ("wint4_afp16", "none")}
    options = SolveOptions(bits=12, pins=pins, allow=allow, expert_groups="expert")
    name = solve_run(directory, options).name
    out = tmp_path / "recipe"
    words = ["export", directory.uri, "--solution", name, "--format", "recipe", "--tool", tool]
    result = CliRunner().invoke(main, [*words, "--out", str(out)])
    if tool == "auto-round":
        assert result.exit_code == 0, result.output
        recipe = json.loads(out.read_text())
        bits = {n: recipe[f"{LAYERS[0]}.{n}.gate_proj"]["bits"] for n in range(4)}
        assert bits == {0: 4, 1: 16, 2: 16, 3: 16}
        return
    assert result.exit_code == 2
    assert f"{tool} holds the experts of a layer in one format" in result.stderr
    assert f"{LAYERS[0]}" in result.stderr
    assert not out.exists()


def test_rows_of_experts_are_shown_by_format(expert_run: Any) -> None:
    directory = expert_run()
    content = collect_content(ScoredRun.read(RunState.open(directory)), "")
    names = [layer.name for layer in content.layers]
    formats = _formats(directory, "")
    kinds = sum(len(set(_experts(formats, layer))) for layer in LAYERS)
    shown = [name for name in names if ".experts." in name]
    assert len(shown) == kinds + 1  # the expert without a token stands apart
    assert sum(row.num_bytes for row in content.groups) == pytest.approx(
        sum(layer.size_bytes for layer in content.layers)
    )
    assert f"{LAYERS[1]}.{{2}}" in shown
    assert content.heat is not None
    assert by_format(content.groups, {}) == content.groups


@pytest.mark.parametrize("asked", [None, "layer", 3, "expert"])
def test_curve_of_the_report_is_the_best_that_the_clusters_can_reach(
    asked: Any, expert_run: Any
) -> None:
    directory = expert_run()
    solution = solve_run(directory, SolveOptions(bits=6, expert_groups=asked))
    state = RunState.open(directory)
    content = collect_content(ScoredRun.read(state), f"solutions/{solution.name}/")
    curve = [dot for dot in content.dots if dot.kind in ("curve", "knee")]
    assert len(curve) > 5
    scored_run = ScoredRun.read(state)
    problem, scores = scored_run.problem, scored_run.scores
    for dot in curve:
        options = SolveOptions(bits=rounded_up(dot.bits), expert_groups=asked)
        assert dot.loss == pytest.approx(search(problem, scores, options).score, rel=1e-9)
