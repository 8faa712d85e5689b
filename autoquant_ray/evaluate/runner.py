"""Measures what allocations do to a model: runs a shard through it, quantized and unquantized.

Each layer is visited once for all steps of a shard under all allocations: a weight is quantized
once per distinct format, and allocations that agree up to a layer share everything before it. Many
similar allocations therefore cost little more than a single one.

Shape letters: B samples, S positions, H hidden, N predicted tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.data.samples import Samples, num_predicted
from autoquant_ray.errors import not_finite
from autoquant_ray.evaluate.divergence import TokenDivergence, compare
from autoquant_ray.evaluate.flip_estimator import FlipEstimator, ShardFlips
from autoquant_ray.evaluate.tasks.responder import Responder
from autoquant_ray.formats.format import Format
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.layers import replaced_forward
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.plan.memory import GIB, room_for_visit
from autoquant_ray.plan.plan import Plan
from autoquant_ray.plan.scored_modules import ScoredModule, scored_modules
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.modules import FRONT, UNQUANTIZED, FormatNumbers, QuantizedLayers
from autoquant_ray.quantize.weight_cache import UNBOUNDED, WeightCache
from autoquant_ray.score.backward import LayerwiseBackward
from autoquant_ray.score.entrance import Pass
from autoquant_ray.score.loading import set_up_model
from autoquant_ray.score.loss import VocabularyLoss
from autoquant_ray.score.model_checks import joint_context
from autoquant_ray.score.visits import Step, VisitPacker, make_step, predicting_rows

Float32s = np.ndarray[Any, np.dtype[np.float32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

_LOGITS_COPIES = 3
"""float32 logits of a batch in memory at once while requests are answered."""

Prefix = tuple[FormatNumbers, ...]
"""Formats of the vision tower, then of the first layers; where equal, so are hidden states."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """What a worker needs for an evaluation; small and picklable.

    Attributes:
        model: Model to load.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        num_threads: Threads of CPU kernels.
        modules: All searched modules with their group index.
        formats: The menu that choices point into.
        calibration: From the scan.
        step_tokens: Tokens, padding included, per step.
        placement: ``resident``, ``offload`` or ``split``.
        activation_bytes: Memory for hidden states inside the layers.
    """

    model: ModelRef
    dtype: str
    device: str
    num_threads: int
    modules: tuple[ScoredModule, ...]
    formats: tuple[Format, ...]
    calibration: Calibration
    step_tokens: int
    placement: str = "resident"
    activation_bytes: int = GIB

    @classmethod
    def of(
        cls, scan: ScanConfig, ref: ModelRef, plan: Plan, calibration: Calibration
    ) -> EvaluationSpec:
        """That of a scan's model and plan."""
        return cls(
            model=ref,
            dtype=scan.dtype,
            device=scan.device,
            num_threads=scan.cpus_per_worker,
            modules=scored_modules(plan),
            formats=plan.formats,
            calibration=calibration,
            step_tokens=scan.step_tokens,
            placement=scan.placement,
            activation_bytes=round(scan.activation_cache_gib * GIB),
        )

    def build(self) -> AllocationRunner:
        """Load the model; called in the worker process."""
        return AllocationRunner(self)


@dataclass(frozen=True, kw_only=True)
class SampleDivergence:
    """One sample under one allocation; N predicted tokens.

    Attributes:
        kl_N: KL(P || Q) in nats.
        loss_N: ``-log q`` of the next token in nats.
        agrees_N: Whether the likeliest token stayed the same.
    """

    kl_N: Float32s
    loss_N: Float32s
    agrees_N: Bools


@dataclass(frozen=True, kw_only=True)
class ShardEvaluation:
    """A shard under C allocations.

    Attributes:
        reference: ``-log p`` of the next token of the unquantized model per sample, float32.
        divergences: Per allocation, per sample.
        seconds: Time spent.
    """

    reference: list[Float32s]
    divergences: list[list[SampleDivergence]]
    seconds: float


