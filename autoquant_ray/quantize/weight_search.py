"""Weight scales by least squared error, plain or weighted by channel, and a memory of results.

ModelOpt's own calibrators try the candidates. A search quantizes a weight once per candidate, so
its result is kept in a compact form: the number of the candidate per scale, one byte each. The
scales are always formed from these numbers, so it makes no difference whether they were kept.

``weighted`` is ModelOpt's search (algorithm ``mse``) with another measure of error:
``sum_j E[x_j^2] (w_j - q_j)^2``, where ``x_j`` is the input that ``w_j`` is multiplied with. It
always searches in float32, so that its result does not depend on the type in which a model
computes.

Layers that engines fuse have one scale where a format has one per weight
(:mod:`autoquant_ray.serving.shared_scales`): the maximum is that of all of them, and a search tries
its multiples on all of them together. A weight alone does not show which these are:
:class:`WeightScales` does. In ModelOpt's form each weight has its own; but static NVFP4 weights,
whose fused layers ModelOpt finds by their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from autoquant_ray.formats.algorithms import (
    ARGUMENTS,
    MSE,
    SEARCHED_BYTES,
    SEARCHES,
    WEIGHTED,
    num_multipliers,
)
from autoquant_ray.formats.format import Attributes, Format
from autoquant_ray.formats.numbers import is_static_nvfp4
from autoquant_ray.formats.smoothed import is_smoothed, method_of, needs_hessians, takes_factors
from autoquant_ray.modelopt_api import SHARED_PATTERNS, ScaleSearch, StaticBlockScaleQuantizer
from autoquant_ray.quantize.awq import shared_factors, shared_importance
from autoquant_ray.quantize.backends.block_formats import StaticBlocks
from autoquant_ray.quantize.calibration import Bytes, Calibration
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.serving.shared_scales import fused_layers

Recall = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
"""Gives the kept result of a search, or runs the search and keeps its result."""


Rows = Callable[[], torch.Tensor]
"""Gives the rows on which a search measures its candidates."""


def search_scales(
    quantizer: Any,
    rows: Rows,
    algorithm: Attributes | None,
    recall: Recall | None,
    squares_I: torch.Tensor | None = None,
) -> None:
    """Replace a quantizer's maxima by those under which its weight, or its output, changes least.

    Args:
        quantizer: ModelOpt's, calibrated by maximum.
        rows: Of its weight, or of all weights that share its scale.
        algorithm: ``mse`` or ``weighted`` with all arguments; another leaves the maxima.
        recall: Remembers; None searches anew.
        squares_I: Mean square of every input channel, for ``weighted``; None leaves the maxima.
    """
    if algorithm is None or algorithm["method"] not in SEARCHES:
        return
    if algorithm["method"] == WEIGHTED:
        if squares_I is None:
            return
        scales = _weighted_search(quantizer, algorithm, squares_I)
        search = partial(_least_weighted, scales, rows)
    else:
        scales = ScaleSearch(quantizer, **{name: algorithm[name] for name in ARGUMENTS[MSE]})
        search = partial(_least_squared, scales, rows)
    result = search() if recall is None else recall(search)
    result = result.to(quantizer.amax.device)
    is_numbers = result.dtype == torch.uint8
    quantizer.amax = scales.maxima(result.long()) if is_numbers else result


def finish_static_blocks(
    quantizer: Any, weight_OI: torch.Tensor, largest: torch.Tensor | None
) -> None:
    """What ModelOpt's ``max_calibrate`` does at its end: maxima of blocks become float32, and
    NVFP4 gets its second scale.

    Args:
        quantizer: ModelOpt's, calibrated by maximum.
        weight_OI: Its weight.
        largest: Largest absolute weight of all layers that share the second scale; None: its own.
    """
    if not quantizer.is_static_block_quant:
        return
    if not quantizer.is_nvfp4_static:
        StaticBlockScaleQuantizer.from_tensor_quantizer(quantizer)
        return
    largest = quantizer.amax.amax().float() if largest is None else largest
    StaticBlocks.from_tensor_quantizer(quantizer, global_amax=largest.to(weight_OI.device))


def set_common_maximum(quantizer: Any, largest: torch.Tensor) -> None:
    """Give a quantizer with one maximum for a whole weight that of all weights that share it.

    Args:
        quantizer: ModelOpt's, calibrated by maximum.
        largest: Largest absolute weight of all of them.
    """
    if quantizer.amax is not None and quantizer.amax.numel() == 1:
        quantizer.amax = largest.to(quantizer.amax).expand_as(quantizer.amax).clone()


class WeightScales:
    """What the scales of a model's weights are made from, beside each weight itself.

    Args:
        model: The model.
        calibration: Merged over all shards; it may be set later.

    Attributes:
        searched: Keeps the results of searches.
        calibration: As given.
    """

    def __init__(self, model: torch.nn.Module, calibration: Calibration | None = None) -> None:
        self.searched = WeightCache(SEARCHED_BYTES)
        self.calibration = Calibration() if calibration is None else calibration
        self._model = model
        self._largest: dict[tuple[str, ...], torch.Tensor] = {}
        linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        self._fused = fused_layers(linears)
        by_modelopt: dict[Any, list[str]] = {}
        for name in linears:
            matches = (re.fullmatch(pattern, name) for pattern in SHARED_PATTERNS)
            keys = [(n, match.groups()) for n, match in enumerate(matches) if match]
            by_modelopt.setdefault(keys[0] if keys else name, []).append(name)
        self._by_modelopt = {n: tuple(names) for names in by_modelopt.values() for n in names}

    def recall(self, name: Sequence[str], format_: Format, dtype: torch.dtype) -> Recall:
        """What gives the result of a search for a weight: that of the run, where it was fitted.

        Args:
            name: The module's name; parameter and expert in a module of many.
            format_: The format.
            dtype: In which the search runs.
        """
        module, *part = name
        fitted = self.calibration.rounding.get((module, ".".join(part), format_.weight_key))
        if fitted is not None and fitted.multipliers is not None:
            return partial(_given, torch.from_numpy(fitted.multipliers))
        owner = self._together(name, format_) if self.shares_search(name, format_) else tuple(name)
        return partial(self.searched.get, (owner, format_.weight_key, dtype))

    def codes(self, name: Sequence[str], format_: Format) -> Bytes | None:
        """The rounding of a weight that was fitted, see :meth:`Calibration.codes`.

        Args:
            name: The module's name; parameter and expert in a module of many.
            format_: The format.
        """
        module, *part = name
        return self.calibration.codes((module, ".".join(part), format_.weight_key))

    def unseen_half(self, format_: Format) -> int | None:
        """The half that roundings of a format were fitted without; None for other formats."""
        return self.calibration.unseen_half if needs_hessians(format_) else None

    def squares(self, name: Sequence[str], device: torch.device) -> torch.Tensor | None:
        """Mean square of every input channel of a weight, float32 ``(I,)``; None if not known.

        Args:
            name: The module's name; parameter and expert in a module of many.
            device: Where the weight is.
        """
        module, *part = name
        record = self.calibration.of(module)
        channels = record.experts.get(".".join(part)) if part else record.channels
        if channels is None or channels.square_sum_I is None:
            return None
        mean_I = channels.square_sum_I / channels.num_tokens
        return torch.from_numpy(mean_I).float().to(device, non_blocking=True)

    def factors(self, name: Sequence[str], format_: Format) -> torch.Tensor | None:
        """What the columns of a weight are multiplied with before it is rounded, float32 ``(I,)``.

        None under a format without, and for a linear that no token reached in calibration. All
        linears that read the same input must be in memory, as below.

        Args:
            name: The module's name; parameter and expert in a module of many.
            format_: The format.
        """
        if not takes_factors(format_):
            return None
        record = self.calibration.of(name[0])
        alpha = record.alphas.get(format_.name)
        if alpha is None or record.channels is None:
            return None
        fold = self.calibration.folds[name[0]]
        weights = [self._model.get_submodule(reader).weight for reader in fold.readers]
        mean_I = torch.from_numpy(record.channels.mean_I).to(weights[0].device)
        importance_I = shared_importance(weights, format_.weight)
        return shared_factors(fold, importance_I, mean_I, alpha)

    def largest(self, name: Sequence[str], format_: Format) -> torch.Tensor | None:
        """Largest absolute weight of the layers that share a scale with a layer, float32.

        None for other modules, and where the layer's own is as good.

        All of them must be in memory, as they are while their decoder layer is visited.

        Args:
            name: The module's name; parameter and expert in a module of many.
            format_: The format.
        """
        names = self._together(name, format_)
        if not names or (len(names) == 1 and not is_static_nvfp4(format_.weight)):
            return None
        if names not in self._largest:
            weights = (self._model.get_submodule(fused).weight for fused in names)
            maxima = [weight.detach().abs().amax().float() for weight in weights]
            self._largest[names] = torch.stack([m.to(maxima[0].device) for m in maxima]).amax()
        return self._largest[names]

    def shares_search(self, name: Sequence[str], format_: Format) -> bool:
        """Whether a search tries multiples of the one maximum of several layers."""
        is_alone = len(self._together(name, format_)) < 2 or is_static_nvfp4(format_.weight)
        return not is_alone and method_of(format_) in SEARCHES

    def searched_rows(
        self, name: Sequence[str], format_: Format, weight_OI: torch.Tensor
    ) -> torch.Tensor:
        """What a search measures its candidates on: the rows of all layers that share the scale.

        Args:
            name, format_: As above.
            weight_OI: The weight itself.
        """
        if not self.shares_search(name, format_):
            return weight_OI
        weights = [self._model.get_submodule(n).weight for n in self._together(name, format_)]
        return torch.cat([weight.detach().to(weight_OI) for weight in weights])

    def _together(self, name: Sequence[str], format_: Format) -> tuple[str, ...]:
        """Layers that share a scale with a layer; none for other modules and other formats."""
        if format_.has_shared_scale and not is_smoothed(format_):
            return self._fused.get(name[0], ())
        return self._by_modelopt.get(name[0], ()) if is_static_nvfp4(format_.weight) else ()


def _given(result: torch.Tensor, _search: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What was searched before."""
    return result


