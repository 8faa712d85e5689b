"""KV-cache formats from the plan to a solution: costs, budgets, engines, reports, refusals."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
from click.testing import CliRunner
from families import family_model
from written_runs import made_up_run

from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.frontier import frontier_of, smallest_within
from autoquant_ray.allocate.load import latency_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.quant_cfg import cache_entries
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.cli.main import main
from autoquant_ray.cli.output import print_explanation, print_plan, print_solution
from autoquant_ray.compare.runs import compare_runs
from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import (
    ConfigError,
    FormatError,
    InfeasibleBudgetError,
    ModelError,
)
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.swaps import Swaps
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.kv_cache import KV_FORMATS, KV_PRESETS
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.report.content import collect_content
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.serving.kv_cache import CACHE_TABLE
from autoquant_ray.solve import solve_run

FORMATS = ("wint4_afp16", "wfp8_afp8", "kv_fp8", "kv_nvfp4")
CACHES = ["model.layers.0.self_attn.kv", "model.layers.1.self_attn.kv"]
FIELDS = {"model": "m", "data": "d", "out": "o", "bits": 8.0, "device": "cpu", "dtype": "float32"}


def plan_of(family: str, disable: tuple[str, ...] = ()) -> Plan:
    return build_plan(family_model(family), resolve_formats(FORMATS, device="cpu"), disable)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A scored run of a small Llama, its own budget solved."""
    disable = ("*mlp*", "lm_head")
    folder = tmp_path_factory.mktemp("run")
    fields = FIELDS | {"out": str(folder), "formats": FORMATS, "kv_bytes_per_token": 160}
    config = ScanConfig(**fields, disable=disable)
    directory = made_up_run(config, plan_of("Llama", disable), "Llama", "model", num_shards=8)
    solve_run(directory, SolveOptions(bits=8, kv_bytes_per_token=160), folder="")
    return directory


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", sorted(KV_PRESETS))
def test_attributes_are_those_of_modelopt(name: str) -> None:
    (entry,) = getattr(mtq, name)["quant_cfg"]
    assert entry["quantizer_name"] == "*[kv]_bmm_quantizer"
    assert entry["cfg"] == KV_FORMATS[KV_PRESETS[name]]


def test_rows_of_the_plan() -> None:
    plan = plan_of("Llama")
    rows = {(row["group"], row["format"]): row for row in plan.rows()}
    # 2 heads of 16 for keys and values each; NVFP4 adds a scale of 8 bits per 16 elements
    sizes = {NONE: 128.0, "kv_fp8": 64.0, "kv_nvfp4": 36.0}
    bits = {NONE: 16.0, "kv_fp8": 8.0, "kv_nvfp4": 4.5}
    for (group, format_), row in rows.items():
        if group not in CACHES:
            assert row["kv_bytes_per_token"] == 0
            assert not format_.startswith("kv_")
            continue
        assert row["kv_bytes_per_token"] == sizes[format_]
        assert row["weight_bits"] == bits[format_]
        assert row["num_weights"] == row["weight_bytes"] == row["modelopt_cost"] == 0
        assert row["module_names"] == [group.removesuffix(".kv")]
    assert [group for group, format_ in rows if format_ == NONE][-2:] == CACHES
    assert plan.kv_range() == (72.0, 256.0)


def test_keys_and_values_apart_take_the_bytes_and_quantizers_of_each() -> None:
    apart, fp8, nvfp4 = resolve_formats(("kv_fp8_nvfp4", "kv_fp8", "kv_nvfp4"), device="cpu")
    keys, values = cache_entries("a", apart)
    assert keys == cache_entries("a", fp8)[0] != cache_entries("a", nvfp4)[0]
    assert values == cache_entries("a", nvfp4)[1] != cache_entries("a", fp8)[1]
    assert Format.from_json(json.loads(json.dumps(apart.to_json()))) == apart
    plan = build_plan(family_model("Llama"), [*resolve_formats(FORMATS, device="cpu"), apart])
    rows = {(row["group"], row["format"]): row["kv_bytes_per_token"] for row in plan.rows()}
    # of keys 2 heads of 16 bytes; of values 2 of 8 bytes and one scale
    assert {rows[group, "kv_fp8_nvfp4"] for group in CACHES} == {32 + 18}


