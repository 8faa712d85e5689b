"""A server that forks processes in which modules are imported already.

It never starts a thread. A client connects, sends what the process is to run and its three standard
streams, gets the process's id, and once it has ended its exit code (that of ``subprocess``: a
signal is negative). A client that goes away takes its process with it, and the server ends, with
all of its processes, when the file descriptor of its owner can be read.
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

Start = tuple[dict[str, Any], list[int]]
"""What a process is to run (``arguments``, ``env``, ``folder``), and its three streams."""


def serve(listener: socket.socket, owner: int) -> Start | None:
    """Fork for clients; returns in each forked process what it is, and None once the owner ended.

    Args:
        listener: Where clients connect.
        owner: Readable once the server is to end: a process' descriptor, or a pipe of it.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, ("client", 0, None))
    selector.register(owner, selectors.EVENT_READ, ("owner", 0, None))
    while True:
        for key, _ in selector.select():
            what, process, client = key.data
            if what == "owner":
                _kill_all(selector)
                return None
            if what == "client":
                start = _fork(listener.accept()[0], selector)
                if start is not None:
                    listener.close()
                    return start
            elif what == "gone" and _is_registered(client, selector):
                selector.unregister(client)
                os.kill(process, signal.SIGKILL)
            elif what == "ended":
                selector.unregister(key.fileobj)
                os.close(key.fd)
                _report(process, client, selector)


def _kill_all(selector: selectors.BaseSelector) -> None:
    """Kill every process that was forked."""
    for key in selector.get_map().values():
        what, process, _ = key.data
        if what == "ended":
            os.kill(process, signal.SIGKILL)


def _fork(client: socket.socket, selector: selectors.BaseSelector) -> Start | None:
    """Fork a process for a client; returns in the process what it is to run."""
    request, streams = _receive(client)
    if request is None:
        client.close()
        return None
    process = os.fork()
    if process == 0:
        for key in list(selector.get_map().values()):
            if key.data[0] != "client":
                os.close(key.fd)
        selector.close()
        client.detach()
        return request, streams
    for stream in streams:
        os.close(stream)
    client.sendall(struct.pack("<q", process))
    selector.register(client, selectors.EVENT_READ, ("gone", process, client))
    selector.register(os.pidfd_open(process), selectors.EVENT_READ, ("ended", process, client))
    return None


def _report(process: int, client: socket.socket, selector: selectors.BaseSelector) -> None:
    """Tell a client how its process has ended."""
    _, status = os.waitpid(process, 0)
    if _is_registered(client, selector):
        selector.unregister(client)
        with suppress(OSError):  # it may go away at the same time
            client.sendall(struct.pack("<q", os.waitstatus_to_exitcode(status)))
    client.close()


def _is_registered(client: socket.socket, selector: selectors.BaseSelector) -> bool:
    """Whether a client is still there; it is not once its process' end was reported."""
    return any(key.fileobj is client for key in selector.get_map().values())


def _receive(client: socket.socket) -> tuple[Any, list[int]]:
    """A request and its streams; None if the client changed its mind."""
    head, streams, _, _ = socket.recv_fds(client, 8, 3)
    if len(head) < 8:
        return None, []
    (length,) = struct.unpack("<q", head)
    text = b""
    while len(text) < length:
        part = client.recv(length - len(text))
        if not part:
            return None, []
        text += part
    return json.loads(text), list(streams)


def become(start: Start) -> None:
    """Take over streams, environment and folder, in a session of its own."""
    request, streams = start
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    num_threads = os.environ.get("OMP_NUM_THREADS", "")
    if num_threads.isdigit():  # OpenMP reads it when it is loaded
        import torch

        torch.set_num_threads(int(num_threads))


def run_script(arguments: list[str]) -> None:
    """Run a script as Python does, with these arguments, the first of which is its path."""
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
