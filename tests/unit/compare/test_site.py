"""The history page: which runs, what of them, and that nothing in a name becomes markup."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from runs_folder import (
    EVIL,
    HISTORY_SCHEMA,
    NUM_GROUPS,
    failed,
    formats_with,
    night,
    put_everything,
    put_history,
    put_run,
)
from scored_run import evaluation_row, put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.compare.site import Job, RunRow, collect_jobs
from autoquant_ray.compare.site_charts import Point, make_chart
from autoquant_ray.compare.site_page import write_site
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import HISTORY_FILE
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.solve import solve_run


def jobs_of(folder: Path) -> dict[str, Job]:
    return {job.name: job for job in collect_jobs(RunDirectory(str(folder)))}


def page_of(folder: Path) -> str:
    return Path(write_site(RunDirectory(str(folder)))).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


# --- Rows


def test_history_has_the_agreed_columns() -> None:
    assert SCHEMAS[HISTORY_FILE].equals(HISTORY_SCHEMA)


def test_runs_of_a_model_are_compared_with_the_one_before(tmp_path: Path) -> None:
    put_run(tmp_path, "b", created="2026-11-02T00:00:00Z", formats=formats_with(4))
    put_run(tmp_path, "a", created="2026-11-01T00:00:00Z", formats=formats_with(0))
    put_run(tmp_path, "deeper/c", created="2026-11-03T00:00:00Z", formats=formats_with(3)[:-1])
    put_run(tmp_path, "other", model="org/other", formats=formats_with(9))
    jobs = jobs_of(tmp_path)
    rows = jobs["org/model"].rows
    assert [row.name for row in rows] == ["a", "b", "deeper/c"]
    assert [row.churn for row in rows] == [None, 4 / NUM_GROUPS, 2 / NUM_GROUPS]
    assert [row.compared_with for row in rows] == [None, "a", "b"]
    assert rows[0].predicted_kl_nats == 0.17
    assert rows[0].seconds == 60.0
    assert [row.name for row in jobs["org/other"].rows] == ["other"]


def test_runs_of_a_model_under_two_paths_are_of_one_model(tmp_path: Path) -> None:
    days = [f"2026-11-0{day}T00:00:00Z" for day in (1, 2, 3, 4)]
    put_run(tmp_path, "a", model="models/m", fingerprint="1", created=days[0])
    put_run(tmp_path, "b", model="/home/me/models/m", fingerprint="1", created=days[1])
    put_run(tmp_path, "c", model="models/m", fingerprint="2", created=days[2])  # trained on
    put_run(tmp_path, "d", model="/home/me/other", fingerprint="3", created=days[3])
    rows = {name: [row.name for row in job.rows] for name, job in jobs_of(tmp_path).items()}
    assert rows == {"models/m": ["a", "b", "c"], "/home/me/other": ["d"]}
    done = CliRunner().invoke(main, ["site", str(tmp_path)])
    assert done.exit_code == 0, done.output


def test_history_names_its_runs_and_their_churn(tmp_path: Path) -> None:
    rows = [
        night("job", "2026-11-01", verdict="baseline", baseline=None, num_changed=None),
        night("job", "2026-11-02", num_changed=10, verdict="drift"),
        night("job", "2026-11-03", **failed(error="no GPU left")),
    ]
    put_history(tmp_path, rows)
    put_run(tmp_path, "job-2026-11-02", formats=formats_with(10))
    put_run(
        tmp_path,
        "job-2026-11-04",
        created="2026-11-04T00:00:00Z",
        stages={"plan": {"state": "running"}},
    )
    put_run(tmp_path, "job-by-hand", formats=formats_with(0))
    jobs = jobs_of(tmp_path)
    assert list(jobs) == ["job", "org/model"]
    assert [row.status for row in jobs["job"].rows] == ["done", "done", "failed", "unfinished"]
    assert [row.churn for row in jobs["job"].rows] == [None, 0.25, None, None]
    assert [row.report for row in jobs["job"].rows] == [
        None,
        "job-2026-11-02/report.html",
        None,
        None,
    ]
    assert jobs["job"].rows[2].problem == "no GPU left"
    assert [row.name for row in jobs["org/model"].rows] == ["job-by-hand"]


def test_groups_of_deleted_runs_are_not_guessed(tmp_path: Path) -> None:
    put_history(tmp_path, [night("job", "2026-11-02", num_changed=10)])
    (row,) = jobs_of(tmp_path)["job"].rows
    assert (row.num_changed, row.churn) == (10, None)
    assert "10 groups" in page_of(tmp_path)


def test_failures_are_shown_as_such(tmp_path: Path) -> None:
    left_out = [{"shard": 3, "stage": "score", "reason": "a NaN in the loss"}]
    put_run(tmp_path, "quarantined", formats=formats_with(0), quarantined=left_out)
    put_run(tmp_path, "unfinished", stages={"plan": {"state": "done"}, "score": {"state": "x"}})
    put_run(tmp_path, "unsolved")
    put_run(tmp_path, "damaged", formats=formats_with(0))
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    put_run(tmp_path, "emptied", formats=formats_with(0))
    (tmp_path / "emptied" / "run.json").write_text('{"schema_version": 1}')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('{"not": "ours"}')
    rows = {row.name: row for job in jobs_of(tmp_path).values() for row in job.rows}
    assert {name: row.status for name, row in rows.items()} == {
        "quarantined": "quarantined",
        "unfinished": "unfinished",
        "unsolved": "unfinished",
        "damaged": "damaged",
        "emptied": "damaged",
    }
    page = page_of(tmp_path)
    assert "1 shard(s) left out, the first: a NaN in the loss" in page
    assert "in the stage &#39;score&#39;" in page
    assert "manifest.json is damaged" in page


# --- The page


def test_names_never_become_markup(tmp_path: Path) -> None:
    put_run(tmp_path, "run", model=EVIL, formats=formats_with(0))
    hostile = failed(error=f"{EVIL} failed")
    put_history(tmp_path, [night('"><img src=x onerror=alert(1)>', "2026-11-01", **hostile)])
    page = page_of(tmp_path)
    assert EVIL not in page
    assert html.escape(EVIL, quote=True).replace("&quot;", "&#34;") in page
    tags = [tag for tag, _ in Elements(page).tags]
    assert tags.count("script") == 1
    assert "img" not in tags


def test_page_asks_for_nothing(tmp_path: Path) -> None:
    put_everything(tmp_path)
    page = page_of(tmp_path)
    elements = Elements(page).tags
    (policy,) = [
        attributes["content"]
        for tag, attributes in elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    for tag, attributes in elements:
        assert "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or ":" not in value or value == "data:,", value
    assert not re.search(r"url\(|@import|https?://", page)


def test_every_point_of_a_chart_is_in_the_table(tmp_path: Path) -> None:
    put_everything(tmp_path)
    page = page_of(tmp_path)
    titles = re.findall(r"<title>2026-11-\d\d: ([\d.]+) nats</title>", page)
    assert len(titles) >= 24
    for value in titles:
        assert f'">{value}</td>' in page


def test_links_lead_to_reports(tmp_path: Path) -> None:
    runs = tmp_path / "my runs"
    put_run(runs, "a: #1?", formats=formats_with(0), report="report.md")
    put_run(runs, "b", formats=formats_with(0))
    for out in (None, str(tmp_path / "pages" / "all.html"), str(runs / "b" / "x.html")):
        path = Path(write_site(RunDirectory(str(runs)), out))
        links = [a["href"] for tag, a in Elements(path.read_text()).tags if tag == "a"]
        targets = {
            (path.parent / re.sub("%(..)", lambda m: chr(int(m[1], 16)), link)).resolve()
            for link in links
            if link is not None and not link.startswith("#")
        }
        assert targets == {runs / "a: #1?" / "report.md", runs / "b" / "report.html"}


def test_same_runs_give_the_same_page(tmp_path: Path) -> None:
    put_everything(tmp_path / "runs")
    first = page_of(tmp_path / "runs")
    assert page_of(tmp_path / "runs") == first


# --- Wrong input


def test_command_writes_the_page_and_says_where(tmp_path: Path) -> None:
    put_run(tmp_path, "run", formats=formats_with(0))
    done = CliRunner().invoke(main, ["site", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"path": str(tmp_path / "index.html")}


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (lambda _: None, "holds no run; give the folder that holds the runs"),
        (lambda p: put_run(p.parent, p.name), "is a run itself; give the folder that holds"),
        (lambda p: (p / "index.html").write_text("mine"), "is not a page of ours; give another"),
        (lambda p: (p / "history.parquet").write_text("x"), "history.parquet is damaged"),
    ],
)
def test_wrong_folder_is_one_line_and_exit_code_2(setup: Any, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    if "page of ours" in said:
        put_run(folder, "run", formats=formats_with(0))
    setup(folder)
    done = CliRunner().invoke(main, ["site", str(folder)])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    if "page of ours" in said:
        assert (folder / "index.html").read_text() == "mine"


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere holds no run"):
        collect_jobs(RunDirectory(str(tmp_path / "nowhere")))


# --- Charts


@pytest.mark.parametrize("width", [340, 560])
@pytest.mark.parametrize("count", [1, 2, 14, 400])
def test_chart_stays_inside_and_labels_stay_apart(width: int, count: int) -> None:
    points = [
        Point(label=f"2026-11-{i % 28 + 1:02d}", value=0.17 + i * 1e-5, shown="", mark="good")
        for i in range(count)
    ]
    chart = make_chart(points, width=width, is_share=False)
    assert len(chart.marks) == count
    assert all(chart.left <= mark.x <= chart.right for mark in chart.marks)
    assert all(0 < mark.y <= chart.base for mark in chart.marks)
    places = sorted(tick.place for tick in chart.x_ticks)
    assert places
    assert all(b - a >= 70 for a, b in itertools.pairwise(places))
    assert all(chart.left <= place <= width - 35 for place in places)
    labels = [tick.label for tick in chart.y_ticks]
    assert len(set(labels)) == len(labels) >= 2


@pytest.mark.parametrize("value", [0.0, 1e-9, 3e-5, 0.17, 123.0, 1e6])
def test_chart_of_one_value_has_an_axis_around_it(value: float) -> None:
    point = Point(label="2026-11-01", value=value, shown="", mark="good")
    chart = make_chart([point], width=340, is_share=False)
    assert min(t.place for t in chart.y_ticks) <= chart.marks[0].y <= chart.base


def test_line_has_a_gap_where_a_value_is_missing() -> None:
    values = [0.1, 0.2, None, 0.3, 0.4]
    points = [Point(label="x", value=v, shown="", mark="good") for v in values]
    chart = make_chart(points, width=560, is_share=False)
    assert len(chart.lines) == 2
    assert [mark.mark for mark in chart.marks] == ["good", "good", "bad", "good", "good"]


def test_row_without_result_needs_a_look() -> None:
    assert RunRow(name="a", status="failed").needs_a_look
    assert RunRow(name="a", verdict="drift").needs_a_look
    assert not RunRow(name="a", verdict="noise").needs_a_look


def test_site_of_a_moved_folder_still_links(tmp_path: Path) -> None:
    put_run(tmp_path / "old", "run", formats=formats_with(0))
    write_site(RunDirectory(str(tmp_path / "old")))
    shutil.move(tmp_path / "old", tmp_path / "new")
    page = (tmp_path / "new" / "index.html").read_text()
    assert 'href="run/report.html"' in page


# --- Names, days and measured losses


def test_models_are_named_by_the_end_of_their_paths(tmp_path: Path) -> None:
    models = ["/data/hub/qwen/v1", "/data/hub/llama/v1", "s3://bucket/models/m", "org/model"]
    for n, model in enumerate(models):
        put_run(tmp_path, f"run-{n}", model=model, formats=formats_with(n))
    page = page_of(tmp_path)
    heads = re.findall(r'<h2 id="job-\d+-title">(.*?)</h2>', page)
    assert sorted(heads) == ["llama/v1", "models/m", "org/model", "qwen/v1"]
    assert page.count("/data/hub/qwen/v1") == 1, "the whole path stands once, below the heading"


def test_days_are_those_that_the_nights_are_for(tmp_path: Path) -> None:
    late = "2026-11-20T09:00:00Z"
    rows = [
        night("job", "2026-11-02", started="2026-11-02T02:00:00Z"),
        night("job", "2026-11-01", started=late, predicted_kl_nats=0.5),
    ]
    put_history(tmp_path, rows)
    put_run(tmp_path, "job-2026-11-01", created=late, formats=formats_with(0))
    put_run(tmp_path, "job-2026-10-31", created=late, stages={"plan": {"state": "running"}})
    shown = [row.day for row in jobs_of(tmp_path)["job"].rows]
    assert shown == ["2026-10-31", "2026-11-01", "2026-11-02"]
    page = page_of(tmp_path)
    assert "<title>2026-11-01: 0.5000 nats</title>" in page
    assert "2026-11-20:" not in page


def test_measured_loss_stands_beside_the_predicted_one(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    directory = put_scored_run(folder / "measured", model="org/model")
    solve_run(directory, SolveOptions(bits=6), folder="")
    before = evaluation_row(directory, kl_mean=0.75, data_key="old")
    other = evaluation_row(directory, kl_mean=9.0, name="uniform x", allocation="u")
    stale = evaluation_row(directory, kl_mean=8.0, allocation="an earlier one")
    measured = evaluation_row(directory, kl_mean=0.125)
    directory.write_table("evaluation.parquet", [before, measured, stale, other])
    put_run(folder, "predicted", created="2026-11-02T00:00:00Z", formats=formats_with(0))
    rows = jobs_of(folder)["org/model"].rows
    assert [row.measured_kl_nats for row in rows] == [0.125, None]
    page = page_of(folder)
    assert '<td class="number" data-number="0.125">0.1250</td>' in page
    assert page.count("<title>2026-11-01: measured 0.1250 nats</title>") == 2, "wide and narrow"
    put_run(tmp_path / "others", "a", formats=formats_with(0))
    assert '<th scope="col" class="number">Measured KL' not in page_of(tmp_path / "others")