def test_without_cache_formats_nothing_changes() -> None:
    weights = resolve_formats(FORMATS[:2], device="cpu")
    plain, plan = build_plan(family_model("Llama"), weights), plan_of("Llama")
    assert plain.groups == tuple(group for group in plan.groups if not group.is_cache)
    assert not any(row["kv_bytes_per_token"] for row in plain.rows())
    assert plain.bits_range() == plan.bits_range()
    assert plain.other_bytes == plan.other_bytes


@pytest.mark.parametrize(
    ("family", "cached"),
    [
        ("Qwen3-Next", {"model.layers.1.self_attn.kv": ((2, 16), (2, 16))}),
        ("Nemotron-H", {"model.layers.1.mixer.kv": ((2, 16), (2, 16))}),
        ("Phi-3", dict.fromkeys(CACHES, ((2, 16), (2, 16)))),
        ("GPT-OSS", dict.fromkeys(CACHES, ((2, 16), (2, 16)))),
    ],
)
def test_attentions_that_have_a_cache(family: str, cached: dict[str, Any]) -> None:
    plan = plan_of(family)
    assert {g.name: g.modules[0].cached for g in plan.groups if g.is_cache} == cached


def test_vision_towers_and_shared_layers_have_none() -> None:
    names = [group.name for group in plan_of("Qwen3-VL").groups if group.is_cache]
    assert names == [f"model.language_model.layers.{n}.self_attn.kv" for n in (0, 1)]
    names = [group.name for group in plan_of("Gemma-3n").groups if group.is_cache]
    assert names == CACHES  # layers 2 and 3 read what these keep


@pytest.mark.parametrize("family", ["DeepSeek-V3", "Mamba-2"])
def test_model_without_such_a_cache_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=r"no attention whose cached keys.*leave kv_fp8, kv_nvfp4"):
        plan_of(family)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"formats": FORMATS}, "need a limit of their own.*give `kv_bytes_per_token`"),
        ({"formats": FORMATS[:2], "kv_bytes_per_token": 9}, "scan with `formats` kv_fp8,kv_nvfp4"),
        ({"formats": FORMATS, "kv_bytes_per_token": 0}, "must be a number above 0"),
        ({"formats": FORMATS, "kv_bytes_per_token": math.inf}, "must be a number above 0"),
        ({"formats": FORMATS[2:], "kv_bytes_per_token": 9}, "name a format of weights too"),
        ({"formats": FORMATS[3:], "kv_bytes_per_token": 9}, "kv_nvfp4 quantizes the KV cache"),
        (
            {"formats": FORMATS[:2], "expert_groups": "expert", "stop_when_stable": "1%"},
            "^`stop_when_stable` cannot judge experts apart.*or `expert_groups`$",
        ),
        (
            {"formats": FORMATS, "custom_formats": {"kv_fp8": {"weight": {"num_bits": 8}}}},
            "'kv_fp8' has the name of a KV-cache format",
        ),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        validate(ScanConfig, FIELDS | fields)


@pytest.mark.parametrize(("preset", "name"), sorted(KV_PRESETS.items()))
def test_presets_of_modelopt_name_our_formats(preset: str, name: str) -> None:
    with pytest.raises(FormatError, match=rf"{preset}.*use {name}$"):
        resolve_formats((preset,), device="cpu")


@pytest.mark.parametrize(("bits", "limit"), [(8, 160), (5, 72), (6.5, 101), (16, 256), (4.25, 140)])
def test_solution_is_that_of_brute_force(run: RunDirectory, bits: float, limit: float) -> None:
    scored_run = ScoredRun.read(RunState.open(run))
    problem, scores = scored_run.problem, scored_run.scores
    allocation = search(problem, scores, SolveOptions(bits=bits, kv_bytes_per_token=limit))
    weights = sum(group.num_weights for group in problem.searched)
    best = math.inf
    assert len(problem.searched) == 6
    for formats in itertools.product(*(group.rows for group in problem.searched)):
        rows = [g.rows[f] for g, f in zip(problem.searched, formats, strict=True)]
        stored = 8 * sum(row["weight_bytes"] for row in rows) / weights
        cached = sum(row["kv_bytes_per_token"] or 0.0 for row in rows)
        if stored <= bits and cached <= limit:
            names = [group.name for group in problem.searched]
            pairs = zip(names, formats, strict=True)
            best = min(best, math.fsum(scores[pair] for pair in pairs if pair[1] != NONE))
    assert allocation.score == pytest.approx(best, rel=1e-12)
    assert allocation.costs["kv_bytes_per_token"] <= limit