def _weighted_search(quantizer: Any, algorithm: Attributes, squares_I: torch.Tensor) -> ScaleSearch:
    """ModelOpt's search with the weighted error, in float32.

    Blocks none of whose channels was ever other than 0 are searched by plain squared error.
    """
    blocks = quantizer.block_sizes or {}
    size = blocks.get(-1) or len(squares_I)
    mean = squares_I.mean()
    relative_I = torch.where(mean > 0, squares_I / mean, 1.0).clamp(min=1e-12)
    padded_I = torch.nn.functional.pad(relative_I, (0, -len(squares_I) % size))

    def error(values: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        squared = (values - quantized).square_()
        return (squared.reshape(-1, len(padded_I)) * padded_I).reshape(values.shape)

    start, stop = algorithm["start_multiplier"], algorithm["stop_multiplier"]
    steps = num_multipliers(algorithm) - 1
    search = ScaleSearch(
        quantizer,
        error=error,
        step_size=(stop - start) / (steps - 0.5) if steps else 1.0,  # ModelOpt rounds up
        start_multiplier=start,
        stop_multiplier=stop,
        fp8_scale_sweep=False,
    )
    return search.in_float32()


def _least_weighted(search: ScaleSearch, rows: Rows) -> torch.Tensor:
    """Numbers of the best candidates, uint8, the first of equals."""
    search.best(rows().float())
    return torch.stack(search.losses).argmin(dim=0).to(torch.uint8)


def _least_squared(search: ScaleSearch, rows: Rows) -> torch.Tensor:
    """Numbers of the best candidates, uint8; the maxima themselves where these are none of the
    candidates to the last bit (on CUDA, ModelOpt has another kernel for some)."""
    best = search.best(rows())
    numbers = torch.zeros_like(best, dtype=torch.long)
    is_numbered = torch.zeros_like(best, dtype=torch.bool)
    for number in range(search.num_candidates(best.device)):
        is_this = search.maxima(torch.full_like(numbers, number)).to(best.dtype) == best
        numbers[is_this], is_numbered = number, is_numbered | is_this
    return numbers.to(torch.uint8) if bool(is_numbered.all()) else best
