"""The chart of a report: which points it has, between which ends, and how they reach the page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from runs_folder import EVIL
from scored_run import FORMATS, evaluation_row, put_scored_run

from autoquant_ray.allocate.frontier import frontier_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.errors import AutoQuantError
from autoquant_ray.report.charts.bokeh_js import bokeh_scripts
from autoquant_ray.report.charts.frontier_chart import Dot, chart_data
from autoquant_ray.report.content import collect_content
from autoquant_ray.report.html import render_html
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import rewrite_reports, solve_run

SOLUTION = Dot(kind="solution", name="this solution", bits=4.5, num_bytes=1.0, loss=0.6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = put_scored_run(tmp_path_factory.mktemp("runs") / "run")
    solve_run(directory, SolveOptions(bits=6), folder="")
    return directory


def test_page_shows_the_points_of_the_file_where_there_is_one(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", num_layers=2)
    solve_run(directory, SolveOptions(bits=6), folder="")

    def curve() -> list[tuple[float, float]]:
        dots = collect_content(ScoredRun.read(RunState.open(directory)), "").dots
        return [(dot.bits, dot.loss) for dot in dots if dot.kind in ("curve", "knee")]

    swept = dict(curve())
    assert not directory.exists("frontier.parquet")
    exact = frontier_of(directory)
    solution = directory.read_json("manifest.json")["solution"]
    of_file = [(point.effective_bits, point.predicted_kl) for point in exact]
    # Between two sizes of the file the best is no line: the plan's own size is a point too.
    assert curve() == sorted({*of_file, (solution["effective_bits"], solution["score"])})
    for bits, loss in swept.items():
        best = min(p.predicted_kl for p in exact if p.effective_bits <= bits)
        assert loss <= best * 1.5 + 1e-12, "near the exact one"


def test_measured_allocations_are_in_the_head_the_concerns_and_the_chart(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", num_layers=2)
    solve_run(directory, SolveOptions(bits=6), folder="")
    solution = evaluation_row(directory)
    rival = evaluation_row(
        directory, name="uniform wint4_afp16", allocation="u", effective_bits=4.1, kl_mean=9.0
    )
    shuffled = evaluation_row(directory, name="random 1", allocation="r", kl_mean=5.0)
    other = evaluation_row(directory, solution="bits-4.50", allocation="o", data_key="e")
    directory.write_table("evaluation.parquet", [solution, rival, shuffled, other])
    rewrite_reports(directory)
    content = collect_content(ScoredRun.read(RunState.open(directory)), "")
    measured = {dot.name: dot.loss for dot in content.dots if dot.kind == "measured"}
    assert measured == {
        "measured, the scan's own solution on held-out.jsonl": solution["kl_mean"],
        "measured, uniform wint4_afp16 on held-out.jsonl": 9.0,
        "measured, solution bits-4.50 on held-out.jsonl": other["kl_mean"],
    }
    assert [n.label for n in content.numbers][:2] == ["Predicted KL", "Measured KL"]
    assert content.concerns[0].title == "The prediction does not hold"
    assert (
        f"**Measured KL:** {solution['kl_mean']:.4g} ± {solution['kl_stderr']:.1g}"
        in directory.read_bytes("report.md").decode()
    )


def test_without_measurements_there_are_four_kinds_of_points(run: RunDirectory) -> None:
    dots = collect_content(ScoredRun.read(RunState.open(run)), "").dots
    assert {dot.kind for dot in dots} == {"curve", "knee", "solution", "uniform"}
    assert {dot.name for dot in dots if dot.kind == "uniform"} == {f"all {f}" for f in FORMATS}


def dots_of(*losses: float) -> list[Dot]:
    return [
        Dot(kind="curve", name="p", bits=4.0 + n, num_bytes=2.0**20 * (4 + n), loss=loss)
        for n, loss in enumerate(losses)
    ]


def test_chart_leaves_out_what_loses_nothing_and_has_room_for_the_rest() -> None:
    chart = chart_data(dots_of(1.0, 0.1, 0.01, 0.0, 1e-9, math.inf)[::-1])
    assert chart is not None
    points = chart["points"]
    assert points["loss"] == [1.0, 0.1, 0.01]
    assert points["bits"] == [4.0, 5.0, 6.0]
    assert points["size_text"] == ("4.00 MiB", "5.00 MiB", "6.00 MiB")
    assert points["x"] == [4.0, 5.0, 6.0], "MiB"
    assert chart["label"] == "size of the whole model, MiB"
    assert (chart["bits_at"]["x"], chart["bits_at"]["bits"]) == (points["x"], points["bits"])
    assert chart["legend"] == [("curve", "best allocation of its size")]
    low, high = chart["loss"]
    assert 0.005 < low < 0.01
    assert low * high == pytest.approx(0.01), "equal room at both ends of a log axis"
    assert 3.5 < chart["across"][0] < 4 < 6 < chart["across"][1] < 6.5


def test_sizes_from_a_gibibyte_on_are_in_gibibytes() -> None:
    chart = chart_data([replace(d, num_bytes=0.3 * 2**10 * d.num_bytes) for d in dots_of(1.0, 0.1)])
    assert chart is not None
    assert chart["label"] == "size of the whole model, GiB"
    assert chart["points"]["x"] == pytest.approx([1.2, 1.5])
    assert chart["points"]["size_text"] == ("1.20 GiB", "1.50 GiB")


@pytest.mark.parametrize(
    ("error", "low", "text"), [(0.25, 0.35, "0.6000 ± 0.25"), (None, 0.6, "0.6000")]
)
def test_error_is_a_bar_around_the_point(error: float | None, low: float, text: str) -> None:
    solution = Dot(
        kind="solution", name="this solution", bits=4.5, num_bytes=1.0, loss=0.6, stderr=error
    )
    chart = chart_data([solution, *dots_of(1.0, 0.1)])
    assert chart is not None
    points = chart["points"]
    assert points["kind"] == ["curve", "solution", "curve"]
    assert points["low"][1] == pytest.approx(low)
    assert points["high"][1] == pytest.approx(1.2 - low)
    assert points["loss_text"][1] == text
    assert points["low"][0] == points["high"][0] == 1.0


def test_error_larger_than_the_loss_reaches_below_the_axis() -> None:
    solution = Dot(
        kind="solution", name="this solution", bits=4.5, num_bytes=1.0, loss=0.6, stderr=1.5
    )
    chart = chart_data([solution, *dots_of(1.0, 0.1)])
    assert chart is not None
    assert 0 < chart["points"]["low"][1] < chart["loss"][0] < 0.1
    assert chart["loss"][1] > 2.1


def test_axis_has_bits_where_more_bits_are_not_more_bytes() -> None:
    dots = [*dots_of(1.0, 0.1), Dot(kind="curve", name="p", bits=6, num_bytes=1.0, loss=0.01)]
    chart = chart_data(dots)
    assert chart is not None
    assert chart["bits_at"] is None
    assert chart["label"] == "stored bits per searched weight"
    assert chart["points"]["x"] == chart["points"]["bits"]


def test_curve_of_one_point_has_no_chart() -> None:
    assert chart_data(dots_of(0.1)) is None
    assert chart_data(dots_of(0.0, 0.0)) is None


def test_page_without_a_chart_has_no_library(run: RunDirectory) -> None:
    content = collect_content(ScoredRun.read(RunState.open(run)), "")
    with_chart = render_html(content)
    without = render_html(replace(content, dots=content.dots[:1]))
    assert "Bokeh Contributors" in with_chart, "the licence travels with the library"
    assert "Bokeh" not in without
    assert len(without) < 200_000
    assert "script-src &#39;sha256-" in without
    assert "unsafe" not in without


def test_names_stay_inside_the_data_of_the_chart(run: RunDirectory) -> None:
    content = collect_content(ScoredRun.read(RunState.open(run)), "")
    name = f"{EVIL}</script><!--\u2028$$x$$"
    page = render_html(replace(content, dots=[replace(dot, name=name) for dot in content.dots]))
    match = re.search(r'<script type="application/json" id="frontier-data">(.*?)</script>', page)
    assert match is not None
    assert set(json.loads(match[1])["points"]["name"]) == {name}
    assert not re.search("[<>&\u2028]", match[1])


def test_missing_library_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoquant_ray.report.charts.bokeh_js.find_spec", lambda name: None)
    with pytest.raises(AutoQuantError, match="pip install bokeh"):
        bokeh_scripts()


def test_page_of_an_allocation_that_loses_nothing(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", num_layers=1)
    solve_run(directory, SolveOptions(bits=16), folder="")
    assert "All groups" in directory.read_bytes("report.html").decode()
