"""Fits the scales of a layer's weights to the statistics of all shards, once for the whole run.

Every later use of the weight (scores, measurements, exports) takes what was found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import needs_channel_squares
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import Calibration, Rounding
from autoquant_ray.quantize.quantizers import fit_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.residence import Residence


@torch.no_grad()
def fit_layer(
    model: torch.nn.Module,
    residence: Residence,
    layers: Sequence[torch.nn.Module],
    modules: Sequence[ScoredModule],
    formats: Sequence[Format],
    number: int,
    calibration: Calibration,
) -> Rounding:
    """Scales of the weights in a layer, under every format that fits them.

    Args:
        model: The model.
        residence: Brings the layer's weights to the device.
        layers: Its decoder layers.
        modules: Searched modules.
        formats: The menu.
        number: The layer; the number of layers stands for what is outside of them.
        calibration: Merged over all shards.
    """
    inside = {module: n for n, layer in enumerate(layers) for module in layer.modules()}
    scales = WeightScales(model, calibration)
    rounding: dict[tuple[str, str, str], Any] = {}
    with residence.visit(number, None) if number < len(layers) else nullcontext():
        for scored in modules:
            module = model.get_submodule(scored.planned.path)
            if inside.get(module, len(layers)) != number:
                continue
            wanted = {f.weight_key: f for f in scored.menu(formats) if needs_channel_squares(f)}
            for part, weight in _weights(scored.planned, module) if wanted else ():
                for key, format_ in wanted.items():
                    fitted = fit_weight(format_, weight, scales, scored.planned.path, *part)
                    if fitted is not None:
                        rounding[scored.planned.path, ".".join(part), key] = fitted
    return rounding


def _weights(planned: PlannedModule, module: Any) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """The weights that have scales of their own: parameter and expert, and the weight."""
    if planned.kind == "linear":
        yield (), module.weight
        return
    for name in planned.parameters:
        weights = getattr(module, name)
        if planned.is_transposed:
            yield (name,), weights.mT.contiguous()
            continue
        experts = range(len(weights)) if planned.expert is None else [planned.expert]
        for expert in experts:
            yield (name, str(expert)), weights[expert]
