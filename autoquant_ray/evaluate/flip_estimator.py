"""One forward and one backward pass of a quantized model: what its flips would do to the loss.

The loss is KL(P || Q), P of the unquantized and Q of the quantized model, summed over the predicted
tokens. Its gradient at the logits is ``q - p``; that of a label drawn from Q is ``q - onehot``.
Both are pulled through the quantized model, whose layers are visited one at a time like those of
the scorer, offloaded or not (:mod:`autoquant_ray.score.backward`). Weights are constants; rounded
inputs pass gradients straight through. What happens at the modules:
:mod:`autoquant_ray.score.flip_hooks`.

Shape letters: N predicted tokens, n tokens of a slice, V vocabulary, H hidden, K draws of labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from autoquant_ray.data.samples import Samples, num_predicted
from autoquant_ray.errors import not_finite
from autoquant_ray.formats.format import Format
from autoquant_ray.plan.memory import room_for_visit
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.modules import FRONT, FormatNumbers, QuantizedLayers
from autoquant_ray.quantize.weight_cache import UNBOUNDED, WeightCache
from autoquant_ray.score.backward import LayerwiseBackward, Within
from autoquant_ray.score.entrance import Gradients, Pass
from autoquant_ray.score.flip_hooks import FlipHooks, FlipSums
from autoquant_ray.score.loss import VocabularyLoss, draw_uniforms, sample_labels
from autoquant_ray.score.visits import Step, VisitPacker, make_step, predicting_rows

NUM_DRAWS = 2
"""Draws of labels, for curvatures and interactions."""


@dataclass(frozen=True, kw_only=True)
class ShardFlips:
    """Flips of a quantized model on a shard.

    Attributes:
        sums: Over the shard's tokens.
        kl: KL(P || Q) summed over them, nats.
        num_tokens: Predicted tokens.
    """

    sums: FlipSums
    kl: float
    num_tokens: int


class MenuSpec(Protocol):
    """What an evaluation's spec says about formats, and about room."""

    @property
    def modules(self) -> tuple[ScoredModule, ...]:
        """All searched modules."""
        ...

    @property
    def formats(self) -> tuple[Format, ...]:
        """The menu."""
        ...

    @property
    def calibration(self) -> Calibration:
        """From the scan."""
        ...

    @property
    def step_tokens(self) -> int:
        """Tokens, padding included, per step."""
        ...

    @property
    def activation_bytes(self) -> int:
        """Memory for hidden states."""
        ...


class FlipEstimator:
    """Estimates the flips of a model's allocations.

    Args:
        spec: How to run the model.
        model: The loaded model.
        layerwise: Runs it.
        head: Its head.
        quantized: Its modules under the formats of an allocation.
        joint_context: Longer samples share a step with those of their length only; None: any may.
    """

    def __init__(
        self,
        spec: MenuSpec,
        model: Any,
        layerwise: LayerwiseBackward,
        head: VocabularyLoss,
        quantized: QuantizedLayers,
        *,
        joint_context: int | None,
    ) -> None:
        self._spec = spec
        self._layerwise = layerwise
        self._head = head
        self._quantized = quantized
        layers = layerwise.layers
        weights = WeightCache(room_for_visit(model, layers, spec.modules, spec.formats))
        self._hooks = FlipHooks(model, spec.modules, spec.formats, weights, NUM_DRAWS)
        embedding = model.get_input_embeddings().weight
        self._device = embedding.device
        self._packer = VisitPacker(
            spec.step_tokens,
            token_bytes=embedding[0].nbytes * len(layers),
            room=spec.activation_bytes // 2 if layerwise.is_layerwise else 0,
            joint_context=joint_context,
        )

    def estimate(self, samples: Samples, first_sample: int, choice: FormatNumbers) -> ShardFlips:
        """Sums of all flips of an allocation over the samples.

        Args:
            samples: The shard's samples.
            first_sample: Position of the first of them; it seeds the draws of labels.
            choice: The allocation.

        Raises:
            NonFiniteError: A sum is NaN or infinite.
        """
        positions = range(first_sample, first_sample + len(samples))
        visits = [
            [_StepSamples.of(samples, positions, of_step, self._device) for of_step in visit]
            for visit in self._packer.visits(samples)
        ]
        self._layerwise.check_entrance(step.tensors for visit in visits for step in visit)
        with self._hooks.watching(choice, self._spec.calibration):
            kl = math.fsum(self._visit(visit, choice) for visit in visits)
        sums = self._hooks.sums()
        if not (np.isfinite(sums.slope_GF).all() and np.isfinite(sums.curvature_GF).all()):
            raise not_finite("a gradient or an output difference is NaN or infinite")
        return ShardFlips(sums=sums, kl=kl, num_tokens=sum(map(num_predicted, samples)))

    def _visit(self, visit: Sequence[_StepSamples], choice: FormatNumbers) -> float:
        """Add the sums of the steps of a visit; returns their KL in nats."""
        steps = [step.tensors for step in visit]
        references = [
            self._layerwise.finish(pass_, with_graph=False)
            for pass_ in self._layerwise.forward(steps, keep=False)
        ]
        with self._around(choice):
            passes = self._layerwise.forward(steps, keep=True, within=self._inside(choice))
            losses, gradients = [], []
            for pass_, reference_BSH, step in zip(passes, references, visit, strict=True):
                loss, pulled = self._loss_gradients(pass_, reference_BSH, step, choice)
                losses.append(loss)
                gradients.append(pulled)
            del references
            for _ in self._layerwise.pull_layers(passes, gradients, self._inside(choice)):
                self._hooks.finish_layer()
        self._hooks.finish_layer()  # of what precedes the layers, or of a whole graph
        return math.fsum(losses)

    def _loss_gradients(
        self, pass_: Pass, reference_BSH: torch.Tensor, step: _StepSamples, choice: FormatNumbers
    ) -> tuple[float, Gradients]:
        """KL, and gradients at the final hidden states: of it, then of each draw of labels."""
        is_layerwise, outside = self._layerwise.is_layerwise, len(self._layerwise.layers)
        with nullcontext() if is_layerwise else self._opened(outside, choice):
            hidden_BSH = self._layerwise.finish(pass_, with_graph=True)
        rows_N = step.rows_N.to(hidden_BSH.device)
        hidden_NH = hidden_BSH.flatten(0, 1)[rows_N]
        reference_NH = reference_BSH.flatten(0, 1)[rows_N]
        pulled_NH = [torch.empty_like(hidden_NH) for _ in range(1 + NUM_DRAWS)]
        head_weights = WeightCache(UNBOUNDED)
        losses = []
        for start in range(0, len(hidden_NH), self._head.slice_tokens):
            rows = slice(start, start + self._head.slice_tokens)
            with torch.no_grad():
                log_p_nV = torch.log_softmax(self._head.logits(reference_NH[rows]).float(), dim=-1)
            hidden_nH = hidden_NH[rows].detach().requires_grad_(True)
            with torch.enable_grad(), self._quantized.quantized(outside, choice, head_weights):
                logits_nV = self._head.logits(hidden_nH).float()
            losses.append(_divergence(log_p_nV, logits_nV.detach()))
            p_nV = log_p_nV.exp_().to(logits_nV.device)
            pulled = _pull_through_head(logits_nV, hidden_nH, p_nV, step.uniforms_KN[:, rows])
            for gradient_NH, pulled_nH in zip(pulled_NH, pulled, strict=True):
                gradient_NH[rows] = pulled_nH
        gradients = []
        for gradient_NH in pulled_NH:
            gradient_BSH = torch.zeros_like(hidden_BSH)
            gradient_BSH.flatten(0, 1)[rows_N] = gradient_NH
            gradients.append(gradient_BSH)
        return math.fsum(losses), gradients

    def _inside(self, choice: FormatNumbers) -> Within:
        """Opens a layer under the formats of an allocation."""
        return lambda number: self._opened(number, choice)

    def _opened(self, number: int, choice: FormatNumbers) -> AbstractContextManager[None]:
        return self._quantized.quantized(number, choice, WeightCache(UNBOUNDED))

    @contextmanager
    def _around(self, choice: FormatNumbers) -> Iterator[None]:
        """Open what no visit of a layer opens: the front, and all layers of a whole graph."""
        numbers = [FRONT]
        if not self._layerwise.is_layerwise:
            numbers += range(len(self._layerwise.layers))
        with ExitStack() as stack:
            for number in numbers:
                stack.enter_context(self._opened(number, choice))
            yield


