"""How good is an allocation, of all that there are? Tiny random models, every one measured.

Two Llama layers make 8 groups (the head stays in 16 bits); with 3 formats there are 6,561
allocations. Each is measured by the allocation runner on data that nothing below has seen. At three
budgets the rank among all that fit is told for: the allocation that the scores give (solved), the
same after an audit of 12 of the 24 scores (audited), after a refinement (refined); and for
comparison allocations from shuffled scores (mean of 20), and a refinement with only such scores to
go by (blind).

Weights are Gaussian with standard deviation 0.2, and the input channels of every linear are
multiplied by log-normal factors whose spread differs from linear to linear (0 to --outliers): a
model with equal layers would lose nearly the same wherever a format is put, and every allocation
would be as good. With --outliers 0 all linears are alike, and only their place in the model
differs. "spread" is the largest over the smallest loss of a single group in the coarsest format.
Tokens are random; "losses" are KL(P || Q) in nats per token.

    python benchmarks/exhaustive.py --models 2 --trials 100
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from machine import describe_machine

from autoquant_ray.allocate.candidate import Candidate, make_candidate
from autoquant_ray.allocate.certainty.solution import assess_solution
from autoquant_ray.allocate.certainty.total_error import ratio_stderr
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import search
from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.evaluate.allocation_search import search_allocations, split_shards
from autoquant_ray.evaluate.audit_pairs import choose_pairs, median_ratio, solve_again
from autoquant_ray.evaluate.rivals import shuffle_scores
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.evaluate.table import Measured, mean_kl
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.quantize.modules import UNQUANTIZED
from autoquant_ray.report.audit import AuditedPair
from autoquant_ray.score.scorer import Scorer

FORMATS = ("wint4_aint4:max", "wint4_afp16:max", "wint8_aint8")
VOCABULARY, NUM_TOKENS, NUM_SAMPLES = 256, 32, 8
NUM_CALIBRATION, NUM_CHOOSING, NUM_UNSEEN = 8, 8, 4
"""Shards of ``NUM_SAMPLES`` samples for the scores, for audit and refinement, and for the ranks."""
SHARES = (0.25, 0.5, 0.75)
"""Budgets, between the smallest and the largest allocation."""
NUM_AUDITED, NUM_SHUFFLES = 12, 20


def main() -> None:
    """Measure everything, print the table; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=2, help="Random models, by seed.")
    parser.add_argument("--outliers", type=float, default=1.0, help="Spread of input channels.")
    parser.add_argument("--trials", type=int, default=100, help="Of each refinement.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(options.models):
        world = World(seed, options.outliers)
        for share in SHARES:
            rows += world.compare(share, options.trials)
            for row in rows[-6:]:
                print(
                    "model {model} {bits:.3f} bits {plan:9s} predicted {predicted:.4f} measured "
                    "{measured:.4f} rank {rank:6.1f} of {num_fitting} ({percent:.2f}%), "
                    "{above_best:.3f} of the best".format(**row),
                    flush=True,
                )
    print(json.dumps({**describe_machine(), "options": vars(options), "rows": rows}))


class World:
    """A model with its scores and data, by seed; and every allocation measured."""

    def __init__(self, seed: int, outliers: float) -> None:
        start = time.perf_counter()
        model = random_model(seed, outliers)
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        plan = build_plan(model, resolve_formats(FORMATS, device="cpu"), ("lm_head",))
        self.names = [group.name for group in plan.searched]
        self.problem = Problem.from_plan(plan.rows(), plan.summary())
        fields: dict[str, Any] = {
            "model": ModelRef(name="in memory", path="unused"),
            "dtype": "float32",
            "device": "cpu",
            "num_threads": 1,
            "modules": scored_modules(plan),
            "formats": plan.formats,
            "step_tokens": 10_000,
        }
        calibration = self.score(
            Scorer(ScoringSpec(**fields, labels="model", label_draws=1, seed=seed), model=model)
        )
        self.runner = AllocationRunner(
            EvaluationSpec(**fields, calibration=calibration), model=model
        )
        self.shards = [self.draw() for _ in range(NUM_CHOOSING + NUM_UNSEEN)]
        self.measured: dict[tuple[int, str], list[np.ndarray[Any, Any]]] = {}
        self.candidates = [
            self.candidate("one of all", dict(zip(self.names, formats, strict=True)))
            for formats in itertools.product(FORMATS, repeat=len(self.names))
        ]
        self.unseen = range(NUM_CHOOSING, NUM_CHOOSING + NUM_UNSEEN)
        self.losses = [mean_kl(losses) for losses in self.measure(self.candidates, self.unseen)]
        alone = [self.alone(name, FORMATS[0]) for name in self.names]
        single = [mean_kl(losses) for losses in self.measure(alone, self.unseen)]
        print(
            f"model {seed}: {len(self.candidates)} allocations of {len(self.names)} groups "
            f"measured in {time.perf_counter() - start:.0f} s; losses {min(self.losses):.4f} to "
            f"{max(self.losses):.4f}, spread {max(single) / min(single):.1f}",
            flush=True,
        )

    def draw(self) -> list[list[int]]:
        """A shard of random samples."""
        ids = self.rng.integers(0, VOCABULARY, size=(NUM_SAMPLES, NUM_TOKENS))
        return [[int(token) for token in sample] for sample in ids]

    def score(self, scorer: Scorer) -> Any:
        """Scores of all pairs, with their errors and their shards; returns the calibration."""
        shards = [self.draw() for _ in range(NUM_CALIBRATION)]
        samples = [sample for shard in shards for sample in shard]
        calibration = scorer.calibrate(samples)
        results = [
            scorer.score(shard, number * NUM_SAMPLES, calibration)
            for number, shard in enumerate(shards)
        ]
        sums_SGF = np.stack([result.sums.elementwise_GF for result in results])
        scores_SGF = 0.5 * sums_SGF / results[0].num_tokens  # shards of one size
        errors_GF = scores_SGF.std(axis=0, ddof=1) / np.sqrt(len(results))
        pairs = list(itertools.product(self.names, FORMATS))
        self.scores = dict(zip(pairs, scores_SGF.mean(axis=0).flatten().tolist(), strict=True))
        self.errors: dict[tuple[str, str], float | None] = dict(
            zip(pairs, errors_GF.flatten().tolist(), strict=True)
        )
        rows = itertools.product(range(len(results)), self.names, FORMATS)
        buckets, groups, formats = zip(*rows, strict=True)
        self.buckets = pa.table(
            {"bucket": buckets, "group": groups, "format": formats, "sum": sums_SGF.flatten()}
        )
        return calibration

    def candidate(self, name: str, formats: dict[str, str]) -> Candidate:
        """Name an allocation."""
        return make_candidate(self.problem, self.scores, name, formats)

    def alone(self, group: str, format_: str) -> Candidate:
        """One group quantized, everything else in 16 bits."""
        return self.candidate("alone", dict.fromkeys(self.names, NONE) | {group: format_})

    def measure(self, candidates: Sequence[Candidate], shards: Sequence[int]) -> list[Measured]:
        """Measure allocations on shards; each (allocation, shard) once."""
        index = {NONE: UNQUANTIZED} | {name: number for number, name in enumerate(FORMATS)}
        for shard in shards:
            new = list(
                {p.key: p for p in candidates if (shard, p.key) not in self.measured}.values()
            )
            for start in range(0, len(new), 729):  # neighbours share their first groups
                some = new[start : start + 729]
                choices = [tuple(index[p.formats[name]] for name in self.names) for p in some]
                result = self.runner.evaluate(self.shards[shard], choices)
                for candidate, samples in zip(some, result.divergences, strict=True):
                    self.measured[shard, candidate.key] = [sample.kl_N for sample in samples]
        return [self.together(candidate, shards) for candidate in candidates]

    def together(self, candidate: Candidate, shards: Sequence[int]) -> Measured:
        """What is known of an allocation on some shards; only its KL."""
        samples = [kl_N for shard in shards for kl_N in self.measured[shard, candidate.key]]
        return Measured(
            kl_N=np.concatenate(samples).astype(np.float64),
            kl_S=np.array([kl_N.sum(dtype=np.float64) for kl_N in samples]),
            loss=0.0,
            reference_loss=0.0,
            num_agreeing=0,
            tokens_S=np.array([float(len(kl_N)) for kl_N in samples]),
        )

    def compare(self, share: float, num_trials: int) -> list[dict[str, Any]]:
        """Rows of one budget.

        Args:
            share: Where it is between the smallest and the largest allocation.
            num_trials: Of the refinement.
        """
        sizes = [candidate.effective_bits for candidate in self.candidates]
        bits = min(sizes) + share * (max(sizes) - min(sizes))
        options = SolveOptions(bits=bits, allow={name: FORMATS for name in self.names})
        solved = search(self.problem, self.scores, options).formats
        nothing = [shuffle_scores(self.problem, self.scores, n) for n in range(NUM_SHUFFLES)]
        shuffled = [search(self.problem, scores, options).formats for scores in nothing]
        candidates = [
            self.candidate("solved", solved),
            self.candidate("audited", self.audit(options, solved)),
            self.candidate("refined", self.refine(options, solved, self.scores, num_trials)),
            self.candidate("blind", self.refine(options, shuffled[0], nothing[0], num_trials)),
        ]
        fits = np.array(sizes) <= bits * (1 + 1e-9)
        fitting = np.sort(np.array(self.losses)[fits])
        rows = [self.row([candidate], bits, fitting) for candidate in candidates]
        rows.append(
            self.row([self.candidate("shuffled", formats) for formats in shuffled], bits, fitting)
        )
        best = self.candidates[int(np.argmin(np.where(fits, self.losses, np.inf)))]
        return [*rows, self.row([self.candidate("best", best.formats)], bits, fitting)]

    def refine(
        self,
        options: SolveOptions,
        formats: dict[str, str],
        scores: dict[tuple[str, str], float],
        num_trials: int,
    ) -> dict[str, str]:
        """The allocation after a refinement."""
        start = StartingPoint(problem=self.problem, scores=scores, options=options, formats=formats)
        result = search_allocations(self.measure, NUM_CHOOSING, start, num_trials=num_trials)
        return result.winner.formats

    def audit(self, options: SolveOptions, solved: dict[str, str]) -> dict[str, str]:
        """The formats after an audit, on the first part of the shards, as ``evaluate --audit``."""
        sure = assess_solution(self.problem, self.scores, options, solved, self.buckets)
        shares = {} if sure is None else sure.shares
        start = StartingPoint(
            problem=self.problem, scores=self.scores, options=options, formats=solved
        )
        chosen = choose_pairs(start, self.errors, shares, NUM_AUDITED)
        first, _, _ = split_shards(NUM_CHOOSING)
        results = self.measure([self.alone(*pair) for pair in chosen], first)
        pairs = [
            AuditedPair(
                group=group,
                format=format_,
                predicted=self.scores[group, format_],
                predicted_stderr=self.errors[group, format_],
                measured=mean_kl(losses),
                measured_stderr=ratio_stderr(losses.kl_S, losses.tokens_S),
                num_samples=len(losses.kl_S),
            )
            for (group, format_), losses in zip(chosen, results, strict=True)
        ]
        print(f"audit: median of measured / predicted {median_ratio(pairs):.2f}")
        return solve_again(start, pairs)

    def row(
        self, candidates: Sequence[Candidate], bits: float, fitting: np.ndarray[Any, Any]
    ) -> dict[str, Any]:
        """Mean over allocations: what they lose, and how many of those that fit lose less."""
        losses = [mean_kl(losses) for losses in self.measure(candidates, self.unseen)]
        ranks = [int((fitting < loss * (1 - 1e-9)).sum()) for loss in losses]
        return {
            "model": self.seed,
            "bits": bits,
            "plan": candidates[0].name,
            "predicted": float(np.mean([candidate.predicted_kl for candidate in candidates])),
            "measured": float(np.mean(losses)),
            "rank": float(np.mean(ranks)) + 1,
            "num_fitting": len(fitting),
            "percent": 100 * (float(np.mean(ranks)) + 1) / len(fitting),
            "above_best": float(np.mean(losses)) / float(fitting[0]),
        }


def random_model(seed: int, outliers: float) -> Any:
    """A Llama of two layers, with input channels of different scale."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            factors_I = torch.exp(outliers * torch.rand(()) * torch.randn(module.in_features))
            module.weight.mul_(factors_I / factors_I.square().mean().sqrt())
    return model


if __name__ == "__main__":
    main()
