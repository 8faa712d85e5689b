"""How much is lost at the same bytes by how weights are rounded? Measured KL of a real model.

A model from a GGUF file lies on that file's grid, which flatters rounding by maximum. So its
linears are first moved off it, every weight by a uniform draw of at most half a step. One scan
scores int4, int8 and FP8 by maximum, the other all methods; their seconds are printed side by side.
At every budget each menu is solved, and measured on text that no scan has seen.

With ``--modelopt``, ``mtq.auto_quantize`` selects from the best menu that it has (int4 by AWQ,
int8, FP8, weights alone), on the same tokens; ours is solved for the bytes that its selection
stores, AWQ's factors not counted.

    python benchmarks/rounding.py --bits 4.5 5 --samples 4 --held-out 2
    python benchmarks/rounding.py --bits 4.5 5 6 --samples 4 --held-out 2 --modelopt
    python benchmarks/rounding.py --model gemma.gguf --disable lm_head --samples 4 --held-out 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from auto_quantized import measure_selection, select
from machine import describe_machine

import autoquant_ray
from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.measurement import Measurement, measuring
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.table import Measured, mean_kl, paired_difference
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, SOLUTIONS
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_scored
from autoquant_ray.stages.shards import read_tasks

_GGUF_BLOCK, _STEPS = 32, 15
_INT4, _INT5, _INT6 = (f"wint{bits}_g64_afp16" for bits in (4, 5, 6))
_INT8, _FP8 = "wint8_afp16", "wfp8_afp16"
_METHODS = ("weighted", "awq", "gptq", "awq+gptq")
PLAIN = (f"{_INT4}:max", _INT8, _FP8)
WEIGHTED = tuple(f"{name}:weighted" for name in (_INT4, _INT8))
ALL_METHODS = (
    f"{_INT4}:max",
    f"{_INT4}:mse",
    *(f"{_INT4}:{method}" for method in _METHODS),
    _INT8,
    f"{_INT8}:weighted",
    f"{_INT8}:gptq",
)
WIDER = tuple(f"{n}:{method}" for n in (_INT5, _INT6) for method in ("weighted", "gptq"))
MENUS = {
    "mse": (f"{_INT4}:mse", _INT8),
    "weighted": WEIGHTED,
    "awq": (f"{_INT4}:awq", _INT8),
    "gptq": (f"{_INT4}:gptq", _INT8),
    "awq+gptq": (f"{_INT4}:awq+gptq", _INT8),
    "methods": ALL_METHODS,
    "methods, wider": (*ALL_METHODS, *WIDER),
}
"""Menus solved from the second scan. FP8 per tensor is not among them: beside it nothing can be
folded into rows."""


def main() -> None:
    """Move the model, scan twice, solve and measure; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="GGUF file or folder; default: the demo's.")
    parser.add_argument("--disable", nargs="*", default=[], help="Layers that keep 16 bits.")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5])
    parser.add_argument("--samples", type=int, default=4, help="For the scans.")
    parser.add_argument("--held-out", type=int, default=2, help="Samples to measure on.")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--modelopt", action="store_true", help="Compare with its selection.")
    options = parser.parse_args()
    options.model = options.model or str(find_demo_model())
    with tempfile.TemporaryDirectory() as folder:
        move_model(options.model, f"{folder}/model")
        options.model = f"{folder}/model"
        runs, seconds = {}, {}
        menus = {"max": PLAIN, "methods": MENUS["methods, wider"]}
        for name, menu in menus.items():
            start = time.perf_counter()
            runs[name] = scan(menu, f"{folder}/{name}", options)
            seconds[name] = round(time.perf_counter() - start, 1)
            print(f"scan of {len(menu)} formats, {name}: {seconds[name]} s", flush=True)
        rows = [row for bits in options.bits for row in measure(runs, bits, options)]
    options.model = None
    print(
        json.dumps(
            {**describe_machine(), "options": vars(options), "seconds": seconds, "rows": rows}
        )
    )


