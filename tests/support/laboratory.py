"""A tiny model in this process with its scores, and data on which allocations can be measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.losses import average_bits
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import search
from autoquant_ray.evaluate.flip_estimates import FlipEstimates, flip_rows, merge_flips
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.evaluate.table import Measured
from autoquant_ray.formats.format import NONE
from autoquant_ray.quantize.modules import FormatNumbers
from autoquant_ray.runs.names import FLIPS
from autoquant_ray.runs.schemas import schema_of

FORMATS = ("wint4_aint4:max", "wint4_afp16:max", "wint8_aint8")
NUM_SHARDS, LENGTHS = 4, [24, 24, 24]


class Laboratory:
    """A tiny model with its groups, predicted scores and data; measures in this process.

    Args:
        prepared: Its scorer, from ``make_scorer``.
        make_samples: Makes random samples.
        menu: The scorer's formats.
    """

    def __init__(self, prepared: Any, make_samples: Any, menu: tuple[str, ...] = FORMATS) -> None:
        self.menu = menu
        spec = prepared.scorer.spec
        self.plan = prepared.plan
        self.names = [group.name for group in self.plan.searched]
        samples = make_samples(LENGTHS * 4, seed=99)
        calibration = prepared.scorer.calibrate(samples)
        sums_GF = prepared.scorer.score(samples, 0, calibration)
        scores_GF = 0.5 * sums_GF.sums.elementwise_GF / sums_GF.num_tokens
        self.scores = {
            (name, format_): float(scores_GF[g, f])
            for g, name in enumerate(self.names)
            for f, format_ in enumerate(menu)
        }
        self.problem = Problem.from_plan(self.plan.rows(), self.plan.summary())
        self.shards = [make_samples(LENGTHS, seed=seed) for seed in range(NUM_SHARDS)]
        fields = ("model", "dtype", "device", "num_threads", "modules", "formats")
        self.runner = AllocationRunner(
            EvaluationSpec(
                **{name: getattr(spec, name) for name in fields},
                calibration=calibration,
                step_tokens=10_000,
            ),
            model=prepared.model,
        )
        self._kept: dict[tuple[int, FormatNumbers], Any] = {}

    def bits(self, formats: dict[str, str]) -> float:
        """Average stored bits of an allocation."""
        return average_bits(self.problem.searched, formats)

    def starting_point(self, options: SolveOptions) -> StartingPoint:
        """The best allocation by the scores."""
        formats = search(self.problem, self.scores, options).formats
        return StartingPoint(
            problem=self.problem, scores=self.scores, options=options, formats=formats
        )

    def choice(self, formats: dict[str, str]) -> FormatNumbers:
        index = {NONE: -1} | {name: number for number, name in enumerate(self.menu)}
        return tuple(index[formats[name]] for name in self.names)

    def measure_choices(self, choices: Sequence[FormatNumbers], shard: int) -> list[Any]:
        new = [c for c in dict.fromkeys(choices) if (shard, c) not in self._kept]
        if new:
            result = self.runner.evaluate(self.shards[shard], new)
            for choice, samples in zip(new, result.divergences, strict=True):
                self._kept[shard, choice] = samples
        return [self._kept[shard, choice] for choice in choices]

    def estimate(self, candidate: Candidate, shards: Sequence[int]) -> FlipEstimates:
        """Predictions around an allocation, by way of the parts that workers write."""
        choice, first = self.choice(candidate.formats), len(LENGTHS)
        results = [self.runner.estimate(self.shards[s], s * first, choice) for s in shards]
        schema = schema_of(f"{FLIPS}/shard-000000.parquet")
        parts = [
            pa.Table.from_pylist(flip_rows(result, self.names, self.menu), schema=schema)
            for result in results
        ]
        return merge_flips(parts, candidate.formats)

    def measure(self, candidates: Sequence[Candidate], shards: Sequence[int]) -> list[Measured]:
        choices = [self.choice(candidate.formats) for candidate in candidates]
        columns = [self.measure_choices(choices, shard) for shard in shards]
        results = []
        for number in range(len(candidates)):
            samples = [sample for column in columns for sample in column[number]]
            results.append(
                Measured(
                    kl_N=np.concatenate([sample.kl_N for sample in samples]).astype(np.float64),
                    kl_S=np.array([sample.kl_N.astype(np.float64).sum() for sample in samples]),
                    loss=0.0,
                    reference_loss=0.0,
                    num_agreeing=0,
                    tokens_S=np.array([float(len(sample.kl_N)) for sample in samples]),
                )
            )
        return results
