"""Commands and Ray workers that start with torch, transformers and ModelOpt imported.

Each is a process of its own all the same, forked by ``fork_server.py``, of which a test session
starts one. What a command imports at all is tested with processes that start from nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from unittest import mock

from autoquant_ray.distributed.forks.workers import write_ray_python

_SUPPORT = Path(__file__).parent
_FOLDER = "AUTOQUANT_TESTS_FORK_SERVER"
_OWNER = "AUTOQUANT_TESTS_OWNER"


def own_fork_server() -> None:
    """Let the fork server of this process and its children live as long as this process."""
    os.environ[_OWNER] = str(os.getpid())
    os.environ[_FOLDER] = tempfile.mkdtemp(prefix="aq", dir="/tmp")  # a socket's path is short


def _server() -> str:
    """Path of the server's socket; the first caller starts the server."""
    folder = Path(os.environ[_FOLDER])
    path = folder / "socket"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return str(path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(128)
            number = listener.fileno()
            script = str(_SUPPORT / "fork_server.py")
            subprocess.Popen(
                [sys.executable, "-P", script, str(number), os.environ[_OWNER]],
                pass_fds=[number],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
    return str(path)


def _ray_python() -> str:
    """A program that Ray starts in Python's place, for processes that are forked instead."""
    server = _server()
    path = Path(server).with_name("python")
    return str(path) if path.exists() else write_ray_python(path, sys.executable, server)


@contextmanager
def warm_ray() -> Iterator[None]:
    """Ray clusters that this process starts fork their workers from the server."""
    with mock.patch.object(sys, "executable", _ray_python()):
        yield


class WarmProcess:
    """A command that runs, as :class:`subprocess.Popen` shows it.

    It runs in a session of its own, so that its process group can be signalled.

    Attributes:
        pid: Process id.
        returncode: None until it was waited for.
    """

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], ray_is_warm: bool = True
    ) -> None:
        """Start it.

        Args:
            arguments: After ``autoquant-ray``.
            env: All of its environment.
            ray_is_warm: Whether the processes of a cluster that it starts are forked too.
        """
        self.args = ["autoquant-ray", *arguments]
        self.returncode: int | None = None
        self._resources = ExitStack()
        folder = self._resources.enter_context(tempfile.TemporaryDirectory())
        self._files = [Path(folder, name) for name in ("stdout", "stderr")]
        self._socket = self._resources.enter_context(socket.socket(socket.AF_UNIX))
        self._socket.connect(_server())
        request = {
            "arguments": self.args,
            "env": dict(env),
            "folder": os.getcwd(),
            "ray_python": _ray_python() if ray_is_warm else "",
        }
        text = json.dumps(request).encode()
        streams = [os.open(os.devnull, os.O_RDONLY)]
        streams += [os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) for path in self._files]
        socket.send_fds(self._socket, [struct.pack("<q", len(text))], streams)
        self._socket.sendall(text)
        for stream in streams:
            os.close(stream)
        self.pid = self._number()

    def _number(self) -> int:
        """The next number that the server sends."""
        text = self._socket.recv(8, socket.MSG_WAITALL)
        assert len(text) == 8, "the fork server has ended"
        return int(struct.unpack("<q", text)[0])

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.returncode = self._number()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; its exit code.

        Raises:
            subprocess.TimeoutExpired: It has not, after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._number()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Wait until it has ended; all of stdout and stderr."""
        self.wait()
        out, err = (path.read_text() for path in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        self.wait()
        self._resources.close()


def run_warm(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        arguments: After ``autoquant-ray``.
        env: All of its environment.
    """
    with WarmProcess(arguments, env) as process:
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)
