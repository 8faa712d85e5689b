"""The environment of each tool, made once: a folder of its own, never that of this package."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from engines.tools import TOOLS

_DONE = ".installed"


def python_of(tool: str, work: Path) -> str:
    """The interpreter of a tool's environment, which is made if it is not there."""
    if not TOOLS[tool].packages:
        return sys.executable
    folder = work / "environments" / tool
    python = str(folder / "bin" / "python")
    if not (folder / _DONE).exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *TOOLS[tool].packages], check=True, env=without_package())
        if TOOLS[tool].unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *TOOLS[tool].unwanted], check=True)
        (folder / _DONE).touch()
    return python


def run_in(python: str, script: str, arguments: Sequence[str]) -> str:
    """What a script of ``in_tools`` prints; this package cannot be imported there.

    Raises:
        RuntimeError: It fails; with the end of what it says.
    """
    path = Path(__file__).parent / "in_tools" / script
    command = [python, "-W", "ignore", str(path), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=without_package()
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-1500:]
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{said}")
    return done.stdout


def without_package() -> dict[str, str]:
    """The environment variables, without a way to this package, and without a network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1"}
