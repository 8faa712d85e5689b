"""What importing costs: which heavy packages a command or a public name loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMANDS, JOBS_COMMANDS

import autoquant_ray
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.compare.history import LOCKS
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import lease
from autoquant_ray.solve import solve_run

HEAVY = {"torch", "ray", "transformers", "modelopt", "datasets", "bokeh"}

LIST_MODULES = """
import json, sys
try:
    {code}
finally:
    with open({target!r}, "w") as stream:
        json.dump(sorted(name.partition(".")[0] for name in sys.modules), stream)
"""


@pytest.fixture
def modules_after(tmp_path: Path) -> Any:
    """Run code in a fresh interpreter; returns (top-level modules loaded at its end, output)."""

    def run_code(code: str) -> tuple[set[str], str]:
        target = tmp_path / "modules.json"
        done = subprocess.run(
            [sys.executable, "-c", LIST_MODULES.format(code=code, target=str(target))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(target.read_text())), done.stdout

    return run_code


def command(*arguments: Any) -> str:
    """Code that runs the command line."""
    words = [str(argument) for argument in arguments]
    return f"from autoquant_ray.cli.main import main; main({words!r}, prog_name='autoquant-ray')"


def test_import_of_package_is_light(modules_after: Any) -> None:
    modules, _ = modules_after("import autoquant_ray; print(autoquant_ray.__version__)")
    assert "autoquant_ray" in modules
    assert not modules & (HEAVY | {"numpy", "pydantic", "pyarrow"})


def test_import_of_public_names_is_light(modules_after: Any) -> None:
    names = "Run, search, ScanConfig, solve_run, load_quantization_config"
    shown = f"print(*(value.__name__ for value in ({names})), sep=', ')"
    modules, output = modules_after(f"from autoquant_ray import {names}; {shown}")
    assert output.strip() == names
    assert not modules & HEAVY


def test_import_of_run_search_loads_ray(modules_after: Any) -> None:
    """The checks above mean something only if the heavy import would be seen."""
    modules, _ = modules_after("from autoquant_ray import run_search")
    assert "ray" in modules


def test_public_names_all_exist() -> None:
    for name in autoquant_ray.__all__:
        assert getattr(autoquant_ray, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = autoquant_ray.no_such_name


HELP_PAGES = """
import contextlib, io
from autoquant_ray.cli.main import main
heavy = {heavy!r}
for words in {pages!r}:
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main(words, prog_name="autoquant-ray")
    loaded = heavy & {{name.partition(".")[0] for name in sys.modules}}
    if loaded or "autoquant-ray" not in page.getvalue():
        print(words, sorted(loaded), page.getvalue()[:80])
"""


def test_help_is_light(modules_after: Any) -> None:
    """One process prints every page; the first page that is not light is named first."""
    pages = [["--help"], ["--version"]]
    pages += [[*name.split(), "--help"] for name in (*COMMANDS, *JOBS_COMMANDS)]
    code = HELP_PAGES.format(heavy=HEAVY, pages=pages).replace("\n", "\n    ")
    modules, output = modules_after(code)
    assert output == ""
    assert "autoquant_ray" in modules
    assert not modules & HEAVY


def test_solve_is_light(make_run: Any, modules_after: Any) -> None:
    modules, output = modules_after(command("solve", make_run().uri, "--bits", 6))
    assert "effective bits" in output
    assert not modules & HEAVY


def test_plan_of_a_dense_model_does_without_modelopt(model_folder: Any, modules_after: Any) -> None:
    formats = "wint4_afp16,wfp4_afp8,wint5_g64_afp16:max,wint8_aint8,wfp8_afp16:gptq"
    arguments = (model_folder("llama"), "--device", "cpu", "--formats", formats)
    modules, output = modules_after(command("plan", *arguments))
    assert "of 9 groups searched" in output
    assert "transformers" in modules
    assert not modules & {"modelopt", "ray", "datasets"}


def test_explain_is_light(make_run: Any, modules_after: Any) -> None:
    directory = make_run()
    solve_run(directory, SolveOptions(bits=8), folder="")
    modules, output = modules_after(command("explain", directory.uri, "1.mlp.down_proj"))
    assert output.startswith("group: model.layers.1.mlp.down_proj\n")
    assert not modules & (HEAVY | {"pandas"})


def test_report_is_light(make_run: Any, modules_after: Any) -> None:
    directory = make_run()
    solve_run(directory, SolveOptions(bits=8), folder="")
    modules, output = modules_after(command("report", directory.uri))
    assert output.splitlines() == [directory.path("report.md"), directory.path("report.html")]
    assert not modules & HEAVY


def test_compare_is_light(make_run: Any, modules_after: Any) -> None:
    runs = [make_run(name=name) for name in ("monday", "tuesday")]
    for directory in runs:
        solve_run(directory, SolveOptions(bits=8), folder="")
    modules, output = modules_after(command("compare", *(directory.uri for directory in runs)))
    assert output.startswith("# same: ")
    assert not modules & HEAVY


def test_nightly_that_is_held_is_light(tmp_path: Path, modules_after: Any) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("{kind: nightly, name: demo, model: m, data: d.txt, bits: 6}")
    with lease(RunDirectory(str(tmp_path / "runs")), f"{LOCKS}/demo"):
        modules, output = modules_after(command("nightly", job, "--runs", tmp_path / "runs"))
    assert "is at work elsewhere" in output
    assert not modules & HEAVY


def test_site_is_light(make_run: Any, modules_after: Any) -> None:
    folder = Path(make_run().uri).parent
    modules, output = modules_after(command("site", folder))
    assert output.strip() == str(folder / "index.html")
    assert not modules & HEAVY


def test_import_command_is_light(tmp_path: Path, modules_after: Any) -> None:
    entry = {
        "formats": ["FP8(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"],
        "scores": [0.5, 0],
        "costs": [8, 16],
    }
    manifest = tmp_path / "manifest.json"
    layers = {"a.quant_recipe": entry}
    manifest.write_text(
        json.dumps({"scheme": {"auto_quantize_bits": 8}, "layer_sensitivity": layers})
    )
    modules, output = modules_after(command("import", manifest, "--out", tmp_path / "run"))
    assert "effective bits: 8" in output
    assert not modules & HEAVY