def test_what_cannot_be_met_names_the_range(run: RunDirectory) -> None:
    result = command("solve", run.uri, "--bits", 8, "--kv-bytes-per-token", 71)
    assert result.exit_code == 4
    assert "reachable is 72 to 256 bytes per token of context" in result.output
    for arguments, text in (
        (("--bits", 8), "give --kv-bytes-per-token N"),
        (("--bits", 8, "--kv-bytes-per-token", -1), "must be a number above 0"),
        (("--kv-bytes-per-token", 80), "give a budget: --bits B"),
        (("--bits", 8, "--kv-bytes-per-token", 80, "--pin", f"{CACHES[0]}=wfp8_afp8"), "pinned"),
        (("--bits", 8, "--kv-bytes-per-token", 80, "--pin", "model.layers.0.self_attn=none"), "kv"),
    ):
        result = command("solve", run.uri, *arguments)
        assert result.exit_code == 2
        assert text in result.output
        assert len(result.output.strip().splitlines()) == 1


def test_disabled_caches_count_in_16_bits() -> None:
    plan = plan_of("Llama", (CACHES[0],))
    assert [group.name for group in plan.searched if group.is_cache] == CACHES[1:]
    assert plan.kv_range() == (128.0 + 36.0, 256.0)
    with pytest.raises(ConfigError, match="nothing is left to search"):
        plan_of("Llama", ("*proj", "lm_head"))


def test_manifest_tells_mtq_quantize_which_caches(run: RunDirectory) -> None:
    manifest = run.read_json("manifest.json")
    assert manifest["budget"]["kv_bytes_per_token"] == 160
    assert manifest["solution"]["kv_bytes_per_token"] <= 160
    rows = run.read_table("manifest.parquet").to_pylist()
    chosen = {row["group"]: row["format"] for row in rows if row["group"] in CACHES}
    assert set(chosen.values()) & set(KV_FORMATS)
    entries = load_quantization_config(manifest, device="cuda")["quant_cfg"]
    for group, format_ in chosen.items():
        for part in "kv":
            name = f"{group.removesuffix('.kv')}.{part}_bmm_quantizer"
            configs = [entry["cfg"] for entry in entries if entry["quantizer_name"] == name]
            assert configs == ([] if format_ == NONE else [KV_FORMATS[format_]])


@pytest.mark.filterwarnings("ignore")
def test_reports_and_rivals_have_room_for_caches(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    state = RunState.open(run)
    content = collect_content(ScoredRun.read(state), "")
    assert "KV cache" in dict(content.facts)
    assert content.dots
    text = run.read_bytes("report.md").decode()
    assert "160 bytes of KV cache per token of context" in text
    assert f"| {CACHES[0]} | " in text.replace("\\", "")
    assert "bytes per token |" in text
    explanation = explain_group(run, "0.self_attn.kv")
    assert explanation.group == CACHES[0]
    assert {entry.kv_bytes for entry in explanation.formats} == {128.0, 64.0, 36.0}
    print_explanation(explanation)
    solution = solve_run(run, SolveOptions(bits=9, kv_bytes_per_token=100))
    assert solution.name == "bits-9.00-kv-100"
    text = run.read_bytes(f"solutions/{solution.name}/report.md").decode()
    assert re.search(r"\*\* The KV cache has .*; solve again with --engine\.$", text, re.MULTILINE)
    print_solution(run.uri, solution)
    shown = capsys.readouterr().out
    assert "64 B/token" in shown
    print_plan(plan_of("Llama"))
    shown = capsys.readouterr().out
    (row,) = (line.split() for line in shown.splitlines() if CACHES[0] in line)
    assert row == [CACHES[0], "0", "-", "-", "64", "36", "128", "B/token"]
    assert "kv_fp8 B/token" in shown
    assert "KV cache: 72 to 256 bytes per token of context" in shown
    names = [
        candidate.name
        for candidate in collect_candidates(
            ScoredRun.read(state), "", ("uniform", "modelopt", "random")
        )
    ]
    assert "uniform wint4_afp16" in names
    assert not any("kv_" in name for name in names)
    assert len(frontier_of(run, 5)) >= 2
    assert compare_runs(run, run).format_changes == []
    summary = run.read_json("manifest.json")["solution"]
    within = smallest_within(ScoredRun.read(RunState.open(run)), summary["score"])
    assert within.kv_bytes_per_token == 160
    with pytest.raises(InfeasibleBudgetError, match="limit on the KV cache alone"):
        smallest_within(ScoredRun.read(RunState.open(run)), 0.0)


def test_allocation_of_another_tool_leaves_caches_in_16_bits(
    run: RunDirectory, tmp_path: Path
) -> None:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps({"model.layers.0.self_attn.o_proj": "W4A16"}))
    result = command("import", file, "--into", run.uri)
    assert result.exit_code == 0, result.output
    manifest = run.read_json("solutions/theirs/manifest.json")
    assert manifest["solution"]["kv_bytes_per_token"] == 256
    assert manifest["budget"]["kv_bytes_per_token"] == 256
    candidates = collect_candidates(
        ScoredRun.read(RunState.open(run)), "solutions/theirs/", ("modelopt", "random")
    )
    assert len(candidates) > 2


