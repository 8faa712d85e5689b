"""How much is lost by what AutoRound's AutoScheme chooses and AutoRound rounds, at equal bytes?

RUN is a scan with all methods of a real model off its grid. For every budget AutoScheme chooses
among its schemes on the samples of that scan, and AutoRound rounds, saves and is read back. Its
loss is measured on text that nobody has seen, and beside it what our menus lose at the bytes that
it stores; its zero points, all the same, are not counted.

    python benchmarks/estimators.py --model gemma.gguf --disable lm_head --methods \\
        --estimators sequence --samples 4 --folder FOLDER
    python benchmarks/auto_scheme.py FOLDER/sequence --bits 4.5 5 6 --iters 0 --work .engines

AutoRound is installed into an environment below ``--work``, as ``make engines`` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from auto_quantized import Selection, ids_of, measure_selection
from engines.environments import environment_of, run_in
from machine import describe_machine
from rounding import MENUS, evaluation_of, held_out_samples, row_of, solved
from safetensors.torch import load_file

from autoquant_ray.allocate.candidate import make_candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.evaluate.measurement import measuring
from autoquant_ray.evaluate.table import Measured
from autoquant_ray.formats.format import NONE
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.plan.group import UNQUANTIZED_BITS
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.shards import tasks_of

_MENUS = ("weighted", "gptq", "methods", "methods, wider")


def main() -> None:
    """Let AutoRound work, solve and measure; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5, 6])
    parser.add_argument("--schemes", default="W4A16,W8A16", help="AutoScheme's options.")
    parser.add_argument("--iters", type=int, default=0, help="AutoRound's; 200 is its default.")
    parser.add_argument("--held-out", type=int, default=4, help="Samples to measure on.")
    parser.add_argument("--work", type=Path, default=Path(".engines"))
    options = parser.parse_args()
    run = ScoredRun.read(RunState.open(RunDirectory(options.run)))
    held_out = held_out_samples(run, options)
    reference = load_model(find_model(_scan_of(run).model), dtype="float32", device="cpu")
    rows, answers = [], []
    for bits in options.bits:
        answer, weights = auto_scheme(run, bits, options)
        answers.append({"bits": bits, "seconds": answer["seconds"], **answer["versions"]})
        selection = selected(run, reference, answer["layer_bytes"], weights)
        loss = measure_selection(selection, held_out)
        rows += compare(run, bits, selection, loss, options)
    facts = describe_machine() | {"options": {**vars(options), "work": str(options.work)}}
    print(json.dumps({**facts, "autoround": answers, "rows": rows}))


def auto_scheme(
    run: ScoredRun, bits: float, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What AutoRound answers, and its weights: module -> float32 ``(O, I)``."""
    python, _ = environment_of("auto-round", options.work.absolute())
    scan = _scan_of(run)
    tokenizer = load_tokenizer(TokenizerRef.of(find_model(scan.model), ""))
    samples = [ids_of(sample) for task in tasks_of(run.state, ()) for sample in task.samples]
    with tempfile.TemporaryDirectory() as folder:
        texts, task, out = (Path(folder) / name for name in ("texts.json", "task.json", "weights"))
        texts.write_text(json.dumps([tokenizer.decode(ids) for ids in samples]))
        task.write_text(
            json.dumps(
                {
                    "model": scan.model,
                    "texts": str(texts),
                    "bits": bits,
                    "schemes": options.schemes,
                    "iters": options.iters,
                    "seq_len": min(len(ids) for ids in samples) * 15 // 16,
                    "num_samples": len(samples),
                    "out": str(out),
                }
            )
        )
        printed = run_in(python, "auto_scheme.py", [str(task)])
        return json.loads(printed.splitlines()[-1]), load_file(out)


def selected(
    run: ScoredRun,
    reference: Any,
    layer_bytes: Mapping[str, int],
    weights: Mapping[str, torch.Tensor],
) -> Selection:
    """The model with AutoRound's weights, and the bytes that it stores.

    Args:
        run: A scan of the model.
        reference: The model in float32.
        layer_bytes: Of each layer that AutoRound quantized.
        weights: Theirs, float32 ``(O, I)``.
    """
    model = copy.deepcopy(reference)
    saved = 0.0
    for name, weight_OI in weights.items():
        parameter = model.get_submodule(name).weight
        saved += parameter.numel() * UNQUANTIZED_BITS / 8 - layer_bytes[name]
        parameter.data.copy_(weight_OI)
    searched = {group.name: NONE for group in run.problem.searched}
    plain = make_candidate(run.problem, run.scores, "auto-round", searched)
    num_weights = sum(weight_OI.numel() for weight_OI in weights.values())
    bits = 8 * sum(layer_bytes.values()) / num_weights
    candidate = replace(plain, weight_bytes=plain.weight_bytes - saved, effective_bits=bits)
    return Selection(model=model, reference=reference, candidate=candidate)


def compare(
    run: ScoredRun, bits: float, selection: Selection, loss: Measured, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of AutoRound's model and of our menus at its bytes; differences are to the former."""
    candidates = [
        solved(
            run, SolveOptions(bytes=selection.num_bytes, allow={"*": [*MENUS[menu], NONE]}), menu
        )
        for menu in _MENUS
    ]
    with measuring(run.state, evaluation_of(run, options)) as measurement:
        measured = measurement.measure(candidates)
    pairs = zip((selection.candidate, *candidates), (loss, *measured), strict=True)
    return [row_of(f"{bits:g}", candidate, result, loss) for candidate, result in pairs]


def _scan_of(run: ScoredRun) -> ScanConfig:
    return ScanConfig.model_validate(run.state.record.config)


if __name__ == "__main__":
    main()
