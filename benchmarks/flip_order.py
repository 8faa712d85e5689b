"""How well are single changes of a quantized model predicted? Rank correlations on SmolLM2-135M.

The demo's model is moved off its 4-bit grid (``rounding.py``), scored and solved. Around the
solution, random changes of single groups are measured. Their rank correlation is printed with the
difference of the scores, with the slope and shares of the curvature, and with what ``refine`` makes
of them, from a backward pass on other tokens. Then pairs of groups of one MLP or attention,
those of the largest predicted interaction and random ones: the measured difference of both together
less the two alone, beside the prediction. Everything runs in this process.

    python benchmarks/flip_order.py --bits 4.5 5 --samples 16 --held-out 16 --flips 60 --pairs 12
"""

from __future__ import annotations

import argparse
import itertools
import json
import pydoc_data.topics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from machine import describe_machine
from rounding import move_model
from scipy.stats import spearmanr

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import search
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.evaluate.flip_estimates import Flip, flip_rows, merge_flips
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef, find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.runs.names import FLIPS
from autoquant_ray.runs.schemas import schema_of
from autoquant_ray.score.scorer import Scorer

AT_ONCE = 16
SHARES = (0, 0.25, 0.5, 0.75, 1)


def main() -> None:
    """Compare predictions and measurements at every budget; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5])
    parser.add_argument("--formats", nargs="+", default=["wint4_g64_afp16:max", "wint8_afp16"])
    parser.add_argument("--samples", type=int, default=16, help="For calibration and scores.")
    parser.add_argument("--predict-on", type=int, default=8, help="For the backward pass.")
    parser.add_argument("--held-out", type=int, default=16, help="Samples to measure on.")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--flips", type=int, default=60, help="Single changes to measure.")
    parser.add_argument("--pairs", type=int, default=12, help="Pairs of each kind to measure.")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = World(options)
    rows = [world.compare(bits) for bits in options.bits]
    print(json.dumps({**describe_machine(), "options": vars(options), "rows": rows}))


class World:
    """The moved model with its scores, and tokens of three kinds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        with tempfile.TemporaryDirectory() as folder:
            move_model(str(find_demo_model()), folder)
            ref = find_model(folder)
            model = load_model(ref, dtype="float32", device="cpu")
            samples = cut(Path(folder), options.seq_len)
        ends = np.cumsum([options.samples, options.predict_on, options.held_out])
        scored, self.predicting, self.held_out, _ = (
            [samples[i] for i in part] for part in np.split(np.arange(len(samples)), ends)
        )
        plan = build_plan(model, resolve_formats(tuple(options.formats), device="cpu"))
        self.names = [group.name for group in plan.searched]
        self.menu = [format_.name for format_ in plan.formats]
        self.index = {name: number for number, name in enumerate(self.menu)} | {NONE: -1}
        fields: dict[str, Any] = {
            "model": ModelRef(name="in memory", path="unused"),
            "dtype": "float32",
            "device": "cpu",
            "num_threads": options.threads,
            "modules": scored_modules(plan),
            "formats": plan.formats,
            "step_tokens": 4096,
        }
        spec = ScoringSpec(**fields, labels="model", label_draws=1, seed=0)
        scorer = Scorer(spec, model=model)
        calibration = scorer.calibrate(scored)
        result = scorer.score(scored, 0, calibration)
        scores_GF = 0.5 * result.sums.elementwise_GF / result.num_tokens
        self.scores = {
            (name, format_): float(scores_GF[g, f])
            for g, name in enumerate(self.names)
            for f, format_ in enumerate(self.menu)
        }
        self.problem = Problem.from_plan(plan.rows(), plan.summary())
        self.runner = AllocationRunner(
            EvaluationSpec(**fields, calibration=calibration), model=model
        )

    def compare(self, bits: float) -> dict[str, Any]:
        """A row: rank correlations and interactions at a budget."""
        formats = search(self.problem, self.scores, SolveOptions(bits=bits)).formats
        shard = self.runner.estimate(self.predicting, 0, self.choice(formats, ()))
        sums, num_tokens = shard.sums, shard.num_tokens
        schema = schema_of(f"{FLIPS}/shard-000000.parquet")
        part = pa.Table.from_pylist(flip_rows(shard, self.names, self.menu), schema=schema)
        changes = merge_flips([part], formats).changes
        rng = np.random.default_rng(0)
        flips = draw(list(changes), self.options.flips, rng)
        products = self.products(sums.interactions, formats, num_tokens)
        largest = sorted(products, key=lambda pair: -abs(products[pair]))[: self.options.pairs]
        pairs = [*largest, *draw(list(products), self.options.pairs, rng)]
        alone = dict.fromkeys([*flips, *itertools.chain.from_iterable(pairs)])
        losses = self.measure(formats, [(), *((flip,) for flip in alone), *pairs])
        before = losses[()]
        places = [(self.names.index(group), self.index[name]) for group, name in flips]
        slopes = [float(sums.slope_GF[place]) for place in places]
        curvatures = [float(sums.curvature_GF[place]) for place in places]
        exact = self.scores | {(name, NONE): 0.0 for name in self.names}
        orders = {
            "scores": [exact[flip] - exact[flip[0], formats[flip[0]]] for flip in flips],
            "refine": [changes[flip] for flip in flips],
        }
        for share in SHARES:
            orders[f"slope and {share} of curvature"] = [
                slope + share * curvature
                for slope, curvature in zip(slopes, curvatures, strict=True)
            ]
        measured = [losses[(flip,)] - before for flip in flips]
        interactions = [
            {
                "pair": [" ".join(flip) for flip in pair],
                "sum": losses[pair[:1]] + losses[pair[1:]] - 2 * before,
                "interaction": losses[pair] - losses[pair[:1]] - losses[pair[1:]] + before,
                "predicted": products[pair],
            }
            for pair in pairs
        ]
        row = {
            "bits": bits,
            "kl": before,
            "power": -float(sums.slope_GF[:, -1].sum()) / shard.kl,
            "rank": {name: rank(order, measured) for name, order in orders.items()},
            "rank of interactions": rank(
                [entry["predicted"] for entry in interactions],
                [entry["interaction"] for entry in interactions],
            ),
            "interactions": interactions,
        }
        print(json.dumps(row), flush=True)
        return row

    def products(
        self, interactions: Any, formats: dict[str, str], num_tokens: int
    ) -> dict[tuple[Flip, Flip], float]:
        """Predicted interactions of two flips, in nats per token, however small."""
        names = [*self.menu, NONE]
        return {
            ((self.names[a], f), (self.names[b], p)): float(sums_FF[names.index(f), names.index(p)])
            / num_tokens
            for (a, b), sums_FF in interactions.items()
            for f, p in itertools.product(names, repeat=2)
            if formats[self.names[a]] != f and formats[self.names[b]] != p
        }

    def choice(self, formats: dict[str, str], change: Sequence[Flip]) -> tuple[int, ...]:
        """A changed allocation as workers take it."""
        changed = {**formats, **dict(change)}
        return tuple(self.index[changed[name]] for name in self.names)

    def measure(
        self, formats: dict[str, str], changes: Sequence[tuple[Flip, ...]]
    ) -> dict[tuple[Flip, ...], float]:
        """KL in nats per token of changed allocations."""
        losses: dict[tuple[Flip, ...], float] = {}
        distinct = list(dict.fromkeys(changes))
        for start in range(0, len(distinct), AT_ONCE):
            some = distinct[start : start + AT_ONCE]
            choices = [self.choice(formats, change) for change in some]
            result = self.runner.evaluate(self.held_out, choices)
            for change, samples in zip(some, result.divergences, strict=True):
                kl_N = np.concatenate([sample.kl_N for sample in samples])
                losses[change] = float(kl_N.mean(dtype=np.float64))
        return losses


def cut(folder: Path, length: int) -> list[list[int]]:
    """Python's own documentation in samples of equal length, shuffled by a fixed seed."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(TokenizerRef.of(find_model(str(folder)), ""))(text)["input_ids"]
    samples = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    return [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]


def draw(items: list[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """Some of the items, in their order."""
    return [items[i] for i in sorted(rng.permutation(len(items))[:count])]


def rank(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(predicted, measured).statistic)


if __name__ == "__main__":
    main()
