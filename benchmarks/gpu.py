"""Everything that needs a GPU, on one card, in order of worth, within a number of minutes.

Each step runs in a process of its own, and after each the results so far are written to
``gpu.json``, so that a crash, or the end of a loan, costs the step alone:

- ``tests``: ``tests/gpu``
- ``parity``, ``fp4``: scores against ``mtq.auto_quantize`` on the device, float32, fp4 formats
  through ModelOpt's kernels
- ``determinism``: two scans in two processes, byte by byte
- speed against ``mtq.auto_quantize`` on random models in bfloat16, 4 and 12 formats: seconds,
  tokens per second, the share of the device's measured rate of matrix products, peak memory
- ``integers``: products of integers (``--difference-dtype int8``) in a float32 model: seconds of
  scoring, the largest relative error of a score, and the rate of products, beside other types
- ``gptq``: a layer fitted on the device and on the CPU: seconds, and the share of equal integers

    python benchmarks/gpu.py --minutes 8 --out results
    python benchmarks/gpu.py --dry                     # tiny models on the CPU, to try the script
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kl_prediction import make_spec
from machine import describe_machine
from sides import CASES, now
from vs_modelopt import save_random_model

from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.score.scorer import Scorer

HERE = Path(__file__).parent
GPTQ = ("wint4_g64_afp16:gptq",)
INTEGERS = ("wint8_aint8", "INT8_SMOOTHQUANT_CFG")
DIFFERENCE_DTYPES = ("float32", "bfloat16", "int8+float32", "int8+bfloat16")
_LEAST_SECONDS = 15  # no step starts with less


def main() -> None:
    """Run the steps; the last line is the path of the results."""
    options = parse()
    if options.step:
        print(json.dumps((STEPS | {"sums": sums})[options.step](options)))
        return
    end = time.monotonic() + 60 * options.minutes
    os.makedirs(options.out, exist_ok=True)
    target = Path(options.out, "gpu.json")
    results: dict[str, Any] = {**describe_machine(), "device": device_name(options), "steps": {}}
    for name in options.steps or STEPS:
        start = time.monotonic()
        if end - start < _LEAST_SECONDS:
            results["steps"][name] = {"not_run": "no time was left"}
        else:
            results["steps"][name] = run_step(name, options, end - start)
        results["steps"][name]["wall_seconds"] = round(time.monotonic() - start, 1)
        write(target, results)
        print(name, json.dumps(results["steps"][name]), flush=True)
    print(target)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", default="gpu-results", help="Folder of gpu.json.")
    parser.add_argument("--dry", action="store_true", help="Tiny models on the CPU.")
    parser.add_argument("--steps", nargs="+", choices=sorted(STEPS), help="These alone.")
    parser.add_argument("--step", choices=sorted([*STEPS, "sums"]), help="In this process.")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --dry tries the script on the CPU")
    options.device = "cpu" if options.dry else "cuda"
    return options


def device_name(options: argparse.Namespace) -> str:
    """The card, or that there is none."""
    return "CPU, --dry" if options.dry else torch.cuda.get_device_name()


def run_step(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A step in its own process; an error or its time being up is its result."""
    words = [sys.executable, __file__, "--step", name, *(["--dry"] if options.dry else [])]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"not_finished": f"after {seconds:.0f} s, all that was left"}
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one go."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def run_tests(options: argparse.Namespace) -> dict[str, Any]:
    """``tests/gpu``: how many passed, failed and were skipped."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=HERE.parent)
    counts = dict(re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout))
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, flags=re.MULTILINE)
    return {word: int(count) for count, word in counts.items()} | {"failures": failed}


def parity(options: argparse.Namespace, case: str = "unpadded") -> dict[str, Any]:
    """Scores in float32 against ModelOpt's on the same device."""
    size = "tiny" if options.dry else "small"
    return compare(size, case, "core", "float32", options)


def fp4(options: argparse.Namespace) -> dict[str, Any]:
    """NVFP4 and MXFP4; on a CUDA device by ModelOpt's own kernels on both sides."""
    return parity(options, "fp4")


