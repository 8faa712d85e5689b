"""The real model of the demo: it scans from GGUF, within its memory limits."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from autoquant_ray.config.demo import find_demo_model

GIB = 2**30


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a living process, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return max(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), default=0
    )


def test_scan_demo_model_stays_within_memory(tmp_path: Path) -> None:
    # Started from nothing: a forked process would hold what others have imported.
    run = tmp_path / "run"
    arguments = ["scan", find_demo_model(), "--data", "pydoc", "--pack", "--samples", 2]
    arguments += ["--seq-len", 256, "--shard-samples", 2, "--workers", 1, "--address", "local"]
    arguments += ["--formats", "wint4_afp16,wfp8_afp8,wint8_aint8", "--bits", 6, "--out", run]
    worker, driver, pause = 0, 0, threading.Event()
    command = [sys.executable, "-m", "autoquant_ray", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as scan:
        while scan.poll() is None:
            driver = max(driver, peak_bytes(scan.pid))
            for child in psutil.Process(scan.pid).children(recursive=True):
                worker = max(worker, peak_bytes(child.pid))
            pause.wait(0.2)
        stderr = scan.stderr.read() if scan.stderr else ""
    assert scan.returncode == 0, stderr
    assert GIB // 2 < worker < 3 * GIB
    assert GIB // 8 < driver < GIB
    rows = pq.read_table(run / "sensitivity.parquet").to_pylist()
    assert len(rows) == 121 * 3
    assert all(row["score"] > 0 for row in rows)
    solution = json.loads((run / "manifest.json").read_text())["solution"]
    assert solution["effective_bits"] <= 6
    assert solution["optimality_gap"] == 0