@torch.no_grad()
def move_model(source: str, folder: str) -> None:
    """Save a model with its linears off their grid."""
    ref = find_model(source)
    model: Any = load_model(ref, dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            blocks = module.weight.unflatten(1, (-1, _GGUF_BLOCK))
            step = (blocks.amax(dim=2) - blocks.amin(dim=2)).unsqueeze(2) / _STEPS
            draws = torch.rand(blocks.shape, generator=generator) - 0.5
            module.weight.copy_((blocks + step * draws).flatten(1))
    model.save_pretrained(folder)
    load_tokenizer(TokenizerRef.of(ref, "")).save_pretrained(folder)


def scan(formats: tuple[str, ...], out: str, options: argparse.Namespace) -> autoquant_ray.Run:
    """Score a menu."""
    return autoquant_ray.search(
        model=options.model,
        data="pydoc",
        pack=True,
        out=out,
        formats=formats,
        disable=tuple(options.disable),
        bits=options.bits[0],
        samples=options.samples,
        seq_len=options.seq_len,
        shard_samples=1,
        cpus_per_worker=1,
        workers=2,
        address="local",
    )


def measure(
    runs: dict[str, autoquant_ray.Run], bits: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one budget; every difference is to ``max`` on the same samples."""
    budget: dict[str, Any] = {"bits": bits}
    selection = None
    scored = {name: ScoredRun.read(RunState.open(RunDirectory(r.path))) for name, r in runs.items()}
    if options.modelopt:
        selection = select(scored["max"], bits)
        budget = {"bytes": selection.num_bytes}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        measurements: dict[str, Measurement] = {}
        plain: Measured | None = None
        for menu, names in {"max": PLAIN, **MENUS}.items():
            run = "max" if menu == "max" else "methods"
            candidate = solved(scored[run], SolveOptions(**budget, allow={"*": [*names]}), menu)
            if run not in measurements:
                config = EvaluationConfig(run=runs[run].path, samples=options.held_out)
                measurements[run] = stack.enter_context(measuring(scored[run].state, config))
            (result,) = measurements[run].measure([candidate])
            plain = plain or result
            rows.append(row_of(f"{bits:g}", candidate, result, plain))
        if selection is not None:
            measurement = measurements["max"]
            shards = range(measurement.facts["num_shards"])
            tasks = read_tasks(
                measurement.state.directory, f"{measurement.folder}/{SAMPLES}", shards
            )
            samples = [sample for task in tasks for sample in task.samples]
            result = measure_selection(selection, samples)
            rows.append(row_of(f"{bits:g}", selection.candidate, result, plain))
    return rows


def solved(scored: ScoredRun, options: SolveOptions, menu: str) -> Candidate:
    """The solution of a menu."""
    solve_scored(scored, options)
    candidate = collect_candidates(scored, f"{SOLUTIONS}/{options.name}/", [])[0]
    return Candidate(**{**vars(candidate), "name": menu})


def row_of(
    budget: str, candidate: Candidate, result: Measured, plain: Measured | None
) -> dict[str, Any]:
    """What is printed of an allocation."""
    kl, error = paired_difference(result, None)
    row = {
        "budget": budget,
        "name": candidate.name,
        "effective_bits": round(candidate.effective_bits, 4),
        "mib": round(candidate.weight_bytes / 2**20, 3),
        "predicted_kl": round(candidate.predicted_kl, 5),
        "measured_kl": round(kl, 5),
        "stderr": None if error is None else round(error, 5),
    }
    text = "" if plain is None else f" {kl / mean_kl(plain) - 1:+.1%}"
    ratio = f"{candidate.predicted_kl / kl:.2f}" if candidate.predicted_kl else "-"
    print(
        f"{budget:>4s} bits {candidate.name:16s} {row['effective_bits']:.3f} {row['mib']:.2f} MiB "
        f"measured {kl:.4f} ± {error or 0:.4f}{text}, predicted/measured {ratio}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
