"""Does an exported folder compute what was measured? SmolLM2-135M with FP8, INT4 and 16 bits mixed.

One scan and two plans: with FP8 weights, and with FP8 weights and inputs. Another Python process,
which imports transformers and compressed-tensors and nothing of this package, loads each exported
folder on the CPU; its likeliest tokens stand beside those of the model that ``evaluate`` measures.
No reader of ModelOpt's layout runs on a CPU; its bytes are counted, and tests unpack it.

Inputs that are rounded to FP8 under one scale make a network chaotic: a last bit that differs
moves a value to the next step, 6% away. So the planned model also stands beside itself with
its 16-bit weights moved by a millionth (``itself``); no other program can agree better than that.

The model comes as a GGUF file; what a plan does not quantize is rounded to 16 bits by the export,
which is part of the difference. ``--run`` takes a finished scan instead of making one.

    python benchmarks/export_roundtrip.py --positions 2000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from engines.planned import planned_model, window_logits
from machine import describe_machine

import autoquant_ray
from autoquant_ray.config.demo import demo_config
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.data.texts import read_pydoc
from autoquant_ray.export.source import Source, read_source
from autoquant_ray.runs.directory import RunDirectory

Logits = np.ndarray[Any, Any]

WINDOW = 250
INT4 = {"weight": {"num_bits": 4, "block_sizes": {"-1": 64, "type": "static"}}, "input": None}
"""Blocks of 64: the model's rows of 576 weights are no multiple of 128."""
READER = """
import sys
import numpy, torch, transformers
folder, ids, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = [model(torch.from_numpy(row)[None]).logits[0] for row in numpy.load(ids)]
numpy.save(out, torch.stack(logits).numpy())
assert not any(name.startswith(("autoquant_ray", "modelopt")) for name in sys.modules)
"""


FP8_FORMATS = {"weights": "wfp8_afp16", "weights and inputs": "wfp8_afp8"}
LAYOUTS = {
    "weights": ("compressed-tensors",),
    "weights and inputs": ("modelopt", "compressed-tensors"),
}


def main() -> None:
    """Export, read back, print the comparison as the last line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--bits", type=float, default=7.0)
    parser.add_argument("--run", help="A finished scan that this script made.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = autoquant_ray.Run.open(options.run) if options.run else scan(folder / "run")
        rows = {}
        for label, fp8 in FP8_FORMATS.items():
            name = run.solve(bits=options.bits, allow={"*": ["int4_g64", fp8, "none"]}).name
            rows[label] = compare(run, name, LAYOUTS[label], folder / fp8, options.positions)
    print(json.dumps({**describe_machine(), "positions": options.positions, "plans": rows}))


def scan(folder: Path) -> autoquant_ray.Run:
    """A small scan: enough for a plan with all three kinds, not for a good one."""
    changed = {
        "formats": ("int4_g64", *FP8_FORMATS.values()),
        "custom_formats": {"int4_g64": INT4},
        "samples": 4,
        "disable": ("lm_head",),
        "engine": None,
        "gpu": None,
    }
    config = demo_config(str(folder), 7.0)
    return autoquant_ray.search(ScanConfig.model_validate(config.model_dump() | changed))


def compare(
    run: autoquant_ray.Run, name: str, layouts: tuple[str, ...], folder: Path, positions: int
) -> dict[str, Any]:
    """Export a solution, and compare what the folder computes with the plan."""
    sizes: dict[str, Any] = {}
    for layout in layouts:
        start = time.perf_counter()
        written = run.export(str(folder / layout), name, format=layout)
        sizes[layout] = {
            "bytes_on_disk": written.bytes_on_disk,
            "of_the_manifest": round(written.bytes_on_disk / written.weight_bytes, 5),
            "layers": written.layers,
            "seconds": round(time.perf_counter() - start, 1),
        }
    source = read_source(RunDirectory(run.path), name)
    formats = Counter(format_.name for format_ in source.formats.values())
    formats["none"] = len(source.groups) - len(source.formats)
    ids = token_ids(folder / "compressed-tensors", -(-positions // WINDOW))
    actual = read_elsewhere(folder, ids)
    expected = quantized_logits(source, ids)
    return {
        "modules": dict(formats),
        "exports": sizes,
        "same_top_1": agreement(expected, actual, positions),
        "same_top_1_itself": agreement(expected, quantized_logits(source, ids, 1e-6), positions),
        "mean_logit_difference": round(float(np.abs(expected - actual).mean()), 4),
        "logit_deviation": round(float(expected.std()), 4),
    }


def agreement(expected: Logits, actual: Logits, positions: int) -> float:
    """Share of positions with the same likeliest token."""
    same = (expected.argmax(-1) == actual.argmax(-1)).reshape(-1)[:positions]
    return round(float(same.mean()), 4)


def token_ids(folder: Path, num_windows: int) -> np.ndarray[Any, Any]:
    """Windows of the end of the demo's text, which the scan does not reach; ``(W, WINDOW)``."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "\n".join(list(read_pydoc())[-40:])
    ids = tokenizer(text)["input_ids"][-num_windows * WINDOW :]
    return np.array(ids).reshape(num_windows, WINDOW)


def read_elsewhere(folder: Path, ids: np.ndarray[Any, Any]) -> Logits:
    """Logits of the exported folder, computed by a process without this package."""
    np.save(folder / "ids.npy", ids)
    arguments = [folder / "compressed-tensors", folder / "ids.npy", folder / "logits.npy"]
    subprocess.run([sys.executable, "-c", READER, *map(str, arguments)], check=True)
    logits: Logits = np.load(folder / "logits.npy")
    return logits


def quantized_logits(source: Source, ids: Logits, moved: float = 0.0) -> Logits:
    """Logits of the model quantized as ``evaluate`` does it, see ``engines/planned.py``."""
    with planned_model(source, moved) as model:
        return window_logits(model, ids)


if __name__ == "__main__":
    main()
