"""Fits scales and roundings of a layer's weights to all shards, once for the whole run.

Every later use of the weight (scores, measurements, exports) takes what was found here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import torch

from autoquant_ray.calibrate.hessians import HessianCollector, Hessians
from autoquant_ray.calibrate.portions import Block, Portion, blocks_of, smallest_portions
from autoquant_ray.distributed.host_memory import trim_heap
from autoquant_ray.distributed.scoring import LayerFit
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_fitted, needs_hessians, takes_factors
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.memory import MOMENT_BYTES
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import (
    Calibration,
    FittedWeight,
    FittedWeights,
    can_be_halved,
)
from autoquant_ray.quantize.gptq.fit import WeightToRound, dampings_of, fit_codes, weight_to_round
from autoquant_ray.quantize.grid import Grid
from autoquant_ray.quantize.quantizers import fit_weight, weight_grid
from autoquant_ray.quantize.second_moments import SecondMoments
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.residence import Residence


class _Entry(NamedTuple):
    """A module whose weights are fitted, and formats, the first of each that fit alike."""

    planned: PlannedModule
    module: Any
    formats: list[Format]

    @property
    def by_gptq(self) -> list[Format]:
        return [format_ for format_ in self.formats if needs_hessians(format_)]

    @property
    def searched(self) -> list[Format]:
        return [format_ for format_ in self.formats if not needs_hessians(format_)]


class _Rounding(NamedTuple):
    """A weight that GPTQ rounds under a format.

    Attributes:
        path: Of the module.
        part: Parameter and expert in a module of many.
        format: The format.
        weight_OI: The weight.
        moments: Of its input.
        grid: Of an expert that shares a quantizer; None for others.
    """

    path: str
    part: tuple[str, ...]
    format: Format
    weight_OI: torch.Tensor
    moments: SecondMoments
    grid: Grid | None = None


class LayerFitting:
    """Fits the weights of one layer at a time.

    Args:
        model: The model.
        residence: Brings the weights of decoder layers to the device.
        layers: Its decoder layers.
        modules: Searched modules.
        formats: The menu; a module without a format that is fitted is left alone.
        min_expert_tokens: Routed experts that saw fewer keep plain rounding where GPTQ would round.
        room: Bytes of second moments in memory; a single linear or expert may need more.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        residence: Residence,
        layers: Sequence[torch.nn.Module],
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
        *,
        min_expert_tokens: int = 0,
        room: int = MOMENT_BYTES,
    ) -> None:
        self._residence = residence
        self._min_expert_tokens = min_expert_tokens
        self._room = room
        self._num_layers = len(layers)
        self._scales = WeightScales(model)
        inside = {module: n for n, layer in enumerate(layers) for module in layer.modules()}
        self._by_layer: dict[int, list[_Entry]] = {}
        for scored in modules:
            wanted = {f.weight_key: f for f in scored.menu(formats) if is_fitted(f)}
            module = model.get_submodule(scored.planned.path)
            if wanted:
                number = inside.get(module, len(layers))
                entry = _Entry(scored.planned, module, list(wanted.values()))
                self._by_layer.setdefault(number, []).append(entry)

    @torch.no_grad()
    def fit(
        self,
        layers: Sequence[int],
        calibration: Calibration,
        collect: Callable[[Block], HessianCollector],
    ) -> dict[int, LayerFit]:
        """What is fitted to the weights in some layers, by the number of the layer.

        Args:
            layers: In order; the number of layers stands for what is outside of them.
            calibration: Merged over all shards.
            collect: Sums second moments for a block over all shards.
        """
        self._scales.calibration = calibration
        rounding = {layer: self._searched(layer) for layer in layers}
        tokens: dict[int, dict[str, Sequence[int]]] = {layer: {} for layer in layers}
        for block in blocks_of(self._portions(layers), self._room):
            hessians = self._hessians(block, collect, tokens)
            for layer, portions in groupby(block, key=lambda portion: portion.layer):
                with self._visit(layer):
                    rounding[layer].update(self._rounded(list(portions), hessians))
            del hessians  # before the next pass makes others
            trim_heap()  # matrices of several sizes leave no room for each other
        return {
            layer: LayerFit(
                rounding=self._in_order(layer, rounding[layer]), expert_tokens=tokens[layer]
            )
            for layer in layers
        }

    def _portions(self, layers: Sequence[int]) -> Iterator[Portion]:
        """What GPTQ rounds in layers."""
        for layer in layers:
            for entry in self._by_layer.get(layer, []):
                if entry.by_gptq:
                    yield from smallest_portions(layer, entry.planned, entry.module, entry.by_gptq)

    def _hessians(
        self,
        block: Block,
        collect: Callable[[Block], HessianCollector],
        tokens: Mapping[int, dict[str, Sequence[int]]],
    ) -> Hessians:
        """Those of a block, without experts that saw few tokens; counts the tokens of experts."""
        collector = collect(block)
        hessians = collector.moments()
        for portion in block:
            for weight, expert in portion.weights():
                if expert is not None:
                    seen = tokens[portion.layer][expert] = collector.num_tokens(weight)
                    if not can_be_halved(seen, self._min_expert_tokens):
                        hessians.pop(weight, None)
        return hessians

    def _searched(self, number: int) -> dict[tuple[str, str, str], FittedWeight]:
        """The scales of the weights in a layer, under every format that searches them."""
        entries = [entry for entry in self._by_layer.get(number, []) if entry.searched]
        rounding = {}
        with self._visit(number) if entries else nullcontext():
            for entry in entries:
                path = entry.planned.path
                for part, weight in _weights(entry.planned, entry.module):
                    for format_ in entry.searched:
                        numbers = fit_weight(format_, weight, self._scales, path, *part)
                        if numbers is not None:
                            key = (path, ".".join(part), format_.weight_key)
                            rounding[key] = FittedWeight(multipliers=numbers)
        return rounding

    def _rounded(
        self, portions: Sequence[Portion], hessians: Hessians
    ) -> dict[tuple[str, str, str], FittedWeight]:
        """The roundings of the weights of portions; weights without moments have none.

        Weights with the same input are rounded together, each under all of its formats.
        """
        alike: dict[Hashable, list[_Rounding]] = {}
        for portion in portions:
            for rounding in self._roundings(portion, hessians):
                factors = rounding.format.name if takes_factors(rounding.format) else ""
                alike.setdefault((rounding.moments.key, factors), []).append(rounding)
        fitted: dict[tuple[str, str, str], FittedWeight] = {}
        for roundings in alike.values():
            fitted.update(self._rounded_together(roundings))
            roundings[0].moments.drop_factors()  # no other input has any use for them
        return fitted

    def _rounded_together(
        self, roundings: Sequence[_Rounding]
    ) -> Iterator[tuple[tuple[str, str, str], FittedWeight]]:
        """Keys and roundings of weights with the same input; without those that keep plain ones."""
        singles: dict[tuple[str, ...], torch.Tensor] = {}
        inputs: dict[Hashable, tuple[SecondMoments, list[Any], list[WeightToRound]]] = {}
        for path, part, format_, weight_OI, moments, grid in roundings:
            name = (path, *part)
            if name not in singles:
                singles[name] = weight_OI.float()
            weight = WeightToRound(singles[name], grid, dampings_of(format_)) if grid else None
            if weight is None:
                weight, moments = weight_to_round(
                    format_, weight_OI, singles[name], moments, self._scales, *name
                )
            _, keys, weights = inputs.setdefault(moments.key, (moments, [], []))
            keys.append((path, ".".join(part), format_.weight_key))
            weights.append(weight)
        for moments, keys, weights in inputs.values():
            for key, codes in zip(keys, fit_codes(weights, moments), strict=True):
                if codes is not None:
                    yield key, FittedWeight(codes=codes)

    def _in_order(self, number: int, rounding: FittedWeights) -> FittedWeights:
        """What was fitted in a layer, in an order that blocks do not change."""
        keys = (
            (entry.planned.path, part, format_.weight_key)
            for entry in self._by_layer.get(number, [])
            for part in _parts(entry.planned)
            for format_ in entry.formats
        )
        return {key: rounding[key] for key in keys if key in rounding}

    def _roundings(self, portion: Portion, hessians: Hessians) -> Iterator[_Rounding]:
        """What is to be rounded in a portion."""
        path, formats, module = portion.planned.path, portion.formats, portion.module
        if portion.planned.kind == "linear":
            for format_ in formats if path in hessians else ():
                yield _Rounding(path, (), format_, module.weight, hessians[path])
            return
        for name in portion.planned.parameters:
            weights: torch.Tensor = getattr(module, name)
            grids: dict[str, Grid] = {}
            seen = {n: hessians.get(f"{path}.{name}.{n}") for n in portion.experts}
            if portion.planned.is_transposed and any(seen.values()):  # they share a quantizer
                weights = weights.mT.contiguous()
                for format_ in formats:
                    grid = weight_grid(format_, weights, self._scales, path, name)
                    grids[format_.weight_key] = grid
            for n, moments in seen.items():
                for format_ in formats if moments is not None else ():
                    assert moments is not None
                    grid = grids[format_.weight_key].of_slice(n) if grids else None
                    yield _Rounding(path, (name, str(n)), format_, weights[n], moments, grid)

    def _visit(self, number: int) -> AbstractContextManager[None]:
        is_layer = number < self._num_layers
        return self._residence.visit(number, None) if is_layer else nullcontext()


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


def _parts(planned: PlannedModule) -> Iterator[str]:
    """All parts to which something may be fitted, see ``FittedWeights``."""
    if planned.kind == "linear":
        yield ""
        return
    for name in planned.parameters:
        if planned.is_transposed:
            yield name
        experts = range(planned.shapes[0][0]) if planned.expert is None else [planned.expert]
        yield from (f"{name}.{expert}" for expert in experts)
