"""An allocation runner on the model of a scorer, and the same allocations by ``mtq.quantize``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.evaluate.allocation_search import Measure
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.evaluate.table import Measured
from autoquant_ray.models.find import ModelRef
from autoquant_ray.quantize.modules import UNQUANTIZED, FormatNumbers


def make_evaluation(prepared: Any, samples: list[list[int]], **changes: Any) -> AllocationRunner:
    """A runner on the model of a scorer, calibrated on the samples; keywords replace fields."""
    spec = prepared.scorer.spec
    if "calibration" not in changes:
        changes["calibration"] = prepared.scorer.calibrate(samples)
    fields: dict[str, Any] = {
        "model": ModelRef(name="in memory", path="unused"),
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "modules": spec.modules,
        "formats": spec.formats,
        "step_tokens": 60,
    }
    return AllocationRunner(EvaluationSpec(**(fields | changes)), model=prepared.model)


def measured_as(loss: Callable[[Mapping[str, str]], float]) -> Measure:
    """Measures allocations exactly: four shards of two tokens, all with the loss of the formats."""

    def measure(candidates: Sequence[Candidate], _shards: Sequence[int]) -> list[Measured]:
        return [
            Measured(
                kl_N=np.full(8, loss(candidate.formats)),
                kl_S=np.full(4, 2 * loss(candidate.formats)),
                loss=0.0,
                reference_loss=0.0,
                num_agreeing=0,
                tokens_S=np.full(4, 2.0),
            )
            for candidate in candidates
        ]

    return measure


def random_choices(
    num_groups: int, number: int, seed: int = 0, num_formats: int = 3
) -> list[FormatNumbers]:
    """Allocations with every format and 16 bits in them."""
    drawn = np.random.default_rng(seed).integers(UNQUANTIZED, num_formats, (number, num_groups))
    return [tuple(int(index) for index in row) for row in drawn]


def quantize(prepared: Any, choice: FormatNumbers, samples: list[list[int]]) -> Any:
    """The model as ``mtq.quantize`` makes it, calibrated by itself on the samples."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for group, index in zip(prepared.plan.searched, choice, strict=True):
        if index == UNQUANTIZED:
            continue
        for module in group.modules:
            for prefix in module.quantizer_prefixes:
                name = f"{module.name}.{prefix}"
                entries += quantizer_entries(name, prepared.plan.formats[index])

    def forward_loop(model: Any) -> None:
        for sample in samples:
            model(input_ids=torch.tensor([sample]), use_cache=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mtq.quantize(
            copy.deepcopy(prepared.model), {"quant_cfg": entries, "algorithm": "max"}, forward_loop
        )
