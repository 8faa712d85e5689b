"""Scans that are refused before any work.

A refusal is exit code 2 (4 for a budget), one line on stderr with the value and a remedy, and an
untouched ``--out``. The scans here name a cluster that does not exist, so a check that came after
the connection to Ray would show as a complaint about that address.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import NO_CLUSTER, run


@pytest.fixture
def scan(model_folder: Any, text_file: Path, tmp_path: Path) -> Any:
    """Scan with a small model; keywords replace flags, None leaves one out.

    Returns the result after checking that nothing was written to ``--out``.
    """

    def run_scan(*extra: Any, model: Any = "", **flags: Any) -> Result:
        values = {
            "data": text_file,
            "out": tmp_path / "run",
            "formats": "wint4_afp16,wint8_aint8",
            "bits": 8,
            "device": "cpu",
            "address": NO_CLUSTER,
        } | flags
        options = [(f"--{key}", value) for key, value in values.items() if value is not None]
        named = [] if model is None else [model or model_folder("llama")]
        result = run("scan", *named, *(part for option in options for part in option), *extra)
        assert not (tmp_path / "run").exists()
        return result

    return run_scan


@pytest.fixture
def scan_yaml(scan: Any, tmp_path: Path) -> Any:
    """Scan with a YAML file of the given text; flags that the text replaces are left out."""

    def run_scan(text: str, **flags: Any) -> Result:
        path = tmp_path / "scan.yaml"
        path.write_text(text)
        result: Result = scan("--config", path, **flags)
        return result

    return run_scan
