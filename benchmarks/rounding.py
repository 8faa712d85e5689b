"""How much is lost at the same bytes by how weights are rounded? Measured KL on SmolLM2-135M.

The demo's model lies on a 4-bit grid (GGUF Q4_1), which flatters rounding by maximum, so its
linears are first moved off that grid: every weight by a uniform draw of at most half a step. One
scan has each format with every method. At every budget it is solved with one method at a time and
with all of them; each allocation is measured on text that the scan has not seen.

    python benchmarks/rounding.py --bits 4.5 5 --samples 4 --held-out 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
from machine import describe_machine

import autoquant_ray
from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.measurement import measuring
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.table import evaluation_rows, mean_kl
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SOLUTIONS
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_scored

_GGUF_BLOCK, _STEPS = 32, 15
_INT4, _INT8, _FP8 = "wint4_g64_afp16", "wint8_afp16", "wfp8_afp16"
_WIDER = ("wint5_g64_afp16", "wint6_g64_afp16")
_WEIGHTED = tuple(f"{name}:weighted" for name in (_INT4, _INT8, _FP8))
MENUS = {
    "max": (f"{_INT4}:max", _INT8, _FP8),
    "mse": (f"{_INT4}:mse", _INT8, _FP8),
    "weighted": _WEIGHTED,
    "awq": (f"{_INT4}:awq", _INT8, _FP8),
    "gptq": (f"{_INT4}:gptq", _INT8, _FP8),
    "methods": (*_WEIGHTED, f"{_INT4}:awq", f"{_INT4}:gptq"),
    "max, wider": (*(f"{name}:max" for name in (_INT4, *_WIDER)), _INT8, _FP8),
    "weighted, wider": (*_WEIGHTED, *(f"{name}:weighted" for name in _WIDER)),
}


def main() -> None:
    """Move the model, scan once, solve and measure; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5])
    parser.add_argument("--samples", type=int, default=4, help="For the scan.")
    parser.add_argument("--held-out", type=int, default=2, help="Samples to measure on.")
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        move_model(f"{folder}/model")
        run = scan(f"{folder}/model", f"{folder}/run", options)
        rows = [row for bits in options.bits for row in measure(run, bits, options)]
    print(json.dumps({**describe_machine(), "options": vars(options), "rows": rows}))


@torch.no_grad()
def move_model(folder: str) -> None:
    """Save the demo's model with its linears off their grid."""
    ref = find_model(str(find_demo_model()))
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


def scan(model: str, out: str, options: argparse.Namespace) -> autoquant_ray.Run:
    """Score all menus together."""
    return autoquant_ray.search(
        model=model,
        data="pydoc",
        pack=True,
        out=out,
        formats=tuple(dict.fromkeys(name for menu in MENUS.values() for name in menu)),
        bits=options.bits[0],
        samples=options.samples,
        seq_len=options.seq_len,
        shard_samples=1,
        cpus_per_worker=2,
        workers=1,
        address="local",
    )


def measure(run: autoquant_ray.Run, bits: float, options: argparse.Namespace) -> list[Any]:
    """Rows of one budget: each menu alone, and all together."""
    scored = ScoredRun.read(RunState.open(RunDirectory(run.path)))
    candidates = []
    for menu, names in {**MENUS, "all": None}.items():
        chosen = SolveOptions(bits=bits, allow={} if names is None else {"*": [*names]})
        solve_scored(scored, chosen)
        candidate = collect_candidates(scored, f"{SOLUTIONS}/{chosen.name}/", [])[0]
        candidates.append(Candidate(**{**vars(candidate), "name": menu}))
    config = EvaluationConfig(run=run.path, samples=options.held_out, solution=chosen.name)
    with measuring(scored.state, config) as measurement:
        results = measurement.measure(candidates)
    rows = evaluation_rows(candidates, results, {"budget": f"{bits:g}"})
    for row, result in zip(rows, results, strict=True):
        print(
            f"{bits:4g} bits {row['name']:16s} {row['effective_bits']:.3f} predicted "
            f"{row['predicted_kl']:.4f} measured {mean_kl(result):.4f} ± "
            f"{row['kl_stderr'] or 0:.4f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
