"""Memory, time and files of an export, of a model of which it must not hold the whole.

A random Llama in bfloat16 is written layer by layer, scanned with offloaded layers, and exported
through the command line in each layout. Memory is the largest ``RssAnon`` of the process while it
runs: anonymous memory, without the pages of mapped files, which the system can drop. Linux only.
The digests of the written files tell whether two checkouts write the same: keep the model and its
run in a folder, and run it in both::

    python benchmarks/export_memory.py --folder kept
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from offload_memory import add_model_options, anonymous_bytes, imports_gib, write_model

_POLL_S = 0.01
_IMPORTS = (
    "import autoquant_ray.export.checkpoint, autoquant_ray.export.compressed_tensors, "
    "autoquant_ray.export.modelopt"
)


def main() -> None:
    """Write the model, scan it, export it in each layout, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--formats", default="wint4_afp16:max,wint8_afp16")
    parser.add_argument("--bits", default="6")
    parser.add_argument("--layouts", default="modelopt,compressed-tensors")
    parser.add_argument("--folder", help="Keeps model and run; what is there is used.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoquant-benchmark-") as name:
        folder = Path(options.folder or name)
        model, run = folder / "model", folder / "run"
        if not run.exists():
            write_model(model, options)
            scan(model, run, options)
        summary = {
            **describe_machine(),
            "dtype": options.dtype,
            "file_gib": round(sum(f.stat().st_size for f in model.iterdir()) / 2**30, 2),
            "imports_anon_gib": imports_gib(_IMPORTS),
            "exports": {
                layout: export(run, Path(name) / layout, layout)
                for layout in options.layouts.split(",")
            },
        }
    print(json.dumps(summary))


def scan(model: Path, run: Path, options: argparse.Namespace) -> None:
    """Scan with offloaded layers, on a few tokens: what is chosen is not the point."""
    text = model.parent / "text.txt"
    text.write_text("\n".join(" ".join(f"w{i}" for i in range(n, n + 64)) for n in (1, 99)) + "\n")
    command = [sys.executable, "-m", "autoquant_ray", "scan", str(model)]
    command += ["--data", str(text), "--out", str(run), "--bits", options.bits]
    command += ["--formats", options.formats, "--placement", "offload", "--dtype", options.dtype]
    command += ["--device", "cpu", "--workers", "1", "--seq-len", "64", "--address", "local"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def export(run: Path, out: Path, layout: str) -> dict[str, Any]:
    """Export in a process of its own, and watch its memory."""
    command = [sys.executable, "-m", "autoquant_ray", "export", str(run), "--out", str(out)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--format", layout], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(_POLL_S)
    if process.returncode != 0:
        raise SystemExit(f"{layout}: the export failed with exit code {process.returncode}")
    return {
        "peak_anon_gib": round(peak / 2**30, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "digests": {path.name: digest(path) for path in sorted(out.iterdir())},
    }


def digest(path: Path) -> str:
    """SHA-256 of a file, the first 16 digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


if __name__ == "__main__":
    main()
