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


class LayerFitting:
    """Fits the weights of one layer at a time.

    Args:
        model: The model.
        residence: Brings the weights of decoder layers to the device.
        layers: Its decoder layers.
        modules: Searched modules.
        formats: The menu; a module without a format that fits its scales is left alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        residence: Residence,
        layers: Sequence[torch.nn.Module],
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
    ) -> None:
        self._residence = residence
        self._num_layers = len(layers)
        self._scales = WeightScales(model)
        inside = {module: n for n, layer in enumerate(layers) for module in layer.modules()}
        self._by_layer: dict[int, list[tuple[PlannedModule, Any, list[Format]]]] = {}
        for scored in modules:
            wanted = {f.weight_key: f for f in scored.menu(formats) if needs_channel_squares(f)}
            module = model.get_submodule(scored.planned.path)
            if wanted:
                number = inside.get(module, len(layers))
                entry = (scored.planned, module, list(wanted.values()))
                self._by_layer.setdefault(number, []).append(entry)

    @torch.no_grad()
    def fit(self, number: int, calibration: Calibration) -> Rounding:
        """Scales of the weights in a layer, under every format that fits them.

        Args:
            number: The layer; the number of layers stands for what is outside of them.
            calibration: Merged over all shards.
        """
        self._scales.calibration = calibration
        is_layer = number < self._num_layers
        rounding = {}
        with self._residence.visit(number, None) if is_layer else nullcontext():
            for planned, module, formats in self._by_layer.get(number, []):
                for part, weight in _weights(planned, module):
                    for format_ in formats:
                        fitted = fit_weight(format_, weight, self._scales, planned.path, *part)
                        if fitted is not None:
                            rounding[planned.path, ".".join(part), format_.weight_key] = fitted
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