class AllocationRunner:
    """Runs a loaded model under several allocations.

    Args:
        spec: What to load and how to run it.
        model: Use this loaded model instead of loading ``spec.model``.
    """

    def __init__(self, spec: EvaluationSpec, model: Any = None) -> None:
        self.spec = spec
        self.model, residence = set_up_model(spec, model)
        self._device = self.model.get_input_embeddings().weight.device
        self._layerwise = LayerwiseBackward(
            self.model,
            residence,
            reaches_front=any(scored.planned.is_idle for scored in spec.modules),
        )
        self._head = VocabularyLoss(self.model)
        self._quantized = QuantizedLayers(
            self.model, self._layerwise.layers, spec.modules, spec.formats, spec.calibration
        )
        self.joint_context = joint_context(self.model, self._layerwise)
        self._planner = VisitPacker(spec.step_tokens, 0, 0, self.joint_context)

    @torch.no_grad()
    def evaluate(self, samples: Samples, choices: Sequence[FormatNumbers]) -> ShardEvaluation:
        """Compare the model quantized by each allocation with the unquantized model.

        Args:
            samples: The shard's samples.
            choices: Allocations.

        Raises:
            NonFiniteError: A prediction of the unquantized model is NaN or infinite. Where one of
                a quantized model is, its divergence is infinite.
        """
        start = time.perf_counter()
        unquantized: FormatNumbers = (UNQUANTIZED,) * (1 + max(m.group for m in self.spec.modules))
        positions = [position for visit in self._planner.visits(samples) for position in visit]
        steps = [make_step([samples[p] for p in chosen], self._device) for chosen in positions]
        hidden = self._final_states_by_choice(steps, [unquantized, *choices])
        reference: list[Any] = [None] * len(samples)
        divergences: list[list[Any]] = [[None] * len(samples) for _ in choices]
        head_weights = WeightCache(UNBOUNDED)
        for number, chosen in enumerate(positions):
            step_samples = [samples[p] for p in chosen]
            rows_N = predicting_rows(step_samples).to(hidden[unquantized][number].device)
            loss_N, results = compare(
                self._head,
                hidden[unquantized][number].flatten(0, 1)[rows_N],
                [hidden[choice][number].flatten(0, 1)[rows_N] for choice in choices],
                [self._quantized_head(choice, head_weights) for choice in choices],
                _next_tokens(steps[number]).to(rows_N.device)[rows_N],
            )
            if not loss_N.isfinite().all():
                raise not_finite("a prediction of the unquantized model is NaN or infinite")
            lengths = [num_predicted(sample) for sample in step_samples]
            for position, sample_loss_n in zip(chosen, loss_N.split(lengths), strict=True):
                reference[position] = sample_loss_n.numpy()
            for column, result in zip(divergences, results, strict=True):
                for position, divergence in zip(chosen, _split(result, lengths), strict=True):
                    column[position] = divergence
        return ShardEvaluation(
            reference=reference, divergences=divergences, seconds=time.perf_counter() - start
        )

    def estimate(self, samples: Samples, first_sample: int, choice: FormatNumbers) -> ShardFlips:
        """Slopes, curvatures and interactions of the flips of an allocation.

        See :meth:`~autoquant_ray.evaluate.flip_estimator.FlipEstimator.estimate`.
        """
        shard: ShardFlips = self._estimator.estimate(samples, first_sample, choice)
        return shard

    @cached_property
    def _estimator(self) -> FlipEstimator:
        """Made when it is first needed: only a refinement does."""
        return FlipEstimator(
            self.spec,
            self.model,
            self._layerwise,
            self._head,
            self._quantized,
            joint_context=self.joint_context,
        )

    @torch.no_grad()
    def answer(
        self, kind: str, requests: Sequence[tuple[Any, ...]], choice: FormatNumbers
    ) -> list[Any]:
        """Answers to requests of benchmark tasks under an allocation.

        See :meth:`~autoquant_ray.evaluate.tasks.responder.Responder.answer`.
        """
        with self._running_under(choice):
            return self._responder.answer(kind, requests)

    @cached_property
    def _responder(self) -> Responder:
        """Made when it is first needed: only tasks do."""
        tokenizer = load_tokenizer(TokenizerRef.of(self.spec.model, ""))
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        room = self.spec.activation_bytes // (_LOGITS_COPIES * 4 * vocabulary)
        return Responder(self.model, tokenizer, min(self.spec.step_tokens, room))

    @contextmanager
    def _running_under(self, choice: FormatNumbers) -> Iterator[None]:
        """While open, the model runs as a whole under an allocation.

        Quantized weights of the first layers are kept, as many as there is memory for; those of the
        others are made again each time that a layer runs.
        """
        layers, held, weights = self._layerwise.layers, 0, WeightCache(UNBOUNDED)
        room = room_for_visit(self.model, layers, self.spec.modules, self.spec.formats)
        with ExitStack() as stack:
            for number in (FRONT, len(layers)):
                stack.enter_context(self._quantized.quantized(number, choice, weights))
            for number, layer in enumerate(layers):
                held += self._quantized.quantized_bytes(number, choice)
                is_kept = held <= room and not self._layerwise.residence.is_offloaded
                if is_kept or not self._layerwise.is_layerwise:
                    stack.enter_context(self._quantized.quantized(number, choice, weights))
                else:
                    forward = self._visiting(number, layer.forward, choice)
                    stack.enter_context(replaced_forward(layer, forward))
            yield

    def _visiting(
        self, number: int, original: Callable[..., Any], choice: FormatNumbers
    ) -> Callable[..., Any]:
        """A layer's ``forward`` that brings its weights, and quantizes them, each time."""

        def visit(*arguments: Any, **keywords: Any) -> Any:
            with (
                self._layerwise.visit_forward(number),
                self._quantized.quantized(number, choice, WeightCache(UNBOUNDED)),
            ):
                return original(*arguments, **keywords)

        return visit

    def _quantized_head(
        self, choice: FormatNumbers, weights: WeightCache
    ) -> Callable[[], AbstractContextManager[None]]:
        """Opens a context in which the head is quantized as an allocation says."""
        return partial(self._quantized.quantized, len(self._layerwise.layers), choice, weights)

    def _final_states_by_choice(
        self, steps: Sequence[Step], choices: Sequence[FormatNumbers]
    ) -> dict[FormatNumbers, list[torch.Tensor]]:
        """Choice -> final hidden states per step; as many choices in one pass as memory allows."""
        distinct = list(dict.fromkeys(choices))
        states: dict[FormatNumbers, list[torch.Tensor]] = {}
        at_once = self._num_at_once(steps)
        for first in range(0, len(distinct), at_once):
            chunk = distinct[first : first + at_once]
            states |= zip(chunk, self._final_states(steps, chunk), strict=True)
        return states

    def _num_at_once(self, steps: Sequence[Step]) -> int:
        """How many allocations' hidden states, of two layers at a time, fit in memory."""
        width = self.model.get_input_embeddings().weight[0].nbytes
        bytes_each = 2 * sum(step.ids_BS.numel() for step in steps) * width
        return max(1, int(self.spec.activation_bytes // bytes_each))

    def _final_states(
        self, steps: Sequence[Step], choices: Sequence[FormatNumbers]
    ) -> list[list[torch.Tensor]]:
        """Per choice and step, final hidden states ``(B, S, H)``."""
        if not self._layerwise.is_layerwise:
            return [self._whole(steps, choice) for choice in choices]
        prefixes, fronts = self._enter(steps, choices)
        shared: dict[Prefix, list[Any]] = {
            prefix: [front.hidden_BSH for front in passes] for prefix, passes in fronts.items()
        }
        for number in range(len(self._layerwise.layers)):
            weights = WeightCache(UNBOUNDED)  # of one layer, for one visit
            following: dict[Prefix, list[Any]] = {}
            with self._layerwise.visit_forward(number):
                for index, choice in enumerate(choices):
                    before = prefixes[index]
                    prefixes[index] = (*before, self._quantized.signature(number, choice))
                    if prefixes[index] in following:
                        continue
                    with self._quantized.quantized(number, choice, weights):
                        following[prefixes[index]] = [
                            self._layerwise.run_layer(
                                number, front.entering(number, hidden), front.calls[number]
                            )
                            for front, hidden in zip(
                                fronts[before[:1]], shared[before], strict=True
                            )
                        ]
            shared = following
        finished = {
            prefix: [
                self._layerwise.finish(Pass(step, hidden_BSH=hidden), with_graph=False)
                for step, hidden in zip(steps, states, strict=True)
            ]
            for prefix, states in shared.items()
        }
        return [finished[prefix] for prefix in prefixes]

    def _enter(
        self, steps: Sequence[Step], choices: Sequence[FormatNumbers]
    ) -> tuple[list[Prefix], dict[Prefix, list[Pass]]]:
        """The prefix of each choice, and per prefix, the steps as they enter the first layer."""
        prefixes: list[Prefix] = []
        fronts: dict[Prefix, list[Pass]] = {}
        for choice in choices:
            prefixes.append((self._quantized.signature(FRONT, choice),))
            if prefixes[-1] not in fronts:
                with self._quantized.quantized(FRONT, choice, WeightCache(UNBOUNDED)):
                    fronts[prefixes[-1]] = [self._layerwise.enter(step) for step in steps]
        return prefixes, fronts

    def _whole(self, steps: Sequence[Step], choice: FormatNumbers) -> list[torch.Tensor]:
        """Final hidden states per step, for a model that is not a plain chain of layers."""
        weights = WeightCache(UNBOUNDED)
        with ExitStack() as stack:
            for number in range(FRONT, len(self._layerwise.layers) + 1):
                stack.enter_context(self._quantized.quantized(number, choice, weights))
            return [self._layerwise.call_base(step) for step in steps]


def _next_tokens(step: Step) -> torch.Tensor:
    """The token after each position of a step, flattened ``(B * S)``."""
    return step.ids_BS.roll(-1, dims=1).flatten()


def _split(result: TokenDivergence, lengths: list[int]) -> list[SampleDivergence]:
    """Divergences per sample of a step; NaN counts as an infinite loss."""
    parts = zip(
        result.kl_N.nan_to_num(nan=math.inf, posinf=math.inf).split(lengths),
        result.loss_N.nan_to_num(nan=math.inf, posinf=math.inf).split(lengths),
        result.agrees_N.split(lengths),
        strict=True,
    )
    return [
        SampleDivergence(kl_N=kl.numpy(), loss_N=loss.numpy(), agrees_N=agrees.numpy())
        for kl, loss, agrees in parts
    ]
