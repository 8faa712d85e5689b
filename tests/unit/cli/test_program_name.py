"""Commands are printed as the user's shell can start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "autoquant-ray"
_SCRIPT = f"""#!{sys.executable}
import logging

from autoquant_ray.cli.edge import Result, prints_result, show_lines
from autoquant_ray.cli.main import main

@main.command()
@prints_result
def lines():
    logging.getLogger("autoquant_ray").warning("see autoquant-ray explain, by autoquant-ray 1")
    text = "next: autoquant-ray solve " + "a-long-run-" * 8 + " --bits 5"
    show = lambda: show_lines([text, "  autoquant-ray jobs list"])
    return Result(json=dict, show=show, notes=["or: autoquant-ray report"])

main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the program in ``venv/bin``."""
    place = tmp_path / "venv" / "bin" / NAME
    place.parent.mkdir(parents=True)
    place.write_text(_SCRIPT)
    place.chmod(0o755)
    return tmp_path


def started(*command: str, folder: Path, path: str = "", arguments: str = "report none") -> str:
    """What a fresh process prints, on stdout and stderr."""
    places = os.pathsep.join(filter(None, (path, "/usr/bin", "/bin")))
    roots = os.pathsep.join([str(folder), str(Path(__file__).parents[3])])
    done = subprocess.run(
        [*command, *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PATH": places, "PYTHONPATH": roots},
    )
    return done.stdout + done.stderr


def test_name_is_printed_where_path_leads_to_the_program(folder: Path) -> None:
    bin_folder = str(folder / "venv" / "bin")
    text = started(f"{bin_folder}/{NAME}", folder=folder, path=bin_folder)
    assert "folder that `autoquant-ray scan`" in text


def test_path_is_printed_where_path_leads_elsewhere(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / NAME).write_text(_SCRIPT)
    (other / NAME).chmod(0o755)
    for start in (f"venv/bin/{NAME}", f"{folder}/venv/bin/{NAME}"):
        for path in ("", str(other)):
            text = started(start, folder=folder, path=path)
            assert f"folder that `venv/bin/{NAME} scan`" in text
    text = started(f"./{NAME}", folder=folder / "venv" / "bin")
    assert f"folder that `./{NAME} scan`" in text


def test_module_is_printed_as_it_was_started(folder: Path) -> None:
    text = started(sys.executable, "-m", "autoquant_ray", folder=folder)
    python = min(sys.executable, os.path.relpath(sys.executable, folder), key=len)
    assert f"folder that `{python} -m autoquant_ray scan`" in text
    path = str(Path(sys.executable).parent)
    text = started(sys.executable, "-m", "autoquant_ray", folder=folder, path=path)
    assert f"folder that `{Path(sys.executable).name} -m autoquant_ray scan`" in text


def test_python_is_the_users_while_workers_are_started_by_another(folder: Path) -> None:
    """A command that forks its workers gives Ray a program in Python's place."""
    (folder / "sitecustomize.py").write_text("import sys; sys.executable = '/tmp/fork/python'")
    path, name = str(Path(sys.executable).parent), Path(sys.executable).name
    for start in (name, sys.executable):
        text = started(start, "-m", "autoquant_ray", folder=folder, path=path)
        assert f"folder that `{name} -m autoquant_ray scan`" in text


def test_lines_notes_and_logs_name_the_program_alike(folder: Path) -> None:
    text = started(f"venv/bin/{NAME}", folder=folder, arguments="lines")
    run = "a-long-run-" * 8
    assert text.splitlines() == [
        f"next: venv/bin/{NAME} solve {run} --bits 5",
        f"  venv/bin/{NAME} jobs list",
        f"see venv/bin/{NAME} explain, by {NAME} 1",
        f"or: venv/bin/{NAME} report",
    ]
