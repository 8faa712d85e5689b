"""One model in one process: turns a shard's samples into a calibration or sensitivity sums.

Everything that a worker computes happens here, without Ray, so that tests and benchmarks can run
the same code in their own process. The same shard gives the same bytes in any process that uses
the same number of threads on the same kind of device. The number of CPU threads can change the last
bits of a sum: it comes from the config, never from the number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch

from autoquant_ray.arrays import Floats
from autoquant_ray.calibrate.hessians import HessianCollector
from autoquant_ray.calibrate.maxima import ActivationMaxima
from autoquant_ray.calibrate.portions import Block, collector_of
from autoquant_ray.calibrate.scale_search import ScaleSearch
from autoquant_ray.data.samples import Samples, num_predicted
from autoquant_ray.distributed.scoring import LayerFit, ScoringSpec, ShardScores
from autoquant_ray.errors import not_finite
from autoquant_ray.formats.integer_pairs import multiplies_integers
from autoquant_ray.plan.memory import room_for_visit
from autoquant_ray.quantize.awq import Losses
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.score.backward import LayerwiseBackward
from autoquant_ray.score.drawing.trial import DrawingTrials
from autoquant_ray.score.entrance import Gradients, Pass
from autoquant_ray.score.fitting import LayerFitting
from autoquant_ray.score.integer_products import require_exact_sums
from autoquant_ray.score.loading import set_up_model
from autoquant_ray.score.loss import VocabularyLoss, draw_uniforms
from autoquant_ray.score.model_checks import (
    joint_context,
    require_gradients,
    require_head,
    require_linears,
)
from autoquant_ray.score.rerun.kept_products import ProductKeeper, ProductRoom
from autoquant_ray.score.sensitivity import SensitivityHooks
from autoquant_ray.score.visits import Step, Visit, VisitPacker, make_step, predicting_rows
from autoquant_ray.score.watched_passes import run_watched

FREE_SHARE = 0.8
"""Of what a GPU has left, so much is kept of the layers' graphs; allocators do not fill it all."""


class Shard(Protocol):
    """A shard with its samples."""

    @property
    def shard(self) -> int:
        """Its number."""
        ...

    @property
    def samples(self) -> Samples:
        """All of them."""
        ...


