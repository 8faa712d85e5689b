"""The chart's curve keeps to the constraints of the plan that it is drawn for."""

from __future__ import annotations

import html
import itertools
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from scored_run import put_scored_run
from step_by_hand import card

from autoquant_ray.allocate.constrained.curve import loss_of
from autoquant_ray.allocate.domains import solve_domains
from autoquant_ray.allocate.frontier import find_knee, frontier_of, rounded_up
from autoquant_ray.allocate.load import Latency
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun, options_of, solution_formats
from autoquant_ray.cli.main import main
from autoquant_ray.report.charts.frontier_chart import Dot
from autoquant_ray.report.content import ReportContent, collect_content
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import rewrite_reports, solve_run

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")
CONSTRAINED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 6.3}, ""),
    "bytes": ({"bytes": 90_000}, ""),
    "modelopt": ({"bits": 6.3, "cost": "modelopt"}, ""),
    "pins": ({"bits": 8, "pins": {"lm_head": "wint8_aint8"}}, "lm_head = wint8_aint8"),
    "no-sense": (
        {
            "bits": 15,
            "pins": {f"model.layers.{n}.mlp.down_proj": "wint4_afp16:max" for n in (0, 1)},
        },
        "model.layers.1.mlp.down_proj = wint4_afp16:max",
    ),
    "allow": (
        {"bits": 9, "allow": {"*mlp*": ("wint8_aint8", "none")}},
        "*mlp* in wint8_aint8, none",
    ),
    "max-formats": ({"bits": 6.7, "max_formats": 1}, "at most 1 formats"),
    "max-group-kl": ({"bits": 9, "max_group_kl": 0.02}, "max group kl 0.02"),
    "engine": ({"bits": 9, "engine": "vllm", "gpu": "hopper"}, "served by vllm on hopper"),
    "domains": (
        {"bits": 6.3, "domains": {"code": 0.9, "chat": 0.1}},
        "domains weighted chat 0.1, code 0.9",
    ),
    "worst": ({"bits": 6.3, "worst_domain": True}, "smallest loss of the worst domain"),
    "latency": (
        {"latency": Latency(hardware=card(1e9, _16x16=48e9, fp8xfp8=96e9), ms_per_token=0.36)},
        "at most 0.36 ms per token",
    ),
}


def content_of(directory: RunDirectory, folder: str) -> ReportContent:
    return collect_content(ScoredRun.read(RunState.open(directory)), folder)


def curve_and_plan(content: ReportContent) -> tuple[list[Dot], Dot]:
    (plan,) = [dot for dot in content.dots if dot.kind == "solution"]
    return [dot for dot in content.dots if dot.kind in ("curve", "knee")], plan


def height_of_curve(curve: list[Dot], bits: float) -> float:
    """Loss of the drawn line, straight on a log axis, at a size."""
    for left, right in itertools.pairwise(curve):
        if left.bits <= bits <= right.bits and right.loss > 0:
            share = (bits - left.bits) / (right.bits - left.bits)
            return math.exp(math.log(left.loss) * (1 - share) + math.log(right.loss) * share)
    return next(dot.loss for dot in curve if dot.bits == bits)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", CONSTRAINED)
def test_no_plan_lies_below_the_best_of_its_size(name: str, family: str, make_run: Any) -> None:
    asked, words = CONSTRAINED[name]
    directory = make_run(
        family, FORMATS, disable=(), domains=("code", "chat", "code", "chat"), num_shards=4
    )
    solution = solve_run(directory, SolveOptions(**asked))
    for has_file in (False, True):
        content = content_of(directory, f"solutions/{solution.name}/")
        curve, plan = curve_and_plan(content)
        assert [dot.bits for dot in curve] == sorted(dot.bits for dot in curve)
        assert plan.loss >= height_of_curve(curve, plan.bits) * (1 - 1e-9)
        at = [dot for dot in curve if dot.bits == plan.bits]
        if name != "modelopt":  # which is not the best of its bytes
            assert plan.loss <= at[0].loss * (1 + 2e-4), "nor far above what is solved alike"
        assert len(curve) >= 5 or name == "engine"
        assert words in content.dots_note
        assert bool(words) == bool(content.dots_note)
        if not has_file:
            frontier_of(directory)
    page = html.unescape(directory.read_bytes(f"solutions/{solution.name}/report.html").decode())
    assert words in page


def kept_by(directory: RunDirectory, **asked: Any) -> tuple[list[Dot], Dot, str]:
    solution = solve_run(directory, SolveOptions(**asked))
    content = content_of(directory, f"solutions/{solution.name}/")
    return *curve_and_plan(content), content.dots_note


