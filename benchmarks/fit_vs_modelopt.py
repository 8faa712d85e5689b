"""How long do AWQ and GPTQ take? ModelOpt's ``awq_lite`` and ``gptq``, and our stages for both.

ModelOpt calibrates one model by each, one after the other, in one process with all cores. Ours is a
scan of ``wint4_g64_afp16:awq`` and ``:gptq`` with two workers of half the cores: the seconds of its
stages ``calibrate``, ``search`` and ``fit``, in which every weight's damping is chosen of three and
fitted without each half as well. The same samples; loading a model is not counted. In turns.

    python benchmarks/fit_vs_modelopt.py --rounds 2 --samples 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from auto_quantized import untied
from kl_prediction import read_samples
from machine import describe_machine

import autoquant_ray
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.runs.directory import RunDirectory

FORMATS = ("wint4_g64_afp16:awq", "wint4_g64_afp16:gptq")
STAGES = ("calibrate", "search", "fit")
_WEIGHTS = {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}


def main() -> None:
    """Alternate the sides; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--side", choices=("modelopt", "ours"), help="Run one side only.")
    options = parser.parse_args()
    if options.side:
        warnings.simplefilter("ignore")
        run = run_modelopt if options.side == "modelopt" else run_ours
        print(json.dumps(run(options)))
        return
    rounds = []
    for _ in range(options.rounds):
        results = {name: run_side(name, options) for name in ("modelopt", "ours")}
        print(json.dumps(results), flush=True)
        rounds.append(sum(results["modelopt"].values()) / sum(results["ours"].values()))
    ratios = {"median": round(statistics.median(rounds), 2), "all": [round(r, 2) for r in rounds]}
    print(json.dumps({**describe_machine(), "options": vars(options), "modelopt / ours": ratios}))


def run_side(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run a side in a new process; seconds of its parts."""
    arguments = [sys.executable, __file__, "--side", name]
    arguments += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_modelopt(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of ``mtq.quantize`` by each algorithm."""
    import modelopt.torch.quantization as mtq

    ref = find_model(str(find_demo_model()))
    samples = torch.tensor(read_samples(ref, options.samples, options.seq_len))
    seconds = {}
    for algorithm in ({"method": "awq_lite"}, {"method": "gptq", "layerwise": {"enable": False}}):
        model = untied(load_model(ref, dtype="float32", device="cpu"))

        def forward_loop(quantized: Any) -> None:
            for row in samples:
                quantized(input_ids=row[None], use_cache=False)

        entries: list[dict[str, Any]] = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": _WEIGHTS, "enable": True},
        ]
        start = time.perf_counter()
        with torch.no_grad():
            mtq.quantize(model, {"quant_cfg": entries, "algorithm": algorithm}, forward_loop)
        seconds[str(algorithm["method"])] = round(time.perf_counter() - start, 1)
    return seconds


def run_ours(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the stages, from the run's events."""
    cores = os.cpu_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        autoquant_ray.search(
            model=str(find_demo_model()),
            data="pydoc",
            pack=True,
            out=f"{folder}/run",
            formats=FORMATS,
            bits=8,
            samples=options.samples,
            seq_len=options.seq_len,
            shard_samples=max(1, options.samples // 4),
            cpus_per_worker=max(1, cores // 2),
            workers=2,
            address="local",
        )
        text = RunDirectory(f"{folder}/run").read_bytes("events.jsonl").decode()
    events = [json.loads(line) for line in text.splitlines()]
    ready = max(event["time"] for event in events if event["event"] == "worker_ready")
    spans = {
        event["stage"]: min(event["seconds"], event["time"] - ready)
        for event in events
        if event["event"] == "stage_done" and event["stage"] in STAGES
    }
    return {name: round(seconds, 1) for name, seconds in spans.items()}


if __name__ == "__main__":
    main()