def test_what_a_cache_frees_does_not_pay_for_weights(run: RunDirectory) -> None:
    scored_run = ScoredRun.read(RunState.open(run))
    problem, scores = scored_run.problem, scored_run.scores
    options = SolveOptions(bits=5, kv_bytes_per_token=128)
    formats = search(problem, scores, options).formats
    swaps = Swaps(problem, scores, options)
    assert swaps.fits(formats)
    smaller = formats | dict.fromkeys(CACHES, "kv_nvfp4")
    larger = smaller | {"model.layers.0.self_attn.q_proj": NONE}
    assert swaps.fits(smaller)
    assert not swaps.fits(larger)
    for change in swaps.proposals(formats):
        assert swaps.fits(formats | dict(change))


@pytest.mark.parametrize(
    ("engine", "gpu", "limit", "expected"),
    [
        ("vllm", "hopper", 128, "kv_fp8"),
        ("vllm", "b200", 72, "kv_nvfp4"),
        ("vllm", "hopper", 72, None),
        ("sglang", "b200", 72, None),
        ("trtllm", "ampere", 200, "kv_fp8"),
        ("vllm", "hopper", 256, NONE),
    ],
)
def test_engines_keep_all_of_the_cache_in_one_format(
    run: RunDirectory, engine: str, gpu: str, limit: float, expected: str | None
) -> None:
    scored_run = ScoredRun.read(RunState.open(run))
    problem, scores = scored_run.problem, scored_run.scores
    options = SolveOptions(bits=16, kv_bytes_per_token=limit, engine=engine, gpu=gpu)
    if expected is None:
        with pytest.raises(InfeasibleBudgetError, match="bytes per token of context"):
            search(problem, scores, options)
        return
    allocation = search(problem, scores, options)
    assert {allocation.formats[name] for name in CACHES} == {expected}


def test_speed_of_an_allocation_does_not_depend_on_its_caches(run: RunDirectory) -> None:
    scored_run = ScoredRun.read(RunState.open(run))
    problem, scores = scored_run.problem, scored_run.scores
    latency = latency_of("h100", batch=8, context=2048)
    timed = problem.timed(latency)
    small, large = (
        search(problem, scores, SolveOptions(bits=8, kv_bytes_per_token=n, latency=latency))
        for n in (72, 256)
    )
    assert small.formats != large.formats
    assert timed.step is not None
    groups = list(timed.groups.values())
    allocations = [
        {g.name: allocation.formats.get(g.name, NONE) for g in groups}
        for allocation in (small, large)
    ]
    predictions = [timed.step.prediction(groups, formats) for formats in allocations]
    assert predictions[0] == predictions[1]
    assert small.costs["latency"] == large.costs["latency"] > 0


def test_every_row_of_engines_has_a_source() -> None:
    for rows in CACHE_TABLE.values():
        assert [row.format for row in rows] == list(KV_FORMATS)
        assert all(re.search(r"^\S+/\S+ (after )?\d+\.\d+\.\d+", row.source) for row in rows)


def test_chart_of_another_limit_holds_the_caches_of_its_plan(run: RunDirectory) -> None:
    frontier_of(run)
    for limit, is_noted in ((160, False), (100, True)):
        solution = solve_run(run, SolveOptions(bits=7.1, kv_bytes_per_token=limit))
        scored = ScoredRun.read(RunState.open(run))
        content = collect_content(scored, f"solutions/{solution.name}/")
        assert ("100 bytes of KV cache" in content.dots_note) == is_noted
        assert ("the KV cache as in this solution" in content.dots_note) == is_noted
        (plan,) = [dot for dot in content.dots if dot.kind == "solution"]
        at = [dot.loss for dot in content.dots if dot.kind == "curve" and dot.bits == plan.bits]
        assert at == [pytest.approx(plan.loss, rel=1e-9)]
