"""The example of ``docs/python-api.md``, run as it stands there on a small model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "python-api.md"


def example(**values: str) -> str:
    """The document's example with other values in its ``NAME = ...`` lines."""
    (code,) = re.findall(r"<!-- example: .*? -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    for name, value in values.items():
        code, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.M)
        assert count == 1, name
    return str(code)


def test_example_of_the_document_runs(model_folder: Any, tmp_path: Path) -> None:
    data = tmp_path / "words.txt"
    data.write_text(" ".join(f"w{(7 * i + i // 200) % 256}" for i in range(128 * 12)))
    done = subprocess.run(
        [sys.executable, "-c", example(MODEL=str(model_folder("llama")), DATA=str(data))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    assert "nats per token predicted" in done.stdout
    assert re.search(
        r"^model\.layers\.1\.mlp\.down_proj got (wint4_afp16|wfp8_afp8|none)$", done.stdout, re.M
    )
    assert "bits-5.00" in done.stdout
    assert re.search(r"^\d+ +solution ", done.stdout, re.M)
    names = {path.name for path in (tmp_path / "runs" / "python").iterdir()}
    assert {"manifest.json", "frontier.parquet", "evaluation.parquet", "solutions"} <= names
    assert len(list((tmp_path / "runs" / "python" / "solutions").iterdir())) == 3
