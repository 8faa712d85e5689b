"""``awq`` within ``mtq.quantize``: factors from the forward loop, folded into the model.

The forward loop runs twice: for the mean of ``|x|`` of every input channel, then for the error of
every candidate. Statistics and candidates are those of the scan: on the scan's samples, without
padding, so are the factors.

Shape letters: T rows, C rows of a chunk, I in features, O out features, R some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from autoquant_ray.formats.format import Attributes
from autoquant_ray.modelopt_api import calibrate_anew, enable_weight_access_and_writeback
from autoquant_ray.plan.fold import ROWS, Fold
from autoquant_ray.quantize.awq import PLAIN, candidate_alphas, shared_factors, shared_importance
from autoquant_ray.quantize.folding import divide_maxima, fold_factors, producer_divisor
from autoquant_ray.quantize.judged_rows import judged_rows
from autoquant_ray.quantize.quantizers import fake_quantize_weight

_JUDGED_ROWS = 128  # neighbouring candidates differ by a few percent only
_CHUNK_ELEMENTS = 2**24
_MIN_CHUNK_ROWS = 512


def candidate_error(
    weight_OI: torch.Tensor, attributes: Attributes, scale_I: torch.Tensor
) -> torch.Tensor:
    """``Q(W s) / s - W`` under a candidate, in the weight's dtype: times an input, its error.

    Args:
        weight_OI: A linear's weight.
        attributes: Of the weight quantizer.
        scale_I: From :func:`~autoquant_ray.quantize.awq.channel_scales`.
    """
    dtype = weight_OI.dtype
    scaled_OI = weight_OI * scale_I.to(dtype)
    quantized_OI = fake_quantize_weight(attributes, scaled_OI.float())
    back_I = (1.0 / scale_I).to(dtype).float()
    return quantized_OI.mul_(back_I).sub_(weight_OI.float()).to(dtype)


def shared_error(
    weight_OI: torch.Tensor, attributes: Attributes, factors_I: torch.Tensor
) -> torch.Tensor:
    """:func:`candidate_error` of the rows that judge, float32 ``(R, I)``, for factors that are
    folded: weights are rounded with them in float32.

    The rows stand for all: their squared error is that of all rows if all were alike.

    Args:
        weight_OI: A linear's weight, in a format with scales per row or per block of a row.
        attributes: Of the weight quantizer.
        factors_I: From :func:`~autoquant_ray.quantize.awq.shared_factors`.
    """
    rows_RI = weight_OI[judged_rows(len(weight_OI), _JUDGED_ROWS)].float()
    error_RI = candidate_error(rows_RI, attributes, factors_I)
    return error_RI.mul_((len(weight_OI) / len(rows_RI)) ** 0.5)


def squared_norm(states_TI: torch.Tensor, error_OI: torch.Tensor) -> torch.Tensor:
    """Sum of the squared elements of ``X E^T``, float64."""
    total = torch.zeros((), dtype=torch.float64, device=states_TI.device)
    for chunk_CI in states_TI.split(max(_MIN_CHUNK_ROWS, _CHUNK_ELEMENTS // len(error_OI))):
        product_CO = (chunk_CI @ error_OI.T).float()
        total += torch.linalg.vector_norm(product_CO).double().square()
    return total


class InputFactors:
    """Factors of some inputs of a model that ModelOpt has prepared.

    Args:
        model: Its quantizers are there; its weights are still its own.
        algorithm: ``awq`` with its arguments, and ``folds``: those of the inputs.
    """

    def __init__(self, model: Any, algorithm: Attributes) -> None:
        self._model = model
        self._alphas = [PLAIN, *candidate_alphas(algorithm)]
        self._folds = [Fold.from_json(entry) for entry in algorithm["folds"]]
        self._sums: dict[Fold, tuple[torch.Tensor, int]] = {}
        self._candidates: dict[Fold, list[torch.Tensor]] = {}
        self._losses: dict[Fold, torch.Tensor] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While open, forward passes give the means of inputs."""
        with self._hooks([(fold, fold.readers[0], self._collect) for fold in self._folds]):
            yield

    @contextmanager
    def searching(self) -> Iterator[None]:
        """While open, forward passes measure the candidates.

        Raises:
            ValueError: No input was seen at all.
        """
        if not self._sums:
            raise ValueError(
                "the algorithm awq needs inputs; give mtq.quantize a forward_loop that runs the "
                "model on calibration data"
            )
        self._candidates = {fold: self._factors(fold) for fold in self._sums}
        # Before large tensors come and go, which must find the room that they have left.
        self._losses = {
            fold: torch.zeros(len(self._alphas), dtype=torch.float64, device=sum_I.device)
            for fold, (sum_I, _) in self._sums.items()
        }
        readers = [(fold, name) for fold in self._sums for name in fold.readers]
        with self._hooks([(fold, name, partial(self._measure, name)) for fold, name in readers]):
            yield

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the best factors into the model, and calibrate its quantizers for what is there."""
        for fold in self._sums:
            losses = self._losses[fold].tolist()
            factors_I = self._candidates[fold][losses.index(min(losses))]
            modules = [self._model.get_submodule(name) for name in (*fold.readers, fold.producer)]
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(enable_weight_access_and_writeback(module, self._model))
                fold_factors(self._model, fold, factors_I)
                for module in modules[:-1]:
                    calibrate_anew(module.weight_quantizer, module.weight)
            quantizer: Any = getattr(modules[-1], "weight_quantizer", None)
            if fold.kind == ROWS and getattr(quantizer, "amax", None) is not None:
                divide_maxima(quantizer, producer_divisor(fold, factors_I, len(modules[-1].weight)))

    def _factors(self, fold: Fold) -> list[torch.Tensor]:
        """Of every candidate."""
        modules = [self._model.get_submodule(name) for name in fold.readers]
        sum_I, num_rows = self._sums[fold]
        attributes = _attributes(modules[0].weight_quantizer)
        importance_I = shared_importance([module.weight for module in modules], attributes)
        mean_I = (sum_I / num_rows).float()
        return [shared_factors(fold, importance_I, mean_I, alpha) for alpha in self._alphas]

    def _collect(self, fold: Fold, states_TI: torch.Tensor) -> None:
        sum_I, num_rows = self._sums.get(fold, (0, 0))
        added_I = states_TI.abs().sum(dim=0, dtype=torch.float64)
        self._sums[fold] = (sum_I + added_I, num_rows + len(states_TI))

    def _measure(self, name: str, fold: Fold, states_TI: torch.Tensor) -> None:
        module = self._model.get_submodule(name)
        attributes = _attributes(module.weight_quantizer)
        for number, factors_I in enumerate(self._candidates[fold]):
            error_RI = shared_error(module.weight, attributes, factors_I)
            self._losses[fold][number] += squared_norm(states_TI, error_RI.to(states_TI.dtype))

    @contextmanager
    def _hooks(
        self, watched: Sequence[tuple[Fold, str, Callable[[Fold, torch.Tensor], None]]]
    ) -> Iterator[None]:
        def watch(fold: Fold, use: Callable[[Fold, torch.Tensor], None]) -> Callable[..., None]:
            def hook(_: Any, arguments: tuple[Any, ...]) -> None:
                states = arguments[0].detach()
                use(fold, states.reshape(-1, states.shape[-1]))

            return hook

        with ExitStack() as stack:
            for fold, name, use in watched:
                module = self._model.get_submodule(name)
                handle = module.register_forward_pre_hook(watch(fold, use))
                stack.callback(handle.remove)
            yield


def _attributes(quantizer: Any) -> Attributes:
    """What a weight quantizer of integers was configured with."""
    if quantizer.block_sizes:
        return {"num_bits": quantizer.num_bits, "block_sizes": dict(quantizer.block_sizes)}
    return {"num_bits": quantizer.num_bits, "axis": quantizer.axis}
