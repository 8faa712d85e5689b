"""The fork server of all tests: processes in which torch, transformers and ModelOpt are imported.

Importing them takes most of a small command's time and of a Ray worker's. The server imports them
once for all test processes, and ends with the process whose id is its second argument.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import socket
import sys
from pathlib import Path

from autoquant_ray.distributed.forks.server import become, run_script, serve

PRELOADED = (
    "datasets",
    "transformers.models.auto.modeling_auto",
    "autoquant_ray.cli.main",
    "autoquant_ray.evaluate.runner",
    "autoquant_ray.export.checkpoint",
    "autoquant_ray.score.scorer",
)
"""Not Ray, which reads its process' environment when it is imported."""


def main() -> None:
    """Import, then serve; a forked process goes on as the main program, and ends like any."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    folder = Path(listener.getsockname()).parent
    for name in PRELOADED:
        importlib.import_module(name)
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()  # collections in the forked processes copy no pages
    start = serve(listener, os.pidfd_open(int(sys.argv[2])))
    if start is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    become(start)
    request, _ = start
    if request.get("ray_python"):
        sys.executable = request["ray_python"]
    arguments = request["arguments"]
    if arguments[0] == "autoquant-ray":
        from autoquant_ray.cli.main import main as command_line

        sys.argv = arguments
        command_line(prog_name=arguments[0])
    run_script(arguments)


if __name__ == "__main__":
    main()
