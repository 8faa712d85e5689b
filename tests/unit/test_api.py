"""The run as a Python object: the same as the commands, and what a notebook shows of it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pandas
import pytest
from scored_run import evaluation_row

import autoquant_ray
from autoquant_ray import Run
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError, StoreError
from autoquant_ray.evaluate.evaluate import Evaluation
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.solve import solve_run

DOCUMENT = Path(__file__).parents[2] / "docs" / "python-api.md"
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def solved(make_run: Any) -> Run:
    """A run with a solution of its own at 7 bits."""
    directory = make_run()
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    return Run.open(directory.uri)


def test_tables_are_those_of_the_files(solved: Run) -> None:
    for name, table in (("sensitivity", solved.sensitivity), ("plan", solved.plan)):
        path = Path(solved.path) / f"{name}.parquet"
        pandas.testing.assert_frame_equal(
            table.to_pandas(), pandas.read_parquet(path, engine="pyarrow")
        )


def test_solving_writes_what_the_command_would(solved: Run) -> None:
    group = solved.plan.column("group")[0].as_py()
    solution = solved.solve(bits=6.5, pins={group: "none"}, allow={"*o_proj": ["wfp8_afp8"]})
    assert solved.solutions == [solution.name]
    assert solution.formats[group] == "none"
    assert {f for g, f in solution.formats.items() if g.endswith("o_proj")} == {"wfp8_afp8"}
    assert solved.manifest(solution.name)["budget"]["pins"] == {group: "none"}
    size = int(solution.summary["weight_bytes"])
    assert solved.solve(bytes=f"{size + 1}").summary["weight_bytes"] <= size + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bitz": 4}, "^bitz: unknown key; closest: bits"),
        ({"bits": "five"}, "^bits: .*'five'"),
        ({"bits": 5, "pins": ["lm_head"]}, r"^pins: .*dictionary \(got \['lm_head'\]\)"),
        ({"bits": 5, "allow": {"*": "none"}}, "^allow.*: "),
        ({"bits": 5, "bits_over": "some"}, "^bits_over: .*'searched' or 'all'"),
        ({"bits": 5, "latency": "h100"}, "latency_of"),
        ({}, "give a budget"),
        (
            {"bits": 5, "pins": {"model.layers.0.self_attn.k_proj": "none"}},
            "k_proj shares its format with model.layers.0.self_attn.q_proj; name that group",
        ),
    ],
)
def test_options_of_the_wrong_kind_are_named(
    solved: Run, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        solved.solve(**options)


def test_wrong_options_of_solving_are_refused(solved: Run) -> None:
    assert solved.solve(bits="6").formats == solved.solve(bits=6).formats
    with pytest.raises(ConfigError, match="`points` 0: give a number from 2"):
        solved.frontier(0)
    with pytest.raises(ConfigError, match="lots"):
        solved.solve(bytes="lots")
    with pytest.raises(InfeasibleBudgetError, match="reachable is"):
        solved.solve(bits=1)


def test_loss_and_size_find_each_other(solved: Run) -> None:
    points = solved.frontier(9)
    losing = [point for point in points if point.predicted_kl > 0]
    solution = solved.solve_within(losing[-1].predicted_kl)
    assert solution.summary["effective_bits"] <= losing[-1].effective_bits * (1 + 1e-9)
    assert list(pandas.DataFrame(points).columns) == [
        "effective_bits",
        "weight_bytes",
        "predicted_kl",
        "is_knee",
    ]


def test_explanation_is_that_of_a_solution(solved: Run) -> None:
    name = solved.solve(bits=5).name
    groups = dict.fromkeys(solved.sensitivity.column("group").to_pylist())
    chosen = {group: solved.explain(group).chosen for group in groups}
    other = {group: solved.explain(group, name).chosen for group in groups}
    assert chosen != other
    assert solved.explain("1.mlp.down_proj").group == "model.layers.1.mlp.down_proj"
    with pytest.raises(StoreError, match="is not a solution"):
        solved.explain("lm_head", "bits-9.00")


def test_comparison_with_an_earlier_run(make_run: Any, solved: Run) -> None:
    earlier = make_run(name="earlier")
    solve_run(earlier, SolveOptions(bits=7.0), folder="")
    assert solved.compare(earlier.uri).verdict == "same"
    assert solved.compare(Run.open(earlier.uri)).before["uri"] == earlier.uri


def test_reports_are_written_again(solved: Run) -> None:
    path = Path(solved.path) / "report.md"
    text = path.read_text()
    path.unlink()
    assert str(path) in solved.report()
    assert path.read_text() == text


def test_left_out_shards_are_told(solved: Run) -> None:
    assert solved.quarantined == []
    path = Path(solved.path) / "run.json"
    entry = {"shard": 1, "stage": "score", "reason": "a NaN in the loss"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quarantined": [entry]}))
    assert solved.quarantined == [entry]


def test_imported_manifest_is_a_run(tmp_path: Path) -> None:
    names = ["FP8(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"]
    layers = {"a.quant_recipe": {"formats": names, "scores": [0.5, 0], "costs": [8, 16]}}
    manifest = {"scheme": {"auto_quantize_bits": 8}, "layer_sensitivity": layers}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    run = Run.import_manifest(str(path), str(tmp_path / "run"))
    assert run.explain("a").chosen == "FP8"
    with pytest.raises(StoreError, match="`overwrite`"):
        Run.import_manifest(str(path), str(tmp_path / "run"))


def test_search_wants_a_config_or_fields() -> None:
    for arguments in ({}, {"mode": "resume"}):
        with pytest.raises(ConfigError, match="one of both"):
            autoquant_ray.search(**arguments)
    with pytest.raises(ConfigError, match="--bitz"):
        autoquant_ray.search(model="m", data="d", out="o", bitz=4)


def test_notebook_shows_runs_and_solutions_escaped(solved: Run) -> None:
    path = Path(solved.path) / "run.json"
    values = json.loads(path.read_text())
    values["model"]["name"] = values["run_id"] = EVIL
    path.write_text(json.dumps(values))
    page = solved._repr_html_()
    assert "Predicted KL" in page
    compared = dataclasses.replace(solved.compare(solved.path), reasons=[EVIL])
    (Path(solved.path) / "manifest.json").unlink()
    unfinished = solved._repr_html_()
    assert "Unfinished run" in unfinished
    assert "aggregate done" in unfinished
    solution = dataclasses.replace(solved.solve(bits=6), name=EVIL)
    for shown in (page, unfinished, solution._repr_html_(), compared._repr_html_()):
        assert EVIL not in shown
        assert escape(EVIL) in shown


def test_python_shows_solutions_and_comparisons_on_one_line(solved: Run) -> None:
    solution, compared = solved.solve(bits=6), solved.compare(solved.path)
    assert repr(compared) == "Comparison('same', 0 groups moved, 0 formats change)"
    bits, kl = solution.summary["effective_bits"], solution.summary["predicted_kl_nats"]
    assert repr(solution).startswith(f"Solution('bits-6.00', {bits:.4f} bits, ")
    assert repr(solution).endswith(f"predicted KL {kl:.4g})")


def test_python_shows_explanations_and_evaluations_on_one_line(solved: Run) -> None:
    group = solved.plan.column("group")[0].as_py()
    explanation = solved.explain(group)
    number = len(explanation.formats)
    shown = f"Explanation({group!r}, {explanation.chosen}, of {number} formats)"
    assert repr(explanation) == shown
    assert re.fullmatch(r"Explanation\('lm_head', none, .+\)", repr(solved.explain("lm_head")))
    changes = {"dataset": EVIL, "kl_mean": 0.25, "kl_stderr": 0.01, "predicted_kl": 0.125}
    row = evaluation_row(RunDirectory(solved.path), **changes)
    rows = [row, row | {"name": "uniform wint8_aint8", "kl_mean": 0.5}]
    evaluation = Evaluation(rows=rows, left_out={}, paths={}, grave=[])
    assert repr(evaluation) == (
        f"Evaluation(measured KL 0.25 ± 0.01, predicted 0.125, 2 allocations on {EVIL!r})"
    )
    page = evaluation._repr_html_()
    assert page.count("<tr>") == 3
    assert "<td>uniform wint8_aint8</td>" in page
    assert EVIL not in page
    assert escape(EVIL) in page


def test_frontier_is_a_list_that_a_notebook_shows_as_a_table(solved: Run) -> None:
    points = solved.frontier(5)
    assert len(points) == 5
    least, most = points[0].effective_bits, points[-1].effective_bits
    assert repr(points) == f"Frontier(5 points, {least:.2f} to {most:.2f} bits)"
    page = points._repr_html_()
    assert page.count("<tr>") == 6
    assert page.count("<td>knee</td>") == sum(point.is_knee for point in points) == 1
    assert f"<td>{points[0].predicted_kl:.4g}</td>" in page


def test_document_names_everything_that_a_run_can_do() -> None:
    text = DOCUMENT.read_text()
    names = set(re.findall(r"`(?:run|Run)\.(\w+)", text))
    public = {name for name in vars(Run) if not name.startswith("_")}
    assert names == public
    for name, member in inspect.getmembers(Run, inspect.isfunction):
        if not name.startswith("_"):
            called = re.search(rf"`run\.{name}\((.*?)\)`", text)
            assert called is not None, name
            parameters = {p for p in inspect.signature(member).parameters if p != "self"}
            given = [part.strip() for part in called[1].split(",")]
            plain = {part for part in given if part and "=" not in part and part != "..."}
            assert plain <= parameters, name
