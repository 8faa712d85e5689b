"""A solution as it was measured: the model with the quantizers that ``evaluate`` runs.

Shape letters: W windows of text, S tokens of a window, T rows of inputs, I in features, O out
features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoquant_ray.calibrate.files import calibration_of
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.export.names import stored_linears
from autoquant_ray.export.source import Source
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.modelopt_api import prepare_experts
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.quantize.modules import UNQUANTIZED, QuantizedLayers
from autoquant_ray.quantize.quantizers import make_input_quantizer, quantized_weight
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.quantize.weight_search import WeightScales

Array = np.ndarray[Any, Any]


@contextmanager
def planned_model(source: Source, moved: float = 0.0) -> Iterator[Any]:
    """The run's model under a solution, as ``evaluate`` quantizes it; nothing is in 16 bits.

    Args:
        source: The solution.
        moved: Weights that are not quantized change by this relative amount, at random.
    """
    scan = ScanConfig.model_validate(source.state.record.config)
    model: Any = load_model(find_model(scan.model), dtype=scan.dtype, device="cpu")
    prepare_experts(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and source.owner(name) is None:
                parameter *= 1 + moved * torch.randn_like(parameter)
    menu = resolve_formats(scan.formats, device="cpu", custom=scan.custom_formats)
    modules = scored_modules(build_plan(model, menu, scan.disable))
    index = {format_.name: number for number, format_ in enumerate(menu)}
    chosen = {
        scored.group: index[source.formats[scored.planned.name].name]
        if scored.planned.name in source.formats
        else UNQUANTIZED
        for scored in modules
    }
    choice = tuple(chosen[group] for group in sorted(chosen))
    layers = QuantizedLayers(model, [], modules, menu, calibration_of(source.state))
    with layers.quantized(0, choice, WeightCache(2**40)), torch.no_grad():
        yield model


@dataclass(frozen=True, kw_only=True)
class ExpertLinear:
    """A linear of an expert, as the model's files have it, under the format of its layer.

    Attributes:
        format: That of the layer's experts; None in 16 bits.
        weight_OI: As it was loaded.
        quantized_OI: Under the format.
        quantizer: Of its inputs; None: they stay.
        place: Where it is in memory: ``module``, ``parameter``, ``number`` of the expert, and
            ``first`` of its rows.
    """

    format: Format | None
    weight_OI: torch.Tensor
    quantized_OI: torch.Tensor
    quantizer: Any
    place: dict[str, Any]

    def __call__(self, states_TI: torch.Tensor) -> torch.Tensor:
        """``(T, O)``."""
        quantized_TI = states_TI if self.quantizer is None else self.quantizer(states_TI)
        return torch.nn.functional.linear(quantized_TI, self.quantized_OI)


def expert_linears(model: Any, source: Source) -> Iterator[tuple[str, ExpertLinear]]:
    """The linears of all routed experts by their names in files.

    Args:
        model: From :func:`planned_model`.
        source: The solution.
    """
    calibration = calibration_of(source.state)
    scales = WeightScales(model, calibration)
    for module, linears in stored_linears(model, source).items():
        format_, maxima = source.formats.get(module), calibration.of(module).maxima
        for (parameter, expert), members in itertools.groupby(linears, lambda m: m[1:3]):
            weight_OI = quantized_OI = getattr(model.get_submodule(module), parameter)[expert]
            quantizer = None
            if format_ is not None:
                key = module, parameter, str(expert)
                quantized_OI = quantized_weight(format_, weight_OI, scales, *key)
                maximum = maxima.get(f"{parameter}_input_amax")
                quantizer = make_input_quantizer(format_.input, maximum, weight_OI[:0])
            place = {"module": module, "parameter": parameter, "number": expert}
            for linear in members:
                rows = slice(linear.first, linear.first + linear.num_rows)
                yield (
                    linear.name,
                    ExpertLinear(
                        format=format_,
                        weight_OI=weight_OI[rows],
                        quantized_OI=quantized_OI[rows],
                        quantizer=quantizer,
                        place=place | {"first": linear.first},
                    ),
                )


def window_logits(model: Any, ids_WS: Array) -> Array:
    """Logits of windows of tokens, ``(W, S, V)``."""
    with torch.no_grad():
        logits = [model(torch.from_numpy(row)[None]).logits[0] for row in ids_WS]
    return torch.stack(logits).float().numpy()


def text_log_probs(logits_WSV: Array, ids_WS: Array) -> Array:
    """Log-probabilities of each window's next tokens, ``(W, S - 1)``, in nats."""
    log_probs = torch.from_numpy(logits_WSV).double().log_softmax(-1)[:, :-1]
    following = torch.from_numpy(ids_WS)[:, 1:, None]
    return log_probs.gather(-1, following)[..., 0].numpy()