def speed(size: str, case: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """The step that compares the speed on a model of a size."""

    def step(options: argparse.Namespace) -> dict[str, Any]:
        sides = "core,core:0.25" if case == "unpadded" else "core,core:0.1"
        return compare("tiny" if options.dry else size, case, sides, "bfloat16", options)

    return step


def compare(
    size: str, case: str, sides: str, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """``vs_modelopt.py`` on a random model, with what its seconds mean on this device."""
    samples, seq_len = (4, 16) if options.dry else (16, 1024)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder, size, dtype, options.device)
        words = [sys.executable, str(HERE / "vs_modelopt.py"), "--model", folder, "--case", case]
        words += ["--sides", sides, "--device", options.device, "--dtype", dtype, "--rounds", "1"]
        words += ["--samples", str(samples), "--seq-len", str(seq_len), "--batch", "2"]
        words += ["--shard-samples", str(samples), "--step-tokens", str(2 * seq_len)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        summary = json.loads(done.stdout.splitlines()[-1])
        formats = resolve_formats(CASES[case].formats, device=options.device)
        plan = build_plan(build_skeleton(find_model(folder)), formats)
        products = 2.0 * seq_len * samples * products_per_token(plan)
    rate = matmul_rate(dtype, options.device)
    for of_side in summary["sides"].values():
        (seconds,) = of_side["seconds"]
        if seconds:  # rounded to a tenth
            of_side["tokens_per_second"] = round(samples * seq_len / seconds)
            of_side["share_of_matmul_rate"] = round(products / seconds / rate, 3)
    keys = ("formats", "modelopt_seconds", "sides")
    return {"model": f"random Qwen3 {size}", "case": case, "dtype": dtype} | {
        key: summary[key] for key in keys
    }


def products_per_token(plan: Plan) -> float:
    """Multiplications that an exact scan cannot do without: see ``scoring_floor.py``.

    Per linear forward, recomputation and gradient at the input, and one product per format.
    """
    return sum(
        float(shape[0]) * shape[1] * (3 + len(plan.formats))
        for scored in scored_modules(plan)
        for shape in scored.planned.shapes
    )


def matmul_rate(dtype: str, device: str) -> float:
    """Operations per second of a large product, the best of several."""
    size = 8192 if device == "cuda" else 512
    multiply = torch._int_mm if dtype == "int8" else torch.mm
    left, right = (
        (100 * torch.rand(size, size, device=device)).to(getattr(torch, dtype)) for _ in range(2)
    )
    best = 0.0
    for _ in range(10):
        start = now(device)
        multiply(left, right.T)
        best = max(best, 2.0 * size**3 / (now(device) - start))
    return best


def make_scorer(
    folder: str, formats: tuple[str, ...], device: str, dtype: str, **fields: Any
) -> tuple[Scorer, list[list[int]]]:
    """A scorer of a model in this process, and four samples."""
    ref = find_model(folder)
    plan = build_plan(build_skeleton(ref), resolve_formats(formats, device=device))
    spec = make_spec(ref, plan, "model")
    spec = dataclasses.replace(spec, device=device, dtype=dtype, **fields)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(3, 500, (4, 256), generator=generator)
    return Scorer(spec), samples.tolist()


def determinism(options: argparse.Namespace) -> dict[str, Any]:
    """The bytes of all sums of two scans, each in a process of its own."""
    words = [sys.executable, __file__, "--step", "sums", *(["--dry"] if options.dry else [])]
    runs = [subprocess.run(words, capture_output=True, text=True, check=True) for _ in range(2)]
    digests = [json.loads(run.stdout.splitlines()[-1])["digest"] for run in runs]
    return {"digests": digests, "same_bytes": digests[0] == digests[1]}


def sums(options: argparse.Namespace) -> dict[str, Any]:
    """The digest of a scan's sums in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder, "tiny" if options.dry else "small", "bfloat16", "cpu")
        scorer, samples = make_scorer(folder, CASES["unpadded"].formats, options.device, "bfloat16")
        result = scorer.score(samples, 0, scorer.calibrate(samples))
    return {"digest": hashlib.sha256(result.sums.elementwise_GF.tobytes()).hexdigest()}


def integers(options: argparse.Namespace) -> dict[str, Any]:
    """Scores of a float32 model by the type of its products, and operations per second of these."""
    seconds, scores = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        size = "tiny" if options.dry else "0.6B"
        save_random_model(folder, size, "float32", options.device)
        for dtype in DIFFERENCE_DTYPES:
            scorer, samples = make_scorer(
                folder, INTEGERS, options.device, "float32", difference_dtype=dtype
            )
            calibration = scorer.calibrate(samples)
            for _ in range(2):  # the first warms up
                start = now(options.device)
                result = scorer.score(samples, 0, calibration)
                seconds[dtype] = round(now(options.device) - start, 3)
            scores[dtype] = result.sums.elementwise_GF
            del scorer
    is_scored = scores["float32"] > 0
    exact = scores["float32"][is_scored]
    errors = {d: float(abs(s[is_scored] / exact - 1).max()) for d, s in scores.items()}
    return {
        "model": f"random Qwen3 {size}",
        "formats": INTEGERS,
        "seconds": seconds,
        "largest_relative_error": errors,
        "matmul_rates": {
            dtype: float(f"{matmul_rate(dtype, options.device):.3g}")
            for dtype in ("float32", "bfloat16", "int8")
        },
    }


def gptq(options: argparse.Namespace) -> dict[str, Any]:
    """The first layer of a model by GPTQ on the device, and on the CPU."""
    seconds, codes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder, "tiny" if options.dry else "small", "float32", "cpu")
        for device in dict.fromkeys((options.device, "cpu")):
            scorer, samples = make_scorer(folder, GPTQ, device, "float32")
            halves = {0: 0, 1: 1}
            parts = [scorer.calibrate(samples[2 * n : 2 * n + 2], n) for n in halves]
            calibration = dataclasses.replace(merge_calibrations(parts), halves=halves)
            shards = [Half(n, samples[2 * n : 2 * n + 2]) for n in halves]
            start = now(device)
            fitted = scorer.fit([0], calibration, shards)
            seconds[device] = round(now(device) - start, 2)
            fits = fitted[0].rounding.values()
            codes[device] = [fit.codes.whole.ravel() for fit in fits if fit.codes is not None]
    equal = sum(
        int((a == b).sum()) for a, b in zip(codes[options.device], codes["cpu"], strict=True)
    )
    total = sum(len(values) for values in codes["cpu"])
    return {"seconds": seconds, "integers": total, "equal_to_the_cpu": equal / total}


class Half(NamedTuple):
    """A shard with its samples."""

    shard: int
    samples: list[list[int]]


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tests": run_tests,
    "parity": parity,
    "fp4": fp4,
    "determinism": determinism,
    "speed of 0.6B, 4 formats": speed("0.6B", "unpadded"),
    "speed of 8B, 4 formats": speed("8B, 8 of 36 layers", "unpadded"),
    "speed of 0.6B, 12 formats": speed("0.6B", "formats"),
    "integers": integers,
    "gptq": gptq,
    "speed of 8B, 12 formats": speed("8B, 8 of 36 layers", "formats"),
}


if __name__ == "__main__":
    main()
