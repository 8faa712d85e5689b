"""The command line in a process that starts with torch, transformers and ModelOpt imported.

Importing them takes most of a small command's time. Each command is a process of its own all the
same: forked from Python's fork server, which imports them once and never starts a thread. What a
command imports at all is tested with processes that start from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "ray",
        "transformers",
        "autoquant_ray.cli.main",
        "autoquant_ray.scan",
        "autoquant_ray.score.scorer",
    ]
)


def run_warm(
    arguments: Sequence[str], env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        arguments: After ``autoquant-ray``.
        env: All of its environment.
        timeout: Seconds.

    Raises:
        subprocess.TimeoutExpired: It took longer, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = _CONTEXT.Process(target=_become, args=(list(arguments), dict(env), folder))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        assert process.exitcode is not None
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)


def _become(arguments: list[str], env: dict[str, str], folder: str) -> None:
    """Turn a forked process into the command."""
    os.environ.clear()
    os.environ.update(env)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["autoquant-ray", *arguments]

    from autoquant_ray.cli.main import main

    main(prog_name="autoquant-ray")
