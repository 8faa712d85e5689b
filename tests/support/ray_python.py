"""What Ray starts in Python's place: a worker is forked by the fork server, the rest is as ever.

``warm_commands.py`` writes a program of it that calls ``main``. It stays as long as the worker: it
passes signals on and ends as the worker does. The worker in turn ends when this program is killed,
or the raylet that started it.
"""

import json
import os
import select
import signal
import socket
import struct
import sys


def worker(words):
    """Script and arguments of a worker, empty for another process."""
    if os.path.basename(words[0]) == "setup_worker.py":
        if any("runtime-env-context" in word and not word.endswith("={}") for word in words):
            return []
        words = [w for w in words[1:] if not w.startswith(("--language", "--serialized-runtime"))]
    return words if os.path.basename(words[0]) == "default_worker.py" else []


def number(server):
    """The next number that the server sends."""
    text = server.recv(8, socket.MSG_WAITALL)
    if len(text) < 8:
        sys.exit(1)
    return struct.unpack("<q", text)[0]


def main(python, path):
    """Be what the arguments say.

    Args:
        python: Runs what is no worker.
        path: The server's socket.
    """
    parent = os.pidfd_open(os.getppid())
    words = worker(sys.argv[1:])
    if not words:
        os.execv(python, [python, *sys.argv[1:]])
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    request = {"arguments": words, "env": dict(os.environ), "folder": os.getcwd()}
    text = json.dumps(request | {"ray_python": ""}).encode()
    socket.send_fds(server, [struct.pack("<q", len(text))], [0, 1, 2])
    server.sendall(text)
    process = number(server)
    for passed in (signal.SIGTERM, signal.SIGINT):
        signal.signal(passed, lambda received, _: os.kill(process, received))
    if parent in select.select([server, parent], [], [])[0]:
        sys.exit(1)
    code = number(server)
    if code < 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
