"""Run without our package: what AutoRound's AutoScheme chooses, and the weights that it rounds.

    python auto_scheme.py TASK

TASK is a JSON file: ``model``, ``texts`` (a file with a list of texts), ``bits`` (average),
``schemes``, ``iters``, ``seq_len``, ``num_samples`` and ``out``. The quantized weights go to
``out``, float32. Prints a line of JSON: versions, seconds, and the stored bytes of each quantized
layer, its integers and its scales.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from answer import as_answer
from safetensors import safe_open
from safetensors.numpy import save_file
from with_auto_round import weight_of


def main(task: dict[str, Any]) -> None:
    from auto_round import AutoRound, AutoScheme

    data = {
        "dataset": task["texts"],
        "nsamples": task["num_samples"],
        "seqlen": task["seq_len"],
        "batch_size": task["num_samples"],
    }
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rounding = AutoRound(
            task["model"],
            scheme=AutoScheme(avg_bits=task["bits"], options=task["schemes"], **data),
            iters=task["iters"],
            enable_torch_compile=False,
            device_map="cpu",
            **data,
        )
        rounding.quantize_and_save(folder, format="auto_round")
        seconds = time.perf_counter() - start
        layer_bytes, weights = {}, {}
        for file in Path(folder).rglob("*.safetensors"):
            with safe_open(file, "np") as opened:
                names = [n for n in opened.keys() if n.endswith((".qweight", ".qzeros", ".scales"))]  # noqa: SIM118
                tensors = {name: opened.get_tensor(name) for name in names}
            for name in sorted({name.rpartition(".")[0] for name in names}):
                packed, scales_GO = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
                zeros_words = tensors[f"{name}.qzeros"].shape[1]
                bits = zeros_words * 32 // scales_GO.shape[1]
                weights[name] = np.ascontiguousarray(weight_of(tensors, name, bits))
                layer_bytes[name] = packed.nbytes + scales_GO.nbytes
    save_file(weights, task["out"])
    versions = {name: version(name) for name in ("auto-round", "torch", "transformers")}
    as_answer(versions=versions, seconds=round(seconds, 1), layer_bytes=layer_bytes)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
