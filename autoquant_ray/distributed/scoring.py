"""What the driver and the workers of a scan send each other; a driver reads and makes it without
torch and ModelOpt."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from autoquant_ray.arrays import Floats
from autoquant_ray.formats.format import Format
from autoquant_ray.models.find import ModelRef
from autoquant_ray.plan.memory import GIB, MOMENT_BYTES
from autoquant_ray.plan.scored_modules import ScoredModule


@dataclass(frozen=True, kw_only=True)
class ScoringSpec:
    """What a scorer needs to know; small and picklable.

    Attributes:
        model: Model to load.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        num_threads: Threads of CPU kernels; fixed, because it can change the last bits of sums.
        modules: Modules to score with their group index.
        formats: Formats to score.
        step_tokens: Tokens, padding included, per step.
        labels: ``model`` or ``data``.
        label_draws: Label draws per token where labels come from the model.
        seed: Seed of the draws.
        row_share: Share of the rows to score; 1 scores all; ``auto`` one that is given with each
            shard.
        estimator: ``elementwise`` or ``token``: the sums whose shares are chosen by ``auto``.
            ``sequence`` adds up these too; it needs all rows.
        difference_dtype: ``float32`` or ``bfloat16``, of the products that give the differences of
            linears, or ``int8+`` one of them, which multiplies integers where weight and input are
            such; None: ``dtype``.
        weight_cache_bytes: For quantized weights; None takes what one visit of a layer or of the
            head uses again, 2 GiB at most.
        activation_bytes: For layer inputs: half of it for the steps that are visited together,
            half to keep calibrated shards until they are scored.
        graph_bytes: For products of the forward pass, kept for the backward pass; None takes what
            the GPU has free. No number depends on it.
        work_bytes: What a worker needs beside weights and these, estimated.
        placement: ``resident``, ``offload`` or ``split``.
        min_expert_tokens: GPTQ leaves experts that saw fewer to plain rounding.
        moment_bytes: For second moments of inputs.
    """

    model: ModelRef
    dtype: str
    device: str
    num_threads: int
    modules: tuple[ScoredModule, ...]
    formats: tuple[Format, ...]
    step_tokens: int
    labels: str
    label_draws: int
    seed: int
    row_share: float | Literal["auto"] = 1.0
    estimator: str = "elementwise"
    difference_dtype: str | None = None
    weight_cache_bytes: int | None = None
    activation_bytes: int = GIB
    graph_bytes: int | None = 0
    work_bytes: int = 0
    placement: str = "resident"
    min_expert_tokens: int = 0
    moment_bytes: int = MOMENT_BYTES

    def build(self) -> Any:
        """A :class:`~autoquant_ray.score.scorer.Scorer` with the model loaded; called in the worker
        process, which loads the scoring core by name."""
        return importlib.import_module("autoquant_ray.score.scorer").Scorer(self)


@dataclass(frozen=True, kw_only=True)
class SensitivitySums:
    """Raw sums; G groups, F formats.

    Attributes:
        elementwise_GF: Float64, nats squared.
        token_GF: Float64, nats squared.
        elementwise_variance_GF: Variance of the estimate by row sampling, float64, nats to the
            fourth; zero where all rows were scored.
        token_variance_GF: The same of ``token_GF``.
        num_rows_G: Rows with a gradient seen by each group, summed over its modules.
        expert_tokens: Fused experts module -> such rows routed to each of its experts; single
            expert -> a list of its own tokens alone.
        sequence_GF: Float64, nats squared; None where the estimator is another.
    """

    elementwise_GF: Floats
    token_GF: Floats
    elementwise_variance_GF: Floats
    token_variance_GF: Floats
    num_rows_G: np.ndarray[Any, np.dtype[np.int64]]
    expert_tokens: Mapping[str, list[int]] = field(default_factory=dict)
    sequence_GF: Floats | None = None

    def of_estimators(self) -> list[Floats]:
        """The sums of all estimators that were added up."""
        sequence = [] if self.sequence_GF is None else [self.sequence_GF]
        return [self.elementwise_GF, self.token_GF, *sequence]


@dataclass(frozen=True, kw_only=True)
class DrawingTrial:
    """What drawing rows would do to the sums of a shard that is scored on all rows; N samples, S
    shares of :data:`~autoquant_ray.score.drawing.shares.SHARES`, G groups, F formats.

    Attributes:
        sample_sums_NGF: Sum of each sample alone, float64, nats squared.
        sample_tokens_N: Predicted tokens of each, float64.
        variances_SGF: Variance of the shard's sum if rows were drawn, float64, nats to the fourth.
    """

    sample_sums_NGF: Floats
    sample_tokens_N: Floats
    variances_SGF: Floats


@dataclass(frozen=True, kw_only=True)
class ShardScores:
    """Result of scoring one shard.

    Attributes:
        sums: Raw sums per group and format.
        num_tokens: Predicted tokens, the denominator of the score.
        num_samples: Samples of the shard.
        loss: Summed token loss in nats, averaged over label draws.
        seconds: Time spent.
        row_shares_GF: Share of the rows that were scored.
        trial: Where that was asked for.
    """

    sums: SensitivitySums
    num_tokens: int
    num_samples: int
    loss: float
    seconds: float
    row_shares_GF: Floats
    trial: DrawingTrial | None = None


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """What was fitted in a layer.

    Attributes:
        rounding: To its weights, as
            :data:`~autoquant_ray.quantize.calibration.FittedWeights`.
        expert_tokens: Routed expert that GPTQ may round -> tokens that it saw of each half.
    """

    rounding: Mapping[tuple[str, str, str], Any]
    expert_tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