class Scorer:
    """Calibrates and scores shards with one loaded model.

    Args:
        spec: What to compute.
        model: Use this loaded model instead of loading ``spec.model``.

    Attributes:
        joint_context: Tokens up to which samples of several lengths share a step; None: all may.
        product_room: For products of the forward pass that the backward pass uses again.
    """

    def __init__(self, spec: ScoringSpec, model: Any = None) -> None:
        self.spec = spec
        self.model, residence = set_up_model(spec, model)
        self._device = self.model.get_input_embeddings().weight.device
        self._backward = LayerwiseBackward(
            self.model,
            residence,
            reaches_front=any(scored.planned.is_idle for scored in spec.modules),
        )
        self._loss = VocabularyLoss(self.model)
        self._maxima = ActivationMaxima(self.model, spec.modules, spec.formats)
        self._search = ScaleSearch(self.model, self._backward.layers, spec.modules, spec.formats)
        require_head(self.model, self._loss)
        require_linears(self.model, spec.modules, self._backward.holding)
        require_gradients(self._backward)
        self.joint_context = joint_context(self.model, self._backward)
        given, layers = spec.weight_cache_bytes, self._backward.layers
        takes_integers = multiplies_integers(spec.difference_dtype)
        if takes_integers:
            require_exact_sums(self._device)
        room = room_for_visit(
            self.model, layers, spec.modules, spec.formats, takes_integers=takes_integers
        )
        self._cache_bytes = room if given is None else given
        self._weights = WeightCache(self._cache_bytes)
        self._hooks = SensitivityHooks(
            self.model,
            spec.modules,
            spec.formats,
            self._weights,
            num_draws=self._num_draws,
            cache_share=1.0 if spec.row_share == "auto" else spec.row_share,
            difference_dtype=spec.difference_dtype,
            adds_sequences=spec.estimator == "sequence",
        )
        weight = self.model.get_input_embeddings().weight
        self._packer = VisitPacker(
            spec.step_tokens,
            token_bytes=weight[0].nbytes * len(self._backward.layers),
            room=spec.activation_bytes // 2 if self.is_layerwise else 0,
            joint_context=self.joint_context,
        )
        self._kept: dict[int, list[list[Pass]]] = {}
        self.product_room = ProductRoom(_graph_bytes(spec))

    @property
    def is_layerwise(self) -> bool:
        """Whether the backward pass visits one layer at a time."""
        return self._backward.is_layerwise

    @property
    def _num_draws(self) -> int:
        return self.spec.label_draws if self.spec.labels == "model" else 1

    def calibrate(self, samples: Samples, shard: int | None = None) -> Calibration:
        """Largest inputs of all modules over the samples, and their channels where needed.

        Args:
            samples: The shard's samples.
            shard: Keep this shard's layer inputs for :meth:`score`, as far as there is room.

        Raises:
            NonFiniteError: An activation is NaN or infinite.
        """
        visits = self._visits_to_watch(self._packer, samples)
        room = self.spec.activation_bytes // 2 - sum(
            pass_.nbytes for kept in self._kept.values() for visit in kept for pass_ in visit
        )
        keep = (
            shard is not None
            and self.is_layerwise
            and not self._maxima.changes_forward
            and self._packer.input_bytes(samples) <= room
        )
        keeps_products = keep and not self._maxima.adds_products  # nobody could tell them apart
        done = []
        with self._maxima.collecting():
            for visit in visits:
                steps = self._steps(samples, visit)
                done.append(
                    run_watched(
                        self._backward,
                        self._loss,
                        steps,
                        self._maxima,
                        keep=keep,
                        keeper=ProductKeeper(self.product_room) if keeps_products else None,
                    )
                )
        if keep and shard is not None:
            self._kept[shard] = done
        calibration = self._maxima.calibration()
        for (module, name), value in calibration.maxima().items():
            if not np.isfinite(value):
                raise not_finite(f"{name} of {module} is {value}")
        return calibration

    def search(self, samples: Samples, calibration: Calibration) -> Losses:
        """Losses of AWQ's candidates over the samples.

        Args:
            samples: The shard's samples.
            calibration: Merged over all shards.

        Raises:
            NonFiniteError: A loss is NaN or infinite.
        """
        room = self.spec.activation_bytes // 2 if self.is_layerwise else 0
        tokens, width = self.spec.step_tokens, self._search.token_bytes
        packer = VisitPacker(tokens, width, room, self.joint_context)
        visits = self._visits_to_watch(packer, samples)
        with self._search.searching(calibration):
            for visit in visits:
                steps = self._steps(samples, visit)
                run_watched(self._backward, self._loss, steps, self._search)
        return self._search.losses()

    def fit(
        self, layers: Sequence[int], calibration: Calibration, shards: Iterable[Shard] = ()
    ) -> dict[int, LayerFit]:
        """What is fitted to weights of some layers, by the number of the layer.

        Args:
            layers: Their numbers; the number of layers stands for what is outside of them.
            calibration: Merged over all shards.
            shards: All of them, in order, where second moments of inputs are needed.
        """
        collect = partial(self._second_moments, shards=shards, halves=calibration.halves)
        fits: dict[int, LayerFit] = self._fitting.fit(layers, calibration, collect)
        return fits

    def _second_moments(
        self, block: Block, shards: Iterable[Shard], halves: Mapping[int, int]
    ) -> HessianCollector:
        """Sums over all shards; the model runs no further than it must."""
        collector = collector_of(block)
        num_layers = max(portion.layer for portion in block) + 1
        # before anything is watched: to plan visits, the first may run the tower of a model
        visits_of = [(s, self._visits_to_watch(self._packer, s.samples)) for s in shards]
        with collector.collecting():
            for shard, visits in visits_of:
                collector.begin(halves[shard.shard])
                for visit in visits:
                    steps = self._steps(shard.samples, visit)
                    run_watched(self._backward, self._loss, steps, collector, num_layers=num_layers)
        return collector

    @cached_property
    def _fitting(self) -> LayerFitting:
        """Made when it is first needed: most menus never do."""
        layers, spec = self._backward.layers, self.spec
        return LayerFitting(
            self.model,
            self._backward.residence,
            layers,
            spec.modules,
            spec.formats,
            min_expert_tokens=spec.min_expert_tokens,
            room=spec.moment_bytes,
        )

    def score(
        self,
        samples: Samples,
        first_sample: int,
        calibration: Calibration,
        shard: int | None = None,
        row_shares_GF: Floats | None = None,
    ) -> ShardScores:
        """Sensitivity sums of the samples.

        Args:
            samples: The shard's samples.
            first_sample: Position of the first of them in the whole data set; label draws are
                seeded by the seed and this position, never by the worker or the shard layout.
            calibration: Merged over all shards, the same at every call.
            shard: Use the layer inputs that :meth:`calibrate` kept of the same samples.
            row_shares_GF: Share of the rows to score of each group and format where the spec's is
                ``auto``; None scores all rows, and finds out what drawing some would do.

        Raises:
            NonFiniteError: The loss or a sum is NaN or infinite.
        """
        start = time.perf_counter()
        loss = 0.0
        kept = None if shard is None else self._kept.pop(shard, None)
        calibration = calibration.for_shard(shard)
        shares_GF, trials = self._row_shares(samples, row_shares_GF)
        packer = self._packer if trials is None else self._packer.one_by_one()
        kept = kept if trials is None else None
        has_several_draws = shares_GF.min() < shares_GF.max()
        seed = (self.spec.seed, first_sample)
        with self._hooks.scoring(calibration, shares_GF, seed, trials):
            for number, visit in enumerate(packer.visits(samples)):
                reuses = self._reuses(samples, visit) or has_several_draws
                self._weights.resize(self._cache_bytes if reuses else 0)
                passes = kept[number] if kept else self._forward(samples, visit)
                for step_loss in self._score_visit(passes, visit, samples, first_sample, trials):
                    loss += step_loss
        sums = self._hooks.sums()
        if not all(np.isfinite(sums_GF).all() for sums_GF in sums.of_estimators()):
            raise not_finite("a gradient or an output difference is NaN or infinite")
        return ShardScores(
            sums=sums,
            num_tokens=sum(map(num_predicted, samples)),
            num_samples=len(samples),
            loss=loss,
            seconds=time.perf_counter() - start,
            row_shares_GF=shares_GF,
            trial=None if trials is None else trials.result(),
        )

    def _row_shares(
        self, samples: Samples, given_GF: Floats | None
    ) -> tuple[Floats, DrawingTrials | None]:
        """Share of the rows to score, and what finds out which is enough where none is given."""
        shape, share = self._hooks.shape, self.spec.row_share
        if share != "auto":
            return np.full(shape, share), None
        if given_GF is not None:
            return given_GF, None
        tokens = [num_predicted(sample) for sample in samples]
        return np.ones(shape), DrawingTrials(tokens, *shape, self.spec.estimator)

    def _score_visit(
        self,
        passes: Sequence[Pass],
        visit: Visit,
        samples: Samples,
        first_sample: int,
        trials: DrawingTrials | None,
    ) -> list[float]:
        """Add the sums of a visit; returns the losses of its steps in nats."""
        losses, gradients = [], []

        def before_pass(index: int) -> None:
            self._hooks.step_shape = passes[index].step.shape
            if trials is not None:
                (trials.sample,) = visit[index]

        for number, (pass_, positions) in enumerate(zip(passes, visit, strict=True)):
            before_pass(number)
            loss, pulled = self._loss_gradients(
                pass_, [samples[p] for p in positions], [first_sample + p for p in positions]
            )
            losses.append(loss)
            gradients.append(pulled)
        self._backward.backward(passes, gradients, before_pass=before_pass)
        return losses

    def _visits_to_watch(self, packer: VisitPacker, samples: Samples) -> list[Visit]:
        visits = packer.visits(samples)
        self._backward.check_entrance(s for visit in visits for s in self._steps(samples, visit))
        return visits

    def _forward(self, samples: Samples, visit: Visit) -> list[Pass]:
        steps, keeper = self._steps(samples, visit), ProductKeeper(self.product_room)
        passes: list[Pass] = self._backward.forward(steps, keep=True, keeper=keeper)
        return passes

    def _steps(self, samples: Samples, visit: Visit) -> list[Step]:
        return [
            make_step([samples[position] for position in positions], self._device)
            for positions in visit
        ]

    def _loss_gradients(
        self, pass_: Pass, samples: Samples, positions: list[int]
    ) -> tuple[float, Gradients]:
        """Loss of a step in nats, and its gradients at the final hidden states, one per draw."""
        hidden_BSH = self._backward.finish(pass_, with_graph=True)
        ids_BS = pass_.step.ids_BS
        device = hidden_BSH.device  # a split model ends on another one than it begins
        rows_N = predicting_rows(samples).to(device)
        targets_N, uniforms_KN = None, None
        if self.spec.labels == "data":
            targets_N = ids_BS.roll(-1, dims=1).flatten().to(device)[rows_N]
        else:
            uniforms = [
                draw_uniforms(self.spec.seed, position, self._num_draws, num_predicted(sample))
                for position, sample in zip(positions, samples, strict=True)
            ]
            uniforms_KN = torch.from_numpy(np.concatenate(uniforms, axis=1)).to(device)
        hidden_TH = hidden_BSH.flatten(0, 1)
        gradients_NH, summed = self._loss.gradients(hidden_TH[rows_N], targets_N, uniforms_KN)
        loss = float(summed)
        if not np.isfinite(loss):
            raise not_finite(f"the loss is {loss}")
        gradients = []
        for gradient_NH in gradients_NH:
            gradient_TH = torch.zeros_like(hidden_TH)
            gradient_TH[rows_N] = gradient_NH
            gradients.append(gradient_TH.view_as(hidden_BSH))
        return loss, gradients

    def _reuses(self, samples: Samples, visit: Visit) -> bool:
        """Whether a quantized weight is used twice: by several steps, or slices of the head.

        Between visits all layers go through the cache, so that the next visit finds nothing there
        unless the user gave room for all.
        """
        predicted = sum(num_predicted(samples[position]) for position in visit[0])
        has_slices = predicted > self._loss.slice_tokens
        return len(visit) > 1 or has_slices or self.spec.weight_cache_bytes is not None


def _graph_bytes(spec: ScoringSpec) -> int:
    """Room for products: as given, or what the model and the work leave of the GPU."""
    if spec.graph_bytes is not None:
        return spec.graph_bytes
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))
    return max(0, int(FREE_SHARE * (free - spec.work_bytes)))
