"""What a scan says before it scores anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_scan_says_what_no_checkpoint_holds_before_it_starts_workers(
    run_command: Any, scan_arguments: Any, tmp_path: Path
) -> None:
    formats = ("--formats", "wint4_aint4,wfp8_afp8")
    small = ("--samples", "2", "--shard-samples", "2", "--bits", "8")
    done = run_command(*scan_arguments(tmp_path / "run", *formats, *small))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    (limit,) = (number for number, line in enumerate(lines) if "export: " in line)
    assert "export: wint4_aint4 has no packed form (model.layers.0" in lines[limit]
    (workers,) = (number for number, line in enumerate(lines) if "worker(s) on" in line)
    assert limit < workers
