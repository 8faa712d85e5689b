"""Ray workers on this machine that are forked from one process which has imported everything.

Importing torch, transformers and ModelOpt takes a worker several seconds of CPU time, far more than
a small scan. Where a command starts a Ray cluster for itself, one process imports them once, and
Ray's workers are forked from it: Ray is given a program in Python's place
(:mod:`~autoquant_ray.distributed.forks.ray_python`), which asks for a fork where it would have
become a worker. A cluster that others started is not touched.

Only processes of a single thread may be forked safely, and only such that have not looked at a GPU:
elsewhere workers start as ever.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from autoquant_ray.distributed.forks.server import Start, become, run_script, serve
from autoquant_ray.distributed.host_memory import ENVIRONMENT
from autoquant_ray.distributed.this_machine import may_have_gpu

_THREADS = Path("/proc/self/task")
_OF_ALLOCATOR = "jemalloc_bg_thd"
_LONGEST_PATH = 100  # a socket's path is short


@contextmanager
def forked_workers(here: Sequence[str], there: Sequence[str]) -> Iterator[None]:
    """While open, Ray clusters that this process starts fork their workers from one process.

    Does nothing where that is not safe: not on Linux, where there is a GPU, with more threads than
    this, or once Ray was imported, which reads a process' environment then.

    Args:
        here: Modules that this process needs too; it imports them before it forks.
        there: Modules that workers need besides.
    """
    if not _can_fork():
        yield
        return
    os.environ.update(ENVIRONMENT)  # torch reads it with its first tensor, which modules make
    for name in here:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="aq-fork-", ignore_cleanup_errors=True) as folder:
        path, python = f"{folder}/socket", sys.executable
        program = write_ray_python(Path(folder, "python"), python, path)
        if _has_threads() or not _runs(program):
            yield
            return
        ends = os.pipe()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)
            process = os.fork()
            if process == 0:
                _leave(listener, ends, there)
        os.close(ends[0])
        sys.executable = program
        try:
            yield
        finally:
            sys.executable = python
            os.close(ends[1])  # it ends once it serves
            os.kill(process, signal.SIGTERM)  # before that
            os.waitpid(process, 0)


def write_ray_python(path: Path, python: str, server: str) -> str:
    """Write the program that Ray starts in Python's place; returns its path.

    Args:
        path: Of the program.
        python: What it runs for all that is no worker.
        server: Path of the server's socket.
    """
    code = Path(__file__).with_name("ray_python.py").read_text("utf-8")
    draft = path.with_name(f"{path.name}-{os.getpid()}")
    draft.write_text(f"#!{python} -SIE\n{code}\n\nmain({python!r}, {server!r})\n", "utf-8")
    draft.chmod(draft.stat().st_mode | stat.S_IXUSR)
    draft.rename(path)
    return str(path)


def _can_fork() -> bool:
    return (
        sys.platform == "linux"
        and hasattr(os, "pidfd_open")
        and "ray" not in sys.modules
        and threading.active_count() == 1
        and not may_have_gpu()
    )


def _has_threads() -> bool:
    """Whether this process has threads that do not expect to be forked.

    Those of OpenBLAS end before a fork, so that this forks and looks; Arrow's allocator stays.
    """
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    names = []
    for thread in _THREADS.iterdir():
        with suppress(OSError):  # it has ended
            names.append((thread / "comm").read_text().strip())
    return sum(1 for name in names if name != _OF_ALLOCATOR) > 1


def _runs(program: str) -> bool:
    """Whether the system starts a program that was just written: not where its folder forbids it,
    or where Python's path is no interpreter's; and whether its socket will fit beside it."""
    if len(program) > _LONGEST_PATH:
        return False
    try:
        done = subprocess.run([program, "-c", ""], capture_output=True, check=False)
        return done.returncode == 0
    except OSError:
        return False


def _leave(listener: socket.socket, ends: tuple[int, int], modules: Sequence[str]) -> None:
    """Be the server, then one of its processes; the code that forked this never goes on here."""
    code, folder = 1, Path(listener.getsockname()).parent
    atexit._clear()  # what the command does at its end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        os.setsid()  # a terminal's Ctrl-C is for the command
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):  # workers get others, and so does what cannot be imported there
            os.dup2(nowhere, stream)
        os.close(ends[1])
        start = _serve(listener, ends[0], modules)
        if start is None:
            shutil.rmtree(folder, ignore_errors=True)  # the command may have been killed
        else:
            become(start)
            run_script(start[0]["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the end of a process
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(listener: socket.socket, owner: int, modules: Sequence[str]) -> Start | None:
    for handler in logging.getLogger().handlers[:]:  # those of the command
        logging.getLogger().removeHandler(handler)
    logging.getLogger("autoquant_ray").setLevel(logging.NOTSET)
    for name in modules:
        importlib.import_module(name)
    if _has_threads():
        listener.close()  # workers start as ever
        select.select([owner], [], [])
        return None
    gc.collect()
    gc.freeze()  # collections in the forked processes copy no pages
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return serve(listener, owner)
