"""One model in one process: turns a shard's samples into statistics or sensitivity sums.

Everything that a worker computes happens here, without Ray, so that tests and benchmarks can run
the same code in their own process. The same shard gives the same bytes in any process that uses
the same number of threads on the same kind of device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoquant_ray.backward import LayerwiseBackward
from autoquant_ray.calibration import ActivationMaxima, Statistics
from autoquant_ray.data import plan_steps
from autoquant_ray.errors import ModelError, NonFiniteError, one_line
from autoquant_ray.experts import prepare_experts
from autoquant_ray.formats import Format
from autoquant_ray.loss import VocabularyLoss
from autoquant_ray.models import ModelRef, load_model
from autoquant_ray.quantizable import has_plain_forward
from autoquant_ray.sensitivity import Maxima, ScoredModule, SensitivityScorer, SensitivitySums

Samples = Sequence[Sequence[int]]
"""Token ids of each sample, unpadded."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What an engine needs to know; small and picklable.

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

    def build_engine(self) -> Engine:
        """Load the model; called in the worker process."""
        return Engine(self)


@dataclass(frozen=True, kw_only=True)
class ShardScores:
    """Result of scoring one shard.

    Attributes:
        sums: Raw sums per group and format.
        num_tokens: Predicted tokens, the denominator of the score.
        num_samples: Samples of the shard.
        loss: Summed token loss in nats, averaged over label draws.
        seconds: Time spent.
    """

    sums: SensitivitySums
    num_tokens: int
    num_samples: int
    loss: float
    seconds: float


