"""Fits scales and roundings of a layer's weights to all shards, once for the whole run.

Every later use of the weight (scores, measurements, exports) takes what was found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from autoquant_ray.calibrate.hessians import Hessians
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_fitted, needs_hessians
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.memory import MOMENT_BYTES
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import NUM_HALVES, Calibration, FittedWeight, FittedWeights
from autoquant_ray.quantize.quantizers import fit_rounding, fit_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.residence import Residence


class LayerFitting:
    """Fits the weights of one layer at a time.

    Args:
        model: The model.
        residence: Brings the weights of decoder layers to the device.
        layers: Its decoder layers.
        modules: Searched modules.
        formats: The menu; a module without a format that is fitted is left alone.
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
            wanted = {f.weight_key: f for f in scored.menu(formats) if is_fitted(f)}
            module = model.get_submodule(scored.planned.path)
            if wanted:
                number = inside.get(module, len(layers))
                entry = (scored.planned, module, list(wanted.values()))
                self._by_layer.setdefault(number, []).append(entry)

    def linears(self, number: int) -> dict[str, Any]:
        """The linears in a layer whose rounding is fitted to second moments of their inputs.

        Args:
            number: The layer; the number of layers stands for what is outside of them.
        """
        return {
            planned.name: module
            for planned, module, formats in self._by_layer.get(number, [])
            if planned.kind == "linear" and any(map(needs_hessians, formats))
        }

    def blocks(self, layers: Sequence[int]) -> list[list[int]]:
        """Layers whose second moments are in memory together: 1 GiB at most, or one layer.

        Args:
            layers: In order.
        """
        blocks: list[list[int]] = []
        room = 0
        for layer in layers:
            widths = (module.in_features for module in self.linears(layer).values())
            size = sum(NUM_HALVES * 4 * width**2 for width in widths)
            if not blocks or size > room:
                blocks.append([])
                room = MOMENT_BYTES
            blocks[-1].append(layer)
            room -= size
        return blocks

    @torch.no_grad()
    def fit(self, number: int, calibration: Calibration, hessians: Hessians) -> FittedWeights:
        """What is fitted to the weights in a layer, under every format that fits.

        Args:
            number: The layer; the number of layers stands for what is outside of them.
            calibration: Merged over all shards.
            hessians: Of the linears in it.
        """
        self._scales.calibration = calibration
        is_layer = number < self._num_layers
        rounding = {}
        with self._residence.visit(number, None) if is_layer else nullcontext():
            for planned, module, formats in self._by_layer.get(number, []):
                for part, weight in _weights(planned, module):
                    for format_ in formats:
                        fitted = self._fitted(format_, weight, hessians, planned.path, *part)
                        if fitted is not None:
                            rounding[planned.path, ".".join(part), format_.weight_key] = fitted
        return rounding

    def _fitted(
        self, format_: Format, weight: torch.Tensor, hessians: Hessians, *name: str
    ) -> FittedWeight | None:
        if not needs_hessians(format_):
            multipliers = fit_weight(format_, weight, self._scales, *name)
            return None if multipliers is None else FittedWeight(multipliers=multipliers)
        moments = hessians.get(name[0]) if len(name) == 1 else None
        if moments is None:
            return None
        codes = fit_rounding(format_, weight, moments, self._scales, *name)
        return None if codes is None else FittedWeight(codes=codes)


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
