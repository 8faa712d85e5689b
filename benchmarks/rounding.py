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
from pathlib import Path
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
from autoquant_ray.evaluate.measurement import measuring
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.table import Measured, mean_kl, paired_difference
from autoquant_ray.formats.format import NONE
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, SOLUTIONS
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run
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
    parser.add_argument("--folder", help="Keep model and runs here; what is there is not repeated.")
    options = parser.parse_args()
    source = options.model or str(find_demo_model())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        options.model = f"{folder}/model"
        if not Path(options.model).exists():
            move_model(source, options.model)
        scored, seconds = {}, {}
        for name, menu in {"max": PLAIN, "methods": MENUS["methods, wider"]}.items():
            start = time.perf_counter()
            run = scan(menu, f"{folder}/{name}", options)
            seconds[name] = round(time.perf_counter() - start, 1)
            scored[name] = ScoredRun.read(RunState.open(RunDirectory(run.path)))
            print(f"scan of {len(menu)} formats, {name}: {seconds[name]} s", flush=True)
        rows = compare(scored, options)
    facts = describe_machine()
    print(json.dumps({**facts, "options": vars(options), "seconds": seconds, "rows": rows}))


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


def scan(
    formats: tuple[str, ...], out: str, options: argparse.Namespace, **fields: Any
) -> autoquant_ray.Run:
    """Score a menu."""
    return autoquant_ray.search(
        model=options.model,
        data="pydoc",
        pack=True,
        out=out,
        formats=formats,
        disable=tuple(options.disable),
        bits=4.5,
        samples=options.samples,
        seq_len=options.seq_len,
        shard_samples=1,
        cpus_per_worker=1,
        workers=2,
        address="local",
        mode="resume" if Path(out).exists() else "new",
        **fields,
    )


def compare(scored: dict[str, ScoredRun], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all budgets; every difference is to ``max`` at the same budget and samples."""
    selections: dict[float, tuple[Candidate, Measured]] = {}
    if options.modelopt:
        held_out = held_out_samples(scored["max"], options)
        for bits in options.bits:
            selection = select(scored["max"], bits)
            selections[bits] = (selection.candidate, measure_selection(selection, held_out))
    results: dict[tuple[float, str], tuple[Candidate, Measured]] = {}
    for name, run in scored.items():
        candidates = {}
        for bits in options.bits:
            budget: dict[str, Any] = {"bits": bits}
            if bits in selections:
                budget = {"bytes": int(selections[bits][0].weight_bytes)}
            for menu, names in MENUS.items() if name == "methods" else (("max", PLAIN),):
                chosen = SolveOptions(**budget, allow={"*": [*names, NONE]})
                candidates[bits, menu] = solved(run, chosen, menu)
        with measuring(run.state, evaluation_of(run, options)) as measurement:
            measured = measurement.measure(list(candidates.values()))
        pairs = zip(candidates.values(), measured, strict=True)
        results |= dict(zip(candidates, pairs, strict=True))
    results |= {(bits, "modelopt"): pair for bits, pair in selections.items()}
    return [
        row_of(f"{bits:g}", candidate, result, results[bits, "max"][1])
        for (bits, _), (candidate, result) in sorted(results.items(), key=lambda item: item[0][0])
    ]


def evaluation_of(run: ScoredRun, options: argparse.Namespace) -> EvaluationConfig:
    """Data that no scan has seen."""
    return EvaluationConfig(run=run.state.directory.uri, samples=options.held_out)


def held_out_samples(run: ScoredRun, options: argparse.Namespace) -> list[Any]:
    """The samples that are measured on."""
    with measuring(run.state, evaluation_of(run, options)) as measurement:
        shards = range(measurement.facts["num_shards"])
        tasks = read_tasks(run.state.directory, f"{measurement.folder}/{SAMPLES}", shards)
        return [sample for task in tasks for sample in task.samples]


def solved(scored: ScoredRun, options: SolveOptions, menu: str) -> Candidate:
    """The solution of a menu."""
    solve_run(scored.state.directory, options)
    candidate = collect_candidates(scored, f"{SOLUTIONS}/{options.name}/", [])[0]
    return Candidate(**{**vars(candidate), "name": menu})


def row_of(budget: str, candidate: Candidate, result: Measured, plain: Measured) -> dict[str, Any]:
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
    ratio = f"{candidate.predicted_kl / kl:.2f}" if candidate.predicted_kl else "-"
    print(
        f"{budget:>4s} bits {candidate.name:16s} {row['effective_bits']:.3f} {row['mib']:.2f} MiB "
        f"measured {kl:.4f} ± {error or 0:.4f} "
        f"{kl / mean_kl(plain) - 1:+.1%}, predicted/measured {ratio}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
