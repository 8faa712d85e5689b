"""In which order does ``refine`` try changes: by scores, or by a backward pass? SmolLM2-135M.

The demo's model is moved off its 4-bit grid (``rounding.py``), scanned and solved. Around each
solution, random changes of single groups are measured on the first part of the held-out samples.
Their rank correlation is printed with the difference of the scores, with the slope (first order
alone), and with slope and curvature, both from the second part, as ``refine`` has them. For pairs
of groups of one MLP or attention, whose interaction is predicted to be largest and at random: the
measured difference of both together less the sum of the two alone, beside the prediction. Last,
the solution is refined in either order, by as many trials, and measured on the third part.

    python benchmarks/flip_order.py --bits 4.5 5 --samples 8 --held-out 16 --flips 60 --trials 48
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from machine import describe_machine
from rounding import move_model
from scipy.stats import spearmanr

import autoquant_ray
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.allocation_search import search_allocations, split_shards
from autoquant_ray.evaluate.measurement import Measurement, measuring
from autoquant_ray.evaluate.starting_point import StartingPoint, starting_point
from autoquant_ray.evaluate.swaps import Change, Swaps
from autoquant_ray.evaluate.table import mean_kl, paired_difference
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import FLIPS, SOLUTIONS, part_name
from autoquant_ray.runs.state import RunState


def main() -> None:
    """Scan once; compare the orders at every budget. The last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5])
    parser.add_argument("--formats", nargs="+", default=["wint4_g64_afp16", "wint8_afp16"])
    parser.add_argument("--samples", type=int, default=8, help="For the scan.")
    parser.add_argument("--held-out", type=int, default=16, help="Samples to measure on.")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--flips", type=int, default=60, help="Single changes to measure.")
    parser.add_argument("--pairs", type=int, default=12, help="Pairs of each kind to measure.")
    parser.add_argument("--trials", type=int, default=48, help="Of refine; 0 leaves it out.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        move_model(f"{folder}/model")
        run = autoquant_ray.search(
            model=f"{folder}/model",
            data="pydoc",
            pack=True,
            out=f"{folder}/run",
            formats=tuple(options.formats),
            bits=options.bits[0],
            samples=options.samples,
            seq_len=options.seq_len,
            shard_samples=1,
            cpus_per_worker=2,
            workers=1,
            address="local",
        )
        rows = [compare(run, bits, options) for bits in options.bits]
    print(json.dumps({**describe_machine(), "options": vars(options), "rows": rows}))


def compare(run: autoquant_ray.Run, bits: float, options: argparse.Namespace) -> dict[str, Any]:
    """A row: rank correlations, interactions and refinements at a budget."""
    name = SolveOptions(bits=bits).name
    run.solve(bits=bits)
    scored = ScoredRun.read(RunState.open(RunDirectory(run.path)))
    origin = starting_point(scored, f"{SOLUTIONS}/{name}/")
    config = EvaluationConfig(run=run.path, samples=options.held_out, solution=name)
    with measuring(scored.state, config) as measurement:
        world = Around(measurement, origin, np.random.default_rng(0))
        row = {"bits": bits, "kl": mean_kl(world.losses([()])[0])}
        row |= world.rank(options.flips)
        print(json.dumps(row), flush=True)
        row |= world.interactions(options.pairs)
        print(json.dumps(row), flush=True)
        row |= world.refine(options.trials)
    print(json.dumps(row), flush=True)
    return row


class Around:
    """A solution with what is predicted around it."""

    def __init__(
        self, measurement: Measurement, origin: StartingPoint, rng: np.random.Generator
    ) -> None:
        self.measurement, self.origin, self.rng = measurement, origin, rng
        self.start = origin.candidate("start", origin.formats)
        parts = split_shards(measurement.facts["num_shards"])
        self.first, self.second, _ = parts
        self.swaps = Swaps(origin.problem, origin.scores, origin.options)
        predicted = measurement.estimate(self.start, self.second)
        assert predicted is not None
        self.predicted = predicted
        folder = f"{measurement.folder}/{self.start.key}/{FLIPS}"
        parts_of = [
            measurement.state.directory.read_table(part_name(folder, shard)).to_pylist()
            for shard in self.second
        ]
        num_tokens = sum(part[0]["num_tokens"] for part in parts_of)
        rows = [row for part in parts_of for row in part]
        self.slopes: dict[tuple[str, str], float] = {}
        self.curvatures: dict[tuple[str, str], float] = {}
        for row in (row for row in rows if row["partner"] is None):
            flip = row["group"], row["format"]
            self.slopes[flip] = self.slopes.get(flip, 0.0) + row["slope"]
            self.curvatures[flip] = self.curvatures.get(flip, 0.0) + row["curvature"]
        self.products: dict[tuple[Any, Any], float] = {}
        for row in (row for row in rows if row["partner"] is not None):
            pair = (row["group"], row["format"]), (row["partner"], row["partner_format"])
            added = row["interaction"] / num_tokens
            self.products[pair] = self.products.get(pair, 0.0) + added

    def losses(self, changes: Sequence[Change]) -> list[Any]:
        """Losses of changed solutions on the first part."""
        formats = self.origin.formats
        candidates = [self.origin.candidate("it", {**formats, **dict(c)}) for c in changes]
        return self.measurement.measure(candidates, self.first)

    def differences(self, changes: Sequence[Change]) -> list[float]:
        """What changed solutions lose more, in nats per token."""
        base, *changed = self.losses([(), *changes])
        return [paired_difference(losses, base)[0] for losses in changed]

    def rank(self, num_flips: int) -> dict[str, Any]:
        """Rank correlations with measured changes of single groups."""
        moves = [move[0] for move in self.swaps.moves(self.origin.formats)]
        flips = [moves[i] for i in sorted(self.rng.permutation(len(moves))[:num_flips])]
        measured = self.differences([(flip,) for flip in flips])
        losses = dict(self.origin.scores) | {(group, NONE): 0.0 for group in self.origin.formats}
        orders = {
            "scores": [losses[f] - losses[f[0], self.origin.formats[f[0]]] for f in flips],
            "slope": [self.slopes[flip] for flip in flips],
            "slope and curvature": [self.slopes[f] + self.curvatures[f] for f in flips],
            "as refine has it": [self.predicted.changes[flip] for flip in flips],
        }
        row: dict[str, Any] = {"num_flips": len(flips)}
        for name, predicted in orders.items():
            row[name] = float(spearmanr(predicted, measured).statistic)
        return row

    def interactions(self, num_pairs: int) -> dict[str, Any]:
        """Predicted and measured interactions of pairs."""
        formats = self.origin.formats
        pairs = [pair for pair in self.products if all(formats[g] != name for g, name in pair)]
        largest = sorted(pairs, key=lambda pair: -abs(self.products[pair]))[:num_pairs]
        others = [pairs[i] for i in sorted(self.rng.permutation(len(pairs))[:num_pairs])]
        chosen = list(dict.fromkeys([*largest, *others]))
        flips = list(dict.fromkeys(itertools.chain.from_iterable(chosen)))
        alone = dict(zip(flips, self.differences([(flip,) for flip in flips]), strict=True))
        together = self.differences(chosen)
        rows = [
            {
                "pair": [" ".join(flip) for flip in pair],
                "sum": alone[pair[0]] + alone[pair[1]],
                "interaction": both - alone[pair[0]] - alone[pair[1]],
                "predicted": self.products[pair],
            }
            for pair, both in zip(chosen, together, strict=True)
        ]
        columns = [[row[name] for row in rows] for name in ("predicted", "interaction")]
        return {"interactions": rows, "interaction_rank": float(spearmanr(*columns).statistic)}

    def refine(self, num_trials: int) -> dict[str, Any]:
        """Losses on the third part before and after a refinement in each order."""
        row: dict[str, Any] = {}
        orders = {"by scores": None, "by backward pass": self.measurement.estimate}
        for name, estimate in orders.items() if num_trials else ():
            result = search_allocations(
                self.measurement.measure,
                self.measurement.facts["num_shards"],
                self.origin,
                num_trials=num_trials,
                estimate=estimate,
            )
            difference, error = paired_difference(result.after, result.before)
            on_first = self.measurement.measure([result.start, result.winner], self.first)
            row[name] = {
                "before": mean_kl(result.before),
                "difference": difference,
                "stderr": error,
                "first_part": [mean_kl(losses) for losses in on_first],
                "num_accepted": result.num_accepted,
            }
        return row


if __name__ == "__main__":
    main()
