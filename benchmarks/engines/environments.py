"""The environment of each tool, made once: a folder of its own, never that of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from engines.tools import TOOLS

SCRIPTS = Path(__file__).parent / "in_tools"
_DONE = ".installed"


def environment_of(name: str, work: Path) -> tuple[str, Path]:
    """The interpreter of a tool's environment and its folder, which is made if it is not there."""
    tool = TOOLS[name]
    folder = work / "environments" / (tool.environment or name)
    python = str(folder / "bin" / "python") if tool.packages else sys.executable
    if (folder / _DONE).exists() or not (tool.packages or tool.build):
        return python, folder
    if tool.packages:
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *tool.packages], check=True, env=without_package())
        if tool.unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *tool.unwanted], check=True)
    if tool.build:
        script = str(SCRIPTS / tool.build)
        subprocess.run(["sh", script, str(folder), python], check=True, env=without_package())
    (folder / _DONE).touch()
    return python, folder


def run_in(python: str, script: str, arguments: Sequence[str]) -> str:
    """What a script of ``in_tools`` prints, which imports nothing of this package.

    Raises:
        RuntimeError: It fails; with the end of what it says.
    """
    command = [python, "-W", "ignore", str(SCRIPTS / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=without_package()
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-1500:]
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{said}")
    return done.stdout


def versions_in(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Package -> its version in an environment."""
    script = "import json, sys; from importlib.metadata import version as of; "
    script += "print(json.dumps({name: of(name) for name in sys.argv[1:]}))"
    command = [python, "-c", script, *packages]
    done = subprocess.run(command, capture_output=True, check=True, env=without_package())
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def without_package() -> dict[str, str]:
    """The environment variables, without a way to this package, and without a network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1"}