@dataclass(frozen=True, kw_only=True)
class _StepSamples:
    """The samples of a step.

    Attributes:
        tensors: What the model runs on.
        rows_N: Rows that predict a token of the loss.
        uniforms_KN: Numbers in [0, 1) that draw labels.
    """

    tensors: Step
    rows_N: torch.Tensor
    uniforms_KN: torch.Tensor

    @classmethod
    def of(
        cls, samples: Samples, positions: range, of_step: Sequence[int], device: torch.device
    ) -> _StepSamples:
        """Some samples of a shard; their positions in the whole data seed their labels."""
        chosen = [samples[index] for index in of_step]
        uniforms = [
            draw_uniforms(0, positions[index], NUM_DRAWS, num_predicted(samples[index]))
            for index in of_step
        ]
        return cls(
            tensors=make_step(chosen, device),
            rows_N=predicting_rows(chosen),
            uniforms_KN=torch.from_numpy(np.concatenate(uniforms, axis=1)),
        )


def _divergence(log_p_nV: torch.Tensor, logits_nV: torch.Tensor) -> float:
    """KL(P || Q) summed over the tokens of a slice."""
    log_q_nV = torch.log_softmax(logits_nV, dim=-1).to(log_p_nV.device)
    terms_nV = log_p_nV.exp() * (log_p_nV - log_q_nV)
    # float64: the terms of this sum over a large vocabulary nearly cancel.
    return float(terms_nV.sum(dtype=torch.float64))


def _pull_through_head(
    logits_nV: torch.Tensor,
    hidden_nH: torch.Tensor,
    p_nV: torch.Tensor,
    uniforms_Kn: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Gradients ``(n, H)``: of KL(P || Q), then of labels drawn from Q."""
    q_nV = torch.softmax(logits_nV.detach(), dim=-1)
    labels_Kn = sample_labels(q_nV, uniforms_Kn.to(q_nV.device))
    (pulled_nH,) = torch.autograd.grad(logits_nV, hidden_nH, q_nV - p_nV, retain_graph=True)
    yield pulled_nH
    for draw, labels_n in enumerate(labels_Kn):
        # A gradient of its own for each draw: hooks on the head hold those of all.
        gradient_nV = q_nV.clone()
        gradient_nV[torch.arange(len(labels_n), device=q_nV.device), labels_n] -= 1
        is_last = draw == len(labels_Kn) - 1
        (pulled_nH,) = torch.autograd.grad(
            logits_nV, hidden_nH, gradient_nV, retain_graph=not is_last
        )
        yield pulled_nH
