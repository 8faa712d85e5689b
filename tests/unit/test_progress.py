"""Progress: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from autoquant_ray.distributed.progress import Throughput, progress

SCRIPT = """
import logging
from autoquant_ray.cli_edge import set_up_logging
from autoquant_ray.distributed.progress import progress
set_up_logging(False)
with progress("score", 4) as advance:
    for shard in range(4):
        if shard == 2:
            logging.getLogger("autoquant_ray").warning("a worker died (shard 2)")
        advance("480 tokens/s, 2 worker(s)")
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
    assert "480 tokens/s, 2 worker(s)" in bar


def test_progress_elsewhere_is_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress("score", 30, done=12) as advance:
        for _ in range(18):
            advance("480 tokens/s")
    assert caplog.messages == [
        f"score: {count} of 30 shards, 480 tokens/s" for count in (15, 18, 21, 24, 27, 30)
    ]


def test_throughput_is_units_over_time_since_it_was_made() -> None:
    now_s = 10.0
    throughput = Throughput(lambda: now_s)
    now_s = 12.0
    assert throughput.add(100) == 50
    now_s = 15.0
    assert throughput.add(100) == 40
