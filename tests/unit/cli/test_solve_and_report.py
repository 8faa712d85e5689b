"""``solve``, ``report`` and ``import`` on a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_line import refusal, run

from autoquant_ray.runs.directory import RunDirectory


def test_solve_json_is_the_written_solution(make_run: Any) -> None:
    directory = make_run()
    result = run("solve", directory.uri, "--bits", 6, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["name"] == "bits-6.00"
    written = json.loads(Path(printed["paths"]["manifest.json"]).read_text())
    assert written["solution"].items() <= printed.items()
    assert written["solution"]["effective_bits"] <= 6
    assert all(Path(path).parent.name == "bits-6.00" for path in printed["paths"].values())
    assert all(Path(path).is_file() for path in printed["paths"].values())


def test_solve_pins_and_allowed_formats_are_kept(make_run: Any) -> None:
    directory = make_run()
    first, second = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"
    options = ("--pin", f"{first}=none", "--allow", "*.mlp.*=wint8_aint8,wfp8_afp8")
    result = run("solve", directory.uri, "--bits", 9, *options, "--max-formats", 2, "--json")
    assert result.exit_code == 0, result.output
    rows = pq.read_table(json.loads(result.stdout)["paths"]["manifest.parquet"]).to_pylist()
    chosen = {row["module"]: row["format"] for row in rows}
    assert chosen[first] == "none"
    assert second in chosen
    mlp = {format_ for module, format_ in chosen.items() if ".mlp." in module}
    assert mlp <= {"wint8_aint8", "wfp8_afp8"}
    assert len(set(chosen.values()) - {"none"}) <= 2


def test_solve_says_where_a_single_format_is_predicted_too_low(make_run: Any) -> None:
    directory = make_run()
    for bits, has_note in ((4.3, True), (6, False)):
        shown = run("solve", directory.uri, "--bits", bits).stdout
        assert ("note: All quantized groups are in wint4_afp16, at " in shown) == has_note
        report = directory.read_bytes(f"solutions/bits-{bits:.2f}/report.md").decode()
        assert ("All quantized groups are in wint4_afp16" in report) == has_note
    pins = ("--allow", "*=wint8_aint8")
    assert "note: All" not in run("solve", directory.uri, "--bits", 8.5, *pins).stdout


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        (("--pin", "model.layers.0.mlp.gate=none"), "model.layers.0.mlp.gate_proj"),
        (("--pin", "model.layers.0.mlp.gate_proj=wint4"), "wint4_afp16"),
        (("--allow", "*experts*=none"), "'*experts*'"),
        (("--allow", "*=wint4"), "wint4_afp16"),
    ],
)
def test_solve_constraint_on_unknown_name_is_refused(
    option: tuple[str, str], shown: str, make_run: Any
) -> None:
    directory = make_run()
    line = refusal(run("solve", directory.uri, "--bits", 8, *option))
    assert shown in line
    assert directory.list_folders("solutions") == []


@pytest.mark.parametrize("command", [("solve", "--bits", "4"), ("report",)])
def test_command_on_folder_that_is_no_run_is_refused(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    name, *options = command
    line = refusal(run(name, tmp_path, *options))
    assert f"{tmp_path} is not a run directory" in line
    assert "run.json" in line


def test_report_without_solution_is_refused(make_run: Any) -> None:
    directory = make_run()
    assert "no solution yet" in refusal(run("report", directory.uri))


def test_report_writes_all_reports_again(make_run: Any) -> None:
    directory = make_run()
    for bits in (5, 7):
        assert run("solve", directory.uri, "--bits", bits).exit_code == 0
    root = Path(directory.uri)
    before = {path: path.read_bytes() for path in root.rglob("report.*")}
    assert len(before) == 4
    for path in before:
        path.unlink()
    result = run("report", directory.uri)
    assert result.exit_code == 0, result.output
    assert sorted(result.stdout.split()) == sorted(str(path) for path in before)
    assert {path: path.read_bytes() for path in before} == before


def test_report_json_lists_the_paths(make_run: Any) -> None:
    directory = make_run()
    run("solve", directory.uri, "--bits", 5)
    paths = json.loads(run("report", directory.uri, "--json").stdout)["paths"]
    assert sorted(Path(path).name for path in paths) == ["report.html", "report.md"]


def test_import_into_existing_run_without_flag_keeps_it(make_run: Any) -> None:
    directory: RunDirectory = make_run()
    before = {p: p.read_bytes() for p in Path(directory.uri).rglob("*") if p.is_file()}
    manifest = Path(directory.uri).parent / "manifest.json"
    manifest.write_text(
        json.dumps(
            {
                "scheme": {"auto_quantize_bits": 8},
                "layer_sensitivity": {
                    "a": {"formats": ["F", "NONE"], "scores": [1.0, 0], "costs": [8.0, 16.0]}
                },
            }
        )
    )
    line = refusal(run("import", manifest, "--out", directory.uri))
    assert "--overwrite" in line
    assert {p: p.read_bytes() for p in Path(directory.uri).rglob("*") if p.is_file()} == before