class Engine:
    """Calibrates and scores shards with one loaded model.

    Args:
        spec: What to compute.
        model: Use this loaded model instead of loading ``spec.model``.
    """

    def __init__(self, spec: EngineSpec, model: Any = None) -> None:
        torch.set_num_threads(spec.num_threads)
        self.spec = spec
        if model is None:
            model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
        self.model: Any = model
        prepare_experts(self.model)
        self._device = next(self.model.parameters()).device
        self._backward = LayerwiseBackward(self.model)
        self._loss = VocabularyLoss(self.model)
        self._maxima = ActivationMaxima(self.model, spec.modules)
        self._require_head()
        self._require_linears()
        self._scorer = SensitivityScorer(
            self.model, spec.modules, spec.formats, num_draws=self._num_draws
        )

    def _require_head(self) -> None:
        """Check that the model's own forward turns finished hidden states into logits.

        Raises:
            ModelError: Its forward does something that the slices of the loss do not provide.
        """
        weight = self.model.get_output_embeddings().weight
        hidden_nH = torch.zeros(2, weight.shape[1], dtype=weight.dtype, device=self._device)
        try:
            with torch.no_grad():
                self._loss.logits(hidden_nH)
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{type(self.model).__name__} cannot be scored: its head does not run on the "
                f"output of its decoder alone ({one_line(error)})"
            ) from None

    @torch.no_grad()
    def _require_linears(self) -> None:
        """Check that linears with a forward of their own compute a linear's product.

        Raises:
            ModelError: One does not; names it.
        """
        for scored in self.spec.modules:
            module = self.model.get_submodule(scored.planned.name)
            if scored.planned.kind != "linear" or has_plain_forward(module):
                continue
            row = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
            expected = torch.nn.functional.linear(row, module.weight, module.bias)
            if not torch.allclose(module(row), expected, rtol=1e-2, atol=1e-4):
                name = scored.planned.name
                raise ModelError(
                    f"{name} ({type(module).__name__}) is a linear with a forward of its own; "
                    f"--disable {name}"
                )

    @property
    def is_layerwise(self) -> bool:
        """Whether the backward pass visits one layer at a time."""
        return self._backward.is_layerwise

    @property
    def _num_draws(self) -> int:
        return self.spec.label_draws if self.spec.labels == "model" else 1

    def calibrate(self, samples: Samples) -> Statistics:
        """Input maxima of all modules over the samples.

        Raises:
            NonFiniteError: An activation is NaN or infinite.
        """
        with self._maxima.collecting():
            for positions in self._steps(samples):
                ids_BS, mask_BS = self._batch([samples[p] for p in positions])
                self._maxima.set_mask(mask_BS)
                hidden_BSH = self._backward.run_base(ids_BS, mask_BS)
                hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
                real = slice(None) if mask_BS is None else mask_BS.reshape(-1).bool()
                self._maxima.set_mask(None)
                self._loss.feed_head(hidden_TH[real])
        statistics = self._maxima.statistics()
        for (module, statistic), value in statistics.items():
            if not np.isfinite(value):
                raise NonFiniteError(f"{statistic} of {module} is {value}")
        return statistics

    def score(self, samples: Samples, first_sample: int, maxima: Maxima) -> ShardScores:
        """Sensitivity sums of the samples.

        Args:
            samples: The shard's samples.
            first_sample: Position of the first of them in the whole data set; label draws are
                seeded by the seed and this position, never by the worker or the shard layout.
            maxima: Merged calibration.

        Raises:
            NonFiniteError: The loss or a sum is NaN or infinite.
        """
        start = time.perf_counter()
        self._scorer.reset()
        loss, num_tokens = 0.0, 0
        with self._scorer.scoring(maxima):
            for positions in self._steps(samples):
                uniforms = [
                    draw_uniforms(
                        self.spec.seed, first_sample + p, self._num_draws, len(samples[p]) - 1
                    )
                    for p in positions
                ]
                step_loss, tokens = self._score_step([samples[p] for p in positions], uniforms)
                loss, num_tokens = loss + step_loss, num_tokens + tokens
        sums = self._scorer.sums()
        if not (np.isfinite(sums.elementwise_GF).all() and np.isfinite(sums.token_GF).all()):
            raise NonFiniteError("a gradient or an output difference is NaN or infinite")
        return ShardScores(
            sums=sums,
            num_tokens=num_tokens,
            num_samples=len(samples),
            loss=loss,
            seconds=time.perf_counter() - start,
        )

    def _score_step(
        self, samples: Samples, uniforms: list[np.ndarray[Any, Any]]
    ) -> tuple[float, int]:
        ids_BS, mask_BS = self._batch(samples)
        hidden_BSH = self._backward.forward(ids_BS, mask_BS)
        predicting = torch.zeros_like(ids_BS, dtype=torch.bool)
        for row, sample in enumerate(samples):
            predicting[row, : len(sample) - 1] = True
        targets_N, uniforms_KN = None, None
        if self.spec.labels == "data":
            targets_N = ids_BS.roll(-1, dims=1)[predicting]
        else:
            uniforms_KN = torch.from_numpy(np.concatenate(uniforms, axis=1)).to(self._device)
        gradients_NH, summed = self._loss.gradients(hidden_BSH[predicting], targets_N, uniforms_KN)
        loss = float(summed)
        if not np.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss}")
        gradients_BSH = []
        for gradient_NH in gradients_NH:
            gradient_BSH = torch.zeros_like(hidden_BSH)
            gradient_BSH[predicting] = gradient_NH
            gradients_BSH.append(gradient_BSH)
        self._backward.backward(gradients_BSH)
        return loss, int(predicting.sum())

    def _steps(self, samples: Samples) -> list[list[int]]:
        return plan_steps([len(sample) for sample in samples], self.spec.step_tokens)

    def _batch(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids ``(B, S)`` padded on the right, and the mask (None without padding)."""
        longest = max(len(sample) for sample in samples)
        ids_BS = torch.zeros(len(samples), longest, dtype=torch.long)
        mask_BS = torch.zeros(len(samples), longest, dtype=torch.long)
        for row, sample in enumerate(samples):
            ids_BS[row, : len(sample)] = torch.as_tensor(sample, dtype=torch.long)
            mask_BS[row, : len(sample)] = 1
        is_padded = any(len(sample) != longest for sample in samples)
        return ids_BS.to(self._device), mask_BS.to(self._device) if is_padded else None


def draw_uniforms(
    seed: int, position: int, num_draws: int, num_tokens: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``(draws, tokens)`` numbers in [0, 1) that belong to one sample alone.

    Args:
        seed: Seed of the scan.
        position: The sample's position in the data set.
        num_draws: Label draws.
        num_tokens: Predicted tokens of the sample.
    """
    return np.random.default_rng([seed, position]).random((num_draws, num_tokens))
