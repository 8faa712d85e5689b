"""Weight scales by least squared error: ModelOpt's algorithm ``mse``; remembering what it found.

ModelOpt's own calibrators try the candidates. A search quantizes a weight once per candidate, so
its result is kept in a compact form: the number of the candidate per scale, one byte each. The
scales are always formed from these numbers, so it makes no difference whether they were kept.
"""

from __future__ import annotations

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

from autoquant_ray.algorithms import ARGUMENTS, MSE
from autoquant_ray.formats import Attributes

Recall = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
"""Gives the kept result of a search, or runs the search and keeps its result."""

KEPT_BYTES = 256 * 2**20
"""Room for the results of searches: one of 16 billion weights in blocks of 64."""


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
    if quantizer.is_static_block_quant:  # as max_calibrate ends: maxima of blocks in float32
        StaticBlockScaleQuantizer.from_tensor_quantizer(quantizer)
    calibrator: Any = _make_weight_mse_calibrator(
        quantizer, **{name: algorithm[name] for name in ARGUMENTS[MSE]}
    )
    search = partial(_search, quantizer, weight_OI, calibrator)
    found = search() if recall is None else recall(search)
    is_numbers = found.dtype == torch.uint8
    quantizer.amax = _maxima(calibrator, found.long()) if is_numbers else found


def _search(quantizer: Any, weight_OI: torch.Tensor, calibrator: Any) -> torch.Tensor:
    """Numbers of the best candidates, uint8; the maxima themselves where these are none of the
    candidates to the last bit (on CUDA, ModelOpt has another kernel for some)."""
    largest = quantizer.amax.clone()
    quantizer._calibrator = calibrator
    _run_and_load_max_stats(quantizer, partial(_collect_weight_stats, weight=weight_OI))
    best = quantizer.amax
    numbers = torch.zeros_like(best, dtype=torch.long)
    is_found = torch.zeros_like(best, dtype=torch.bool)
    for number in range(len(calibrator._generate_candidates(best.device))):
        is_this = _maxima(calibrator, torch.full_like(numbers, number)).to(best.dtype) == best
        numbers[is_this], is_found = number, is_found | is_this
    quantizer.amax = largest
    return numbers.to(torch.uint8) if bool(is_found.all()) else best.clone()


def _maxima(calibrator: Any, numbers: torch.Tensor) -> torch.Tensor:
    """``maximum * candidate``, as ModelOpt's calibrators form it."""
    candidates = calibrator._generate_candidates(numbers.device)
    maxima: torch.Tensor = calibrator._compute_candidate_amax(candidates[numbers])
    return maxima