def test_curve_keeps_to_clusters_of_experts(make_run: Any) -> None:
    directory = make_run(
        "qwen3_moe", ("wint4_afp16:max", "wint8_afp16"), num_shards=4, expert_groups="expert"
    )
    frontier_of(directory)
    heights = {}
    for asked in (2, "layer", "expert", None):
        curve, plan, note = kept_by(directory, bits=5.5, expert_groups=asked)
        assert plan.loss >= height_of_curve(curve, plan.bits) * (1 - 1e-9)
        heights[asked] = next(dot.loss for dot in curve if dot.bits == plan.bits)
        assert heights[asked] == pytest.approx(plan.loss, rel=1e-9)
        assert ("experts of a layer in 2 clusters" in note) == (asked == 2)
        assert (note == "") == (asked in ("expert", None)), "as scanned"
    assert heights["layer"] > heights[2] > heights["expert"] == heights[None]


def test_curve_of_pins_is_the_best_of_each_size_with_them(make_run: Any) -> None:
    pins = {"model.layers.0.mlp.down_proj": "wint4_afp16:max"}
    directory = make_run("llama", FORMATS[::2], num_shards=4)
    solution = solve_run(directory, SolveOptions(bits=8, pins=pins))
    curve, _ = curve_and_plan(content_of(directory, f"solutions/{solution.name}/"))
    run = ScoredRun.read(RunState.open(directory))
    rows = [
        [
            (8 * g.cost(f, "storage"), run.scores.get((g.name, f), 0.0))
            for f in g.rows
            if pins.get(g.name, f) == f
        ]
        for g in run.problem.searched
    ]
    weights = sum(g.num_weights for g in run.problem.searched)
    everything = [
        (math.fsum(b for b, _ in a) / weights, math.fsum(s for _, s in a))
        for a in itertools.product(*rows)
    ]
    for dot in curve:
        best = min(s for bits, s in everything if bits <= dot.bits * (1 + 1e-9))
        assert dot.loss == pytest.approx(best, rel=1e-9)
    assert curve[-1].loss == pytest.approx(min(s for _, s in everything), rel=1e-9)


def test_fewer_points_are_a_view_of_the_full_curve(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", num_layers=3)
    solve_run(directory, SolveOptions(bits=6.1), folder="")
    full = frontier_of(directory)
    file = Path(directory.uri) / "frontier.parquet"
    content = file.read_bytes()
    report = directory.read_bytes("report.html")
    rewrite_reports(directory)
    report = directory.read_bytes("report.html")
    knee = next(point for point in full if point.is_knee)
    assert full[find_knee(full) or 0] == knee
    for count in (2, 3, 4, 8, 63):
        shown = frontier_of(directory, count)
        assert len(shown) <= count
        assert set(shown) <= set(full)
        assert (shown[0], shown[-1]) == (full[0], full[-1])
        assert (knee in shown) == (count > 2)
        assert [point for point in shown if point.is_knee] == [knee] * (count > 2)
    sizes = [point.effective_bits for point in frontier_of(directory, 8)]
    gaps = [b - a for a, b in itertools.pairwise(sizes)]
    assert len(sizes) == 8
    assert max(gaps) < 3 * (sizes[-1] - sizes[0]) / 7, "over all sizes"
    done = CliRunner().invoke(main, ["frontier", directory.uri, "--points", "4"])
    assert (done.exit_code, "knee" in done.output) == (0, True)
    assert file.read_bytes() == content
    rewrite_reports(directory)
    assert directory.read_bytes("report.html") == report
    assert len(frontier_of(directory, 200)) > len(full)
    assert len(pq.read_table(file)) > len(full)


def test_a_shortened_curve_of_an_earlier_version_is_not_drawn(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", num_layers=3)
    solve_run(directory, SolveOptions(bits=6.1), folder="")
    full = frontier_of(directory)
    for points in ((full[0], full[20], full[40], full[-1]), full[2:-2], full[:0]):
        directory.write_table("frontier.parquet", [vars(point) for point in points])
        curve, _ = curve_and_plan(content_of(directory, ""))
        assert len(curve) > len(full) / 2
        assert (curve[0].bits, curve[-1].bits) == pytest.approx(
            (full[0].effective_bits, full[-1].effective_bits)
        )


def test_plan_for_domains_is_drawn_by_what_it_makes_least(make_run: Any) -> None:
    directory = make_run("llama", FORMATS, domains=("code", "chat", "code", "chat"), num_shards=4)
    options = SolveOptions(bits=6.3, domains={"code": 0.9, "chat": 0.1})
    solution = solve_run(directory, options)
    folder = f"solutions/{solution.name}/"
    curve, plan = curve_and_plan(content_of(directory, folder))
    run = ScoredRun.read(RunState.open(directory))
    formats = solution_formats(run.state, folder, run.problem)
    manifest = directory.read_json(f"{folder}manifest.json")
    assert plan.loss == manifest["solution"]["score"]
    assert plan.loss == pytest.approx(loss_of(run, options_of(manifest))(formats), rel=1e-12)
    assert plan.loss != pytest.approx(manifest["solution"]["predicted_kl_nats"], rel=1e-6)
    for dot in curve:
        of_size = options.replaced(bits=rounded_up(dot.bits))
        best = solve_domains(run.state, run.problem, run.scores, of_size).score
        assert dot.loss == pytest.approx(best, rel=1e-9)
    page = directory.read_bytes(f"{folder}report.html").decode()
    assert "weighted predicted KL of the domains, nats per token" in page
