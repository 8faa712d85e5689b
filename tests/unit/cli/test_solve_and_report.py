"""``solve``, ``report`` and ``import`` on a run directory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import refusal, run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.evaluate.table import Measured
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.solve import solve_run


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


GRAVE = "grave concern: Hardly better than shuffled scores: With scores shuffled among the groups"


def test_solve_prints_every_grave_concern_of_its_report_on_a_line(make_run: Any) -> None:
    directory = make_run()
    alike = ("--allow", "*=wint8_aint8", "--json")
    result = run("solve", directory.uri, "--bits", 8.5, *alike)
    (line,) = result.stderr.splitlines()
    assert line.startswith(GRAVE)
    assert len(line) <= 400
    name = json.loads(result.stdout)["name"]
    report = directory.read_bytes(f"solutions/{name}/report.md").decode()
    assert report.count("(grave)") == 1
    assert "grave concern" not in run("solve", directory.uri, "--bits", 16).output
    assert "(grave)" not in directory.read_bytes("solutions/bits-16.00/report.md").decode()


def test_scan_prints_every_grave_concern(
    make_run: Any, model_folder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = make_run()
    options = SolveOptions(bits=8.5, allow={"*": ("wint8_aint8",)})
    finished = SimpleNamespace(solution=solve_run(directory, options), quarantined=[])
    module = importlib.import_module("autoquant_ray.scan")
    monkeypatch.setattr(module, "run_search", lambda *_: finished)
    model = model_folder("llama")
    result = run("scan", model, "--data", "pydoc", "--out", tmp_path / "out", "--bits", 8)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1].startswith(GRAVE)


def test_evaluate_prints_every_grave_concern(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solution alone breaks the model, and so its rivals are better too."""
    directory = make_run()
    solve_run(directory, SolveOptions(bits=6), folder="")

    def measured(candidates: Any, _shards: Any = None) -> list[Measured]:
        losses = [np.inf, *(0.1 for _ in candidates[1:])]
        return [
            Measured(
                kl_N=np.full(8, loss),
                kl_S=np.full(4, 2 * loss),
                loss=8.0,
                reference_loss=8.0,
                num_agreeing=8,
                tokens_S=np.full(4, 2.0),
            )
            for loss in losses
        ]

    @contextmanager
    def measuring(state: Any, _config: Any) -> Iterator[Any]:
        yield SimpleNamespace(
            state=state,
            facts={"name": "held out", "source": "held out", "num_shards": 4},
            data_key="key",
            left_out={},
            require_lease=lambda: None,
            measure=measured,
        )

    module = importlib.import_module("autoquant_ray.evaluate.evaluate")
    monkeypatch.setattr(module, "measuring", measuring)
    result = run("evaluate", directory.uri)
    assert result.exit_code == 0, result.output
    report = directory.read_bytes("report.md").decode()
    lines = result.stderr.splitlines()
    assert len(lines) == report.count("(grave)") >= 1
    assert any(line.startswith("grave concern: The solution breaks the model: ") for line in lines)
    assert max(map(len, lines)) <= 400


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


@pytest.mark.parametrize("name", ["..", ".", "../solutions/bits-9.00", "bits-9.00/../bits-9.00"])
def test_solution_that_is_a_path_is_refused(name: str, make_run: Any, tmp_path: Path) -> None:
    """``..`` is the run itself: what is measured of it would be kept under that name."""
    directory = make_run()
    solve_run(directory, SolveOptions(bits=9))
    recipe = ("--format", "recipe", "--tool", "auto-round", "--out", tmp_path / "recipe")
    for words in (("explain", "0.self_attn.o_proj"), ("export", *recipe), ("evaluate",)):
        command, *more = words
        line = refusal(run(command, directory.uri, *more, "--solution", name))
        assert f"{name!r} is no name of a solution; give that of a folder below" in line
    assert not (tmp_path / "recipe").exists()
    done = run("explain", directory.uri, "0.self_attn.o_proj", "--solution", "bits-9.00/")
    assert done.exit_code == 0, done.output
