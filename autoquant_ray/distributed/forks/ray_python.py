"""What Ray starts in Python's place: a worker is forked by the fork server, the rest is as ever.

A program of it is written that calls :func:`main`
(:func:`~autoquant_ray.distributed.forks.workers.write_ray_python`). It stays as long as the
worker: it passes signals on and ends as the worker does. The worker in turn ends when this program
is killed, or the raylet that started it.
"""

import json
import os
import select
import signal
import socket
import struct
import sys


def worker(words: list[str]) -> list[str]:
    """Script and arguments of a worker, empty for another process."""
    if os.path.basename(words[0]) == "setup_worker.py":
        if any("runtime-env-context" in word and not word.endswith("={}") for word in words):
            return []
        words = [w for w in words[1:] if not w.startswith(("--language", "--serialized-runtime"))]
    return words if os.path.basename(words[0]) == "default_worker.py" else []


def number(server: socket.socket) -> int | None:
    """The next number that the server sends; None where there is no server any more."""
    try:
        text = server.recv(8, socket.MSG_WAITALL)
    except OSError:
        return None
    return int(struct.unpack("<q", text)[0]) if len(text) == 8 else None


def fork(path: str, words: list[str]) -> tuple[socket.socket, int] | None:
    """Ask for a worker; returns the connection that it ends with, and its process id.

    None where nothing is forked.

    Args:
        path: The server's socket.
        words: Script and arguments; empty: what is wanted is no worker.
    """
    if not words:
        return None
    request = {"arguments": words, "env": dict(os.environ), "folder": os.getcwd()}
    text = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(path)
        socket.send_fds(server, [struct.pack("<q", len(text))], [0, 1, 2])
        server.sendall(text)
    except OSError:
        return None
    process = number(server)
    return None if process is None else (server, process)


def main(python: str, path: str) -> None:
    """Be what the arguments say.

    Args:
        python: Runs what is not forked.
        path: The server's socket.
    """
    parent = os.pidfd_open(os.getppid())
    forked = fork(path, worker(sys.argv[1:]))
    if forked is None:
        os.execv(python, [python, *sys.argv[1:]])
    server, process = forked
    for passed in (signal.SIGTERM, signal.SIGINT):
        signal.signal(passed, lambda received, _: os.kill(process, received))
    if parent in select.select([server.fileno(), parent], [], [])[0]:
        sys.exit(1)
    code = number(server)
    if code is None:
        sys.exit(1)
    if code < 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
