"""Progress: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from autoquant_ray.distributed.progress import Throughput, Waiting, progress

SCRIPT = """
import logging
from autoquant_ray.cli.edge import set_up_logging
from autoquant_ray.distributed.progress import progress
set_up_logging(False)
with progress("score", 4) as advance:
    for shard in range(4):
        if shard == 2:
            logging.getLogger("autoquant_ray").warning("a worker died (shard 2)")
        advance("480 tokens/s, 2 worker(s) [red]\\x1b[0m")
"""
_CONTROL = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|(\r)|(\n)|([^\x1b\r\n]+)")


def screen(output: str) -> list[str]:
    """What a terminal shows in the end, line by line; knows the codes that rich writes."""
    lines, row, column = [""], 0, 0
    for match in _CONTROL.finditer(output):
        number, letter, carriage, newline, text = match.groups()
        if letter == "A":
            row -= int(number or 1)
        elif letter == "K":
            lines[row] = "" if number == "2" else lines[row][:column]
        elif carriage:
            column = 0
        elif newline:
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif text:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + text + line[column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


def test_progress_on_a_terminal_is_one_bar_below_the_messages() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, env=environment) as child:
        os.close(theirs)
        output = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux' end of a terminal
                break
            if not chunk:
                break
            output += chunk
    os.close(ours)
    assert child.returncode == 0
    message, bar = screen(output.decode())
    assert message == "a worker died (shard 2)"
    assert bar.startswith("score ")
    assert "4/4" in bar
    assert "480 tokens/s, 2 worker(s) [red]\\x1b[0m" in bar


def test_progress_names_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), progress("fit", 2, done=1, unit="layers") as advance:
        advance("2 worker(s)")
    assert caplog.messages == ["fit: 2 of 2 layers, 2 worker(s)"]
    cell = Cell(KERNEL_SHELL)
    for name, module in cell.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with progress("fit", 2, done=1, unit="layers"):
        pass
    assert cell.outputs[0][0]["text/plain"] == "fit: 1 of 2 layers"


def test_progress_elsewhere_is_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress("score", 30, done=12) as advance:
        for _ in range(18):
            advance("480 tokens/s")
    assert caplog.messages == [
        f"score: {count} of 30 shards, 480 tokens/s" for count in (15, 18, 21, 24, 27, 30)
    ]


def test_progress_elsewhere_says_how_long_it_still_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter((100.0, 106.0, 108.0, 120.0))
    monkeypatch.setattr("autoquant_ray.distributed.progress.time.monotonic", lambda: next(seconds))
    with caplog.at_level(logging.INFO), progress("score", 5, done=2) as advance:
        for _ in range(3):
            advance()
    assert caplog.messages == [
        "score: 3 of 5 shards, about 12 s left",
        "score: 4 of 5 shards, about 4 s left",
        "score: 5 of 5 shards",
    ]


def test_waiting_is_said_every_eight_seconds_and_every_minute_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 0.0
    waiting = Waiting(lambda: now_s)
    said = []
    with caplog.at_level(logging.INFO):
        for now_s in range(1, 200):
            before = len(caplog.messages)
            waiting.note("waiting for 2 worker(s)")
            if len(caplog.messages) > before:
                said.append(now_s)
        waiting.restart()
        now_s += 7
        waiting.note("computing")
    assert said == [8, 16, 24, 32, 40, 48, 56, 116, 176]
    assert caplog.messages[1] == "waiting for 2 worker(s): 16 s"
    assert "computing" not in " ".join(caplog.messages)


class Cell:
    """What a notebook's cell shows, fed as IPython's ``display`` function feeds it."""

    def __init__(self, shell: object) -> None:
        self.outputs: list[list[dict[str, str]]] = []
        self.modules = {
            "IPython": SimpleNamespace(get_ipython=lambda: shell),
            "IPython.display": SimpleNamespace(display=self._display),
        }

    def _display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> SimpleNamespace:
        assert raw
        assert display_id
        shown = [content]
        self.outputs.append(shown)
        return SimpleNamespace(update=lambda content, raw: shown.append(content))


KERNEL_SHELL = SimpleNamespace(kernel=object())


def test_progress_in_a_notebook_is_one_output_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = Cell(KERNEL_SHELL)
    for name, module in cell.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with progress("score", 5, done=2) as advance:
        advance("480 tokens/s")
        advance("<b>500</b> tokens/s")
    (shown,) = cell.outputs
    assert shown[0]["text/plain"] == "score: 2 of 5 shards"
    assert shown[1]["text/plain"] == "score: 3 of 5 shards, 480 tokens/s"
    assert shown[-1]["text/plain"] == "score: 4 of 5 shards, <b>500</b> tokens/s"
    assert '<progress value="4" max="5">' in shown[-1]["text/html"]
    assert "&lt;b&gt;500&lt;/b&gt; tokens/s" in shown[-1]["text/html"]


def test_progress_in_a_notebook_is_not_sent_for_every_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = Cell(KERNEL_SHELL)
    for name, module in cell.modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def interrupted() -> None:
        with progress("score", 10**5) as advance:
            for _ in range(10**4):
                advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (shown,) = cell.outputs
    assert len(shown) < 100
    assert shown[-1]["text/plain"] == "score: 10000 of 100000 shards"


def test_progress_in_a_terminals_ipython_is_not_that_of_a_notebook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for shell in (None, SimpleNamespace()):
        cell = Cell(shell)
        for name, module in cell.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        with caplog.at_level(logging.INFO), progress("score", 1) as advance:
            advance()
        assert cell.outputs == []
    assert caplog.messages == ["score: 1 of 1 shards"] * 2


def test_throughput_is_units_over_time_since_it_was_made() -> None:
    now_s = 10.0
    throughput = Throughput(lambda: now_s)
    now_s = 12.0
    assert throughput.add(100) == 50
    now_s = 15.0
    assert throughput.add(100) == 40
