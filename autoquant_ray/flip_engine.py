"""Runs a model under a plan, forward and backward, and scores the plan's neighbours.

The backward pass visits the layers one at a time (:mod:`autoquant_ray.backward`); while a layer is
visited, its modules run under the plan's formats. What is summed: :mod:`flip_gradients`.

Shape letters: B samples, S positions, H hidden, N predicted tokens, n of a slice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from autoquant_ray.backward import LayerwiseBackward, Pass
from autoquant_ray.flip_gradients import FlipScorer, FlipSums
from autoquant_ray.layers import replaced_forward
from autoquant_ray.loss import VocabularyLoss, draw_uniforms, sample_labels
from autoquant_ray.quantized_layers import Choice, QuantizedLayers
from autoquant_ray.visits import Samples, VisitPlanner, make_step, predicting_rows
from autoquant_ray.weight_cache import WeightCache

_UNBOUNDED = 2**62


class FlipEngine:
    """Scores the neighbours of plans on shards.

    Args:
        runner: Runs the model's layers.
        head: Its vocabulary head.
        quantized: Lets its modules run under formats.
        scorer: Sums what flips would do.
        planner: Which steps visit the layers together.
        device: Where the steps go.
    """

    def __init__(
        self,
        runner: LayerwiseBackward,
        head: VocabularyLoss,
        quantized: QuantizedLayers,
        scorer: FlipScorer,
        planner: VisitPlanner,
        device: torch.device,
    ) -> None:
        self._runner = runner
        self._head = head
        self._quantized = quantized
        self._scorer = scorer
        self._planner = planner
        self._device = device
        self._visited = -1
        self._weights = WeightCache(_UNBOUNDED)
        self._outside_weights = WeightCache(_UNBOUNDED)

    def score(self, samples: Samples, first_sample: int, choice: Choice) -> FlipSums:
        """Sums of the samples around a plan.

        Args:
            samples: The shard's samples.
            first_sample: Position of the first of them in the data; label draws are seeded by it.
            choice: The plan. Where it breaks the model, the sums are not finite.
        """
        self._outside_weights = WeightCache(_UNBOUNDED)
        kl, num_tokens = 0.0, 0
        with self._scorer.scoring(choice):
            for visit in self._planner.visits(samples):
                chosen = [[samples[p] for p in positions] for positions in visit]
                steps = [make_step(of_step, self._device) for of_step in chosen]
                reference = [
                    self._runner.finish(one, with_graph=False)
                    for one in self._runner.forward(steps, keep=False)
                ]
                with self._under(choice):
                    passes = self._runner.forward(steps, keep=True)
                    for one in passes:
                        self._runner.finish(one, with_graph=True)
                gradients = []
                for one, own_BSH, of_step, positions in zip(
                    passes, reference, chosen, visit, strict=True
                ):
                    seeds = [first_sample + position for position in positions]
                    step_kl, pulled = self._gradients(one, own_BSH, of_step, seeds, choice)
                    kl += step_kl
                    gradients.append(pulled)
                    num_tokens += sum(len(sample) - 1 for sample in of_step)
                with self._under(choice):
                    self._runner.backward(passes, gradients)
        slope_GF, squares_GF = self._scorer.sums()
        return FlipSums(slope_GF=slope_GF, squares_GF=squares_GF, kl=kl, num_tokens=num_tokens)

    def _gradients(
        self, one: Pass, own_BSH: torch.Tensor, samples: Samples, seeds: list[int], choice: Choice
    ) -> tuple[float, list[torch.Tensor]]:
        """Summed KL of a step, and at its final hidden states ``(B, S, H)`` the gradient of that
        and of the loss of labels drawn from the quantized model."""
        assert one.output is not None
        hidden_TH = one.output.detach().flatten(0, 1)
        rows_N = predicting_rows(samples).to(hidden_TH.device)
        uniforms = [
            torch.from_numpy(draw_uniforms(0, seed, 1, len(sample) - 1))
            for seed, sample in zip(seeds, samples, strict=True)
        ]
        uniforms_1N = torch.cat(uniforms, dim=1).to(hidden_TH.device)
        gradients = [torch.zeros_like(hidden_TH) for _ in range(2)]
        kl = 0.0
        for start in range(0, len(rows_N), self._head.slice_tokens):
            rows_n = rows_N[start : start + self._head.slice_tokens]
            with torch.no_grad():
                logits_nV = self._head.logits(own_BSH.flatten(0, 1)[rows_n])
                log_p_nV = torch.log_softmax(logits_nV.float(), dim=-1)
            hidden_nH = hidden_TH[rows_n].requires_grad_(True)
            with torch.enable_grad(), self._outside(choice):
                logits_nV = self._head.logits(hidden_nH).float()
            log_q_nV = torch.log_softmax(logits_nV.detach(), dim=-1)
            p_nV, q_nV = log_p_nV.exp(), log_q_nV.exp()
            kl += float((p_nV * (log_p_nV - log_q_nV)).sum(dtype=torch.float64))
            labels_n1 = sample_labels(q_nV, uniforms_1N[:, start : start + len(rows_n)])[0][:, None]
            drawn_nV = q_nV.scatter(1, labels_n1, q_nV.gather(1, labels_n1) - 1)
            for number, gradient_nV in enumerate((q_nV - p_nV, drawn_nV)):
                (pulled_nH,) = torch.autograd.grad(
                    logits_nV, hidden_nH, gradient_nV, retain_graph=number == 0
                )
                gradients[number][rows_n] = pulled_nH
        return kl, [gradient_TH.view_as(own_BSH) for gradient_TH in gradients]

    @contextmanager
    def _under(self, choice: Choice) -> Iterator[None]:
        """While open, each layer runs under the plan, quantized when it is visited."""
        self._visited = -1
        with ExitStack() as stack:
            stack.enter_context(self._outside(choice))
            for number, layer in enumerate(self._runner.layers):
                run = self._layer(number, layer.forward, choice)
                stack.enter_context(replaced_forward(layer, run))
            yield
        self._weights = WeightCache(_UNBOUNDED)

    def _outside(self, choice: Choice) -> Any:
        """While open, what is outside the layers (the head) runs under the plan."""
        number = len(self._runner.layers)
        return self._quantized.quantized(number, choice, self._outside_weights)

    def _layer(
        self, number: int, original: Callable[..., Any], choice: Choice
    ) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if self._visited != number:  # quantized weights are kept for one visit of a layer
                self._visited, self._weights = number, WeightCache(_UNBOUNDED)
            with self._quantized.quantized(number, choice, self._weights):
                return original(*arguments, **keywords)

        return run
