"""Weight scales by least squared error (ModelOpt's algorithm ``mse``), and a memory of results.

ModelOpt's own calibrators try the candidates. A search quantizes a weight once per candidate, so
its result is kept in a compact form: the number of the candidate per scale, one byte each. The
scales are always formed from these numbers, so it makes no difference whether they were kept.

ModelOpt quantizes static NVFP4 weights of fused layers under one scale, and finds these layers by
their names. A weight alone does not show it: :class:`WeightScales` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from modelopt.torch.quantization.model_calib import (
    _collect_weight_stats,
    _make_weight_mse_calibrator,
    _run_and_load_max_stats,
)
from modelopt.torch.quantization.nn.modules.tensor_quantizer import StaticBlockScaleQuantizer
from modelopt.torch.quantization.utils import SHARED_PATTERNS

from autoquant_ray.formats.algorithms import ARGUMENTS, MSE, SEARCHED_BYTES
from autoquant_ray.formats.format import Attributes
from autoquant_ray.quantize.block_formats import StaticBlocksOnCpu
from autoquant_ray.quantize.weight_cache import WeightCache

Recall = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
"""Gives the kept result of a search, or runs the search and keeps its result."""


def search_scales(
    quantizer: Any, weight_OI: torch.Tensor, algorithm: Attributes, recall: Recall | None
) -> None:
    """Replace a quantizer's maxima by those under which its weight changes least.

    Args:
        quantizer: ModelOpt's, calibrated by maximum.
        weight_OI: Its weight.
        algorithm: ModelOpt's ``mse`` with all its arguments.
        recall: Remembers; None searches anew.
    """
    calibrator: Any = _make_weight_mse_calibrator(
        quantizer, **{name: algorithm[name] for name in ARGUMENTS[MSE]}
    )
    search = partial(_search, quantizer, weight_OI, calibrator)
    result = search() if recall is None else recall(search)
    is_numbers = result.dtype == torch.uint8
    quantizer.amax = _maxima(calibrator, result.long()) if is_numbers else result


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
    kind = StaticBlockScaleQuantizer if weight_OI.is_cuda else StaticBlocksOnCpu
    kind.from_tensor_quantizer(quantizer, global_amax=largest.to(weight_OI.device))


class WeightScales:
    """What the scales of a model's weights are made from, beside each weight itself.

    Args:
        model: The model.

    Attributes:
        searched: Keeps the results of searches.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.searched = WeightCache(SEARCHED_BYTES)
        self._model = model
        self._largest: dict[tuple[str, ...], torch.Tensor] = {}
        fused: dict[Any, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                matches = (re.fullmatch(pattern, name) for pattern in SHARED_PATTERNS)
                keys = [(n, match.groups()) for n, match in enumerate(matches) if match]
                fused.setdefault(keys[0] if keys else name, []).append(name)
        self._fused = {name: tuple(names) for names in fused.values() for name in names}

    def largest(self, name: str) -> torch.Tensor | None:
        """Largest absolute weight of the layers that serving engines fuse with a layer, float32.

        ModelOpt finds these layers by their names. None for other modules.

        All of them must be in memory, as they are while their decoder layer is visited.
        """
        names = self._fused.get(name)
        if names is None:
            return None
        if names not in self._largest:
            weights = (self._model.get_submodule(fused).weight for fused in names)
            maxima = [weight.detach().abs().amax().float().cpu() for weight in weights]
            self._largest[names] = torch.stack(maxima).amax()
        return self._largest[names]


def _search(quantizer: Any, weight_OI: torch.Tensor, calibrator: Any) -> torch.Tensor:
    """Numbers of the best candidates, uint8; the maxima themselves where these are none of the
    candidates to the last bit (on CUDA, ModelOpt has another kernel for some)."""
    largest = quantizer.amax.clone()
    quantizer._calibrator = calibrator
    _run_and_load_max_stats(quantizer, partial(_collect_weight_stats, weight=weight_OI))
    best = quantizer.amax
    numbers = torch.zeros_like(best, dtype=torch.long)
    is_numbered = torch.zeros_like(best, dtype=torch.bool)
    for number in range(len(calibrator._generate_candidates(best.device))):
        is_this = _maxima(calibrator, torch.full_like(numbers, number)).to(best.dtype) == best
        numbers[is_this], is_numbered = number, is_numbered | is_this
    quantizer.amax = largest
    return numbers.to(torch.uint8) if bool(is_numbered.all()) else best.clone()


def _maxima(calibrator: Any, numbers: torch.Tensor) -> torch.Tensor:
    """``maximum * candidate``, as ModelOpt's calibrators form it."""
    candidates = calibrator._generate_candidates(numbers.device)
    maxima: torch.Tensor = calibrator._compute_candidate_amax(candidates[numbers])
    return maxima
