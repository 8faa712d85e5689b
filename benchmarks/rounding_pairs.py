"""Does a method lose less than plain rounding in every layer, and are its scores honest?

Random pairs of a group and a method, each alone in the model (SmolLM2-135M off its grid,
``rounding.py``): its KL, measured on text that the scan has not seen, beside that of plain rounding
and beside its score. For formats by GPTQ the shards are also scored under the rounding that was
fitted to all of them, their own tokens included: how much too small such scores are.

    python benchmarks/rounding_pairs.py --pairs 60 --samples 4 --held-out 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
from kl_prediction import make_spec
from machine import describe_machine
from rounding import move_model, scan

from autoquant_ray.allocate.candidate import Candidate, make_candidate
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.calibrate.files import calibration_of
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.evaluate.measurement import measuring
from autoquant_ray.evaluate.table import mean_kl
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.smoothed import needs_hessians
from autoquant_ray.models.find import find_model
from autoquant_ray.plan.make import make_plan
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.stages.fit import halves_of
from autoquant_ray.stages.shards import tasks_of

_INT4 = "wint4_g64_afp16"
PLAIN = f"{_INT4}:max"
METHODS = ("weighted", "awq", "gptq", "awq+gptq")


def main() -> None:
    """Scan, draw, measure; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4, help="For the scan.")
    parser.add_argument("--held-out", type=int, default=2, help="Samples to measure on.")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.bits, options.disable = [8.0], []
    with tempfile.TemporaryDirectory() as folder:
        options.model = f"{folder}/model"
        move_model(str(find_demo_model()), options.model)
        menu = (PLAIN, *(f"{_INT4}:{method}" for method in METHODS))
        run = scan(menu, f"{folder}/run", options)
        state = RunState.open(RunDirectory(run.path))
        rows = measure_pairs(state, options)
        shares = in_sample_shares(state)
    summary = summarize(rows)
    for name, share in shares.items():
        summary[name]["score fitted to all tokens / cross-fitted"] = share
    for name, row in summary.items():
        print(name, json.dumps(row), flush=True)
    options.model = None
    print(json.dumps({**describe_machine(), "options": vars(options), "methods": summary}))


def measure_pairs(state: RunState, options: argparse.Namespace) -> list[dict[str, Any]]:
    """KL of every drawn pair alone, and of plain rounding in the same group."""
    scored = ScoredRun.read(state)
    scores, problem = scored.scores, scored.problem
    groups = [group.name for group in problem.searched]
    pairs = [(g, f) for g, f in scores if f != PLAIN and f != NONE and (g, PLAIN) in scores]
    order = np.random.default_rng(options.seed).permutation(len(pairs))[: options.pairs]
    chosen = [pairs[number] for number in sorted(order)]

    def alone(group: str, format_: str) -> Candidate:
        formats = {name: format_ if name == group else NONE for name in groups}
        return make_candidate(problem, scores, f"{group} {format_}", formats)

    candidates = [alone(*pair) for g, f in chosen for pair in ((g, f), (g, PLAIN))]
    config = EvaluationConfig(run=state.directory.uri, samples=options.held_out)
    with measuring(state, config) as measurement:
        results = [mean_kl(result) for result in measurement.measure(candidates)]
    rows = []
    for number, (group, format_) in enumerate(chosen):
        kl, plain_kl = results[2 * number : 2 * number + 2]
        row = {
            "group": group,
            "format": format_,
            "kl": kl,
            "plain_kl": plain_kl,
            "score": scores[group, format_],
            "plain_score": scores[group, PLAIN],
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per method: how many pairs are worse than plain, and medians of ratios."""
    summary = {}
    for name in ("all", *dict.fromkeys(row["format"] for row in rows)):
        some = [row for row in rows if name in ("all", row["format"])]
        kl, plain, score = (np.array([r[k] for r in some]) for k in ("kl", "plain_kl", "score"))
        summary[name] = {
            "pairs": len(some),
            "worse than plain": int((kl > plain).sum()),
            "median of kl / plain kl": round(float(np.median(kl / plain)), 3),
            "median of score / kl": round(float(np.median(score / kl)), 3),
            "sum of scores / sum of kl": round(float(score.sum() / kl.sum()), 3),
        }
    return summary


def in_sample_shares(state: RunState) -> dict[str, float]:
    """Format by GPTQ -> summed scores under the rounding fitted to all tokens, over honest ones."""
    config = ScanConfig.model_validate(state.record.config)
    ref = find_model(config.model)
    plan = make_plan(config, ref, device="cpu")
    scorer = Scorer(make_spec(ref, plan, config.labels))
    calibration = replace(calibration_of(state), halves=halves_of(state))
    (task, *_) = tasks_of(state, ())
    whole, apart = (
        scorer.score(task.samples, task.first_sample, calibration, shard).sums.elementwise_GF
        for shard in (None, task.shard)
    )
    return {
        format_.name: round(float(whole[:, index].sum() / apart[:, index].sum()), 3)
        for index, format_ in enumerate(plan.formats)
        if needs_hessians(format_)
    }


if __name__ == "__main__":
    main()
