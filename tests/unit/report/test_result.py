"""The sentence that a report starts with, and the commands beside its doubts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from scored_run import evaluation_row, put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.cli.main import main
from autoquant_ray.report.content import ReportContent, collect_content
from autoquant_ray.report.html import render_html
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run


def content_of(directory: RunDirectory, folder: str = "") -> ReportContent:
    return collect_content(ScoredRun.read(RunState.open(directory)), folder)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = put_scored_run(tmp_path / "run", num_shards=4, config={"labels": "data"})
    solve_run(directory, SolveOptions(bits=4.6), folder="")
    return directory


def test_sentence_has_the_numbers_of_the_manifest(run: RunDirectory) -> None:
    solution = run.read_json("manifest.json")["solution"]
    rows, shares = run.read_table("manifest.parquet").to_pylist(), {}
    plan = {(r["group"], r["format"]): r for r in run.read_table("plan.parquet").to_pylist()}
    for group, format_ in {(row["group"], row["format"]) for row in rows}:
        shares[format_] = shares.get(format_, 0) + plan[group, format_]["num_weights"]
    total = sum(shares.values())
    text = content_of(run).result
    named = dict(re.findall(r"(w\S+) for (\d+)%", text))
    assert len(named) == 4
    for name, percent in named.items():
        assert int(percent) == round(100 * shares[name] / total)
    assert f"predicted loss {solution['predicted_kl_nats']:.3f} nats per token" in text
    match = re.search(r"; (\S+) everywhere would lose ([\d.]+) at (\d+)% of the size", text)
    assert match is not None
    scores = run.read_table("sensitivity.parquet").to_pylist()
    everywhere = sum(row["score"] for row in scores if row["format"] == match[1])
    assert float(match[2]) == pytest.approx(everywhere, abs=5e-4)
    assert everywhere > solution["predicted_kl_nats"]


def test_sentence_says_what_was_measured_and_on_what(run: RunDirectory) -> None:
    row = evaluation_row(run, dataset="calibration.jsonl", kl_mean=0.0042, predicted_kl=0.5)
    single = row | {"name": "uniform wint4_afp16", "allocation": "u", "kl_mean": 0.25}
    worse = row | {"name": "uniform wfp8_afp8", "allocation": "v", "kl_mean": 0.5}
    run.write_table("evaluation.parquet", [row, worse, single])
    text = content_of(run).result
    assert "measured loss 0.0042 nats per token (predicted 0.500) on 4,096 tokens that the" in text
    assert "scan has not seen; wint4_afp16 everywhere loses 0.250" in text
    run.write_table("evaluation.parquet", [row | {"dataset": "other.jsonl"}])
    assert "on 4,096 tokens of other.jsonl." in content_of(run).result


def parsed(command: str) -> dict[str, Any]:
    """Parameters of a command line, as the program reads them."""
    program, name, *words = shlex.split(command)
    assert program == "autoquant-ray"
    command_ = main.commands[name]  # type: ignore[attr-defined]
    return {"command": name} | command_.make_context(name, words).params


def test_every_concern_has_a_command_that_the_program_takes(run: RunDirectory) -> None:
    run.write_table("evaluation.parquet", [evaluation_row(run)])
    content = content_of(run)
    commands = {concern.title: parsed(concern.command) for concern in content.concerns}
    assert commands["The prediction does not hold"]["command"] == "refine"
    labels = commands["Labels from the data"]
    assert labels["labels"] is None, "the model's, by default"
    assert (labels["model"], labels["out"]) == ("org/some-model", "runs/some-run-labels")
    assert (labels["samples"], labels["bits"]) == (None, 6.0)
    assert commands["Few shards"]["samples"] == 512
    served = commands["No engine serves it as it is"]
    assert (served["command"], served["engine"], served["bits"]) == ("solve", "vllm", 4.6)
    page = render_html(content)
    assert page.count('class="copy"') == len(commands) + len(content.reproduction.commands) + 1


def test_commands_name_the_solution_and_the_group(run: RunDirectory) -> None:
    solution = solve_run(run, SolveOptions(bits=4.3, max_formats=1))
    run.write_table("evaluation.parquet", [])
    content = content_of(run, f"solutions/{solution.name}/")
    by_title = {concern.title: concern.command for concern in content.concerns}
    low = parsed(by_title["Below the range of the prediction"])
    assert (low["command"], low["solution"]) == ("evaluate", solution.name)


def test_scan_of_custom_formats_keeps_its_file(run: RunDirectory) -> None:
    state = RunState.open(run)
    state.record.config |= {"custom_formats": {"mine": {"weight": {"num_bits": 4}, "input": None}}}
    content = collect_content(ScoredRun.read(state), "")
    command = next(c.command for c in content.concerns if c.title == "Few shards")
    assert command == (
        "autoquant-ray scan --config scan.yaml --samples 512 --out runs/some-run-more"
    )


def test_template_that_skipped_a_sample_is_not_quoted_whole(run: RunDirectory) -> None:
    state = RunState.open(run)
    data = state.record.dataset
    data["bad_samples"] = ["{%- if tools %} " * 200]
    data["counts"] = data["counts"] | {"bad": 1}
    (text,) = (v for k, v in collect_content(ScoredRun.read(state), "").facts if k == "Dataset")
    assert "1 skipped, the first because of {%- if tools %}" in text
    assert len(text) < 500
