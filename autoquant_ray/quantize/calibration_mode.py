"""A calibration mode of ModelOpt's for plans whose layers are calibrated by different algorithms.

An ``algorithm`` of ModelOpt's applies to every enabled quantizer: ``awq_lite`` or ``mse`` would
also touch layers whose format is plain ``max``. :data:`~autoquant_ray.formats.algorithms.SETS` is
registered with ModelOpt when this module is imported. It takes sets of quantizers and runs
ModelOpt's own calibration of one set after another, while the quantizers of all others are
disabled; at the end all are enabled. ``weighted`` and ``awq``, which ModelOpt does not have, take
statistics of input channels from the forward loop. The factors of ``awq`` are folded into the model
when all else is done: what is left is a model without any.

Where the algorithm names a run, all that was fitted to the weights is taken from its files instead,
and so are the maxima of inputs (:data:`READERS`). ``gptq`` needs that: a forward loop does not
repeat it.

Weights that share a scale with the layers that engines fuse with theirs (``shared``) get it right
after they were calibrated by their maxima; a search follows, on all rows of such layers together.

Each set sees the inputs of the unquantized model. Algorithms that scale weights (``smoothquant``,
``awq_lite``) run last, and until the last of them has run, their layers get the original weights
back, because ``W s (x / s)`` is ``W x`` only up to rounding.

On CPU, where ModelOpt's quantizer of static NVFP4 weights cannot run, it is replaced by
:class:`~autoquant_ray.quantize.backends.block_formats.StaticBlocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

import torch
from pydantic import Field

from autoquant_ray.formats.algorithms import AWQ, BY_COLUMNS, FITTED, MAX, MSE, SETS, WEIGHTED
from autoquant_ray.formats.format import Attributes
from autoquant_ray.modelopt_api import (
    QuantizeAlgorithmConfig,
    SharedWeightGlobalAmaxState,
    TensorQuantizer,
    calibrate,
    enable_weight_access_and_writeback,
    is_quantized_linear,
    iter_shared_quant_states,
    mutates_weights,
    normal_quantizer_name,
    register_calibration,
    set_quantizer_by_cfg_context,
    switch_input_scaling,
)
from autoquant_ray.quantize.backends.block_formats import StaticBlocks
from autoquant_ray.quantize.input_factors import InputFactors
from autoquant_ray.quantize.input_squares import InputSquares
from autoquant_ray.quantize.weight_search import search_scales, set_common_maximum
from autoquant_ray.serving.shared_scales import fused_layers

Algorithm = str | dict[str, Any]
_ALL_OFF: Any = [{"quantizer_name": "*", "enable": False}]


class Fits(Protocol):
    """What a run fitted to the weights of a solution."""

    def require_match(self, model: Any) -> None:
        """Refuse a model with other weights."""

    def put_into(self, model: Any) -> None:
        """Set weights and maxima of a model that is calibrated by maximum."""


READERS: dict[str, Callable[[str, str], Fits]] = {}
"""Mode -> what reads the fits of a run and its solution: runs are read on a higher floor
(:mod:`autoquant_ray.calibrate.solution_fits`, which puts itself here)."""

ForwardLoop = Callable[[Any], Any]
Quantizers = dict[str, TensorQuantizer]


class SetsCalibConfig(QuantizeAlgorithmConfig):
    """Arguments of the mode."""

    method: Literal["autoquant_ray_sets"] = SETS
    sets: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Each has an algorithm of ModelOpt's and the names of its quantizers.",
    )
    others: Algorithm = Field(default=MAX, description="Algorithm of quantizers in no set.")
    run: str = Field(default="", description="Run whose fits are taken; '' fits anew.")
    solution: str = Field(default="", description="Its solution; '' for the scan's own.")
    shared: list[str] = Field(
        default_factory=list,
        description="Weight quantizers that have one scale with all layers that engines fuse.",
    )


@torch.no_grad()
def calibrate_sets(
    model: Any,
    forward_loop: ForwardLoop | None = None,
    sets: Sequence[Mapping[str, Any]] = (),
    others: Algorithm = MAX,
    run: str = "",
    solution: str = "",
    shared: Sequence[str] = (),
) -> None:
    """Calibrate sets of quantizers, each by its own algorithm.

    Args:
        model: Its quantizers are there and configured.
        forward_loop: Runs the model on calibration data.
        sets: ``algorithm`` and ``quantizers``: names as in a ``quant_cfg`` without wildcards.
        others: Algorithm of the rest.
        run: Whose fits are taken; '' fits anew.
        solution: Of the run.
        shared: Weight quantizers that have one scale with all layers that engines fuse with theirs.

    Raises:
        ValueError: A set names no quantizer that is enabled, or the model is not that of the run.
    """
    fits = _read_fits(run, solution) if run else None
    if fits is not None:
        fits.require_match(model)
        sets = [set_ for set_ in sets if _method(set_["algorithm"]) not in FITTED]
    quantizers: Quantizers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }
    for quantizer in quantizers.values():
        if quantizer.is_nvfp4_static and next(model.parameters()).device.type == "cpu":
            StaticBlocks.from_tensor_quantizer(quantizer)
    factors: list[InputFactors] = []
    calibrate_part = partial(_calibrate, model, forward_loop, factors, _SharedScales(model, shared))
    for quantizer, is_enabled in _calibrate_parts(
        model, calibrate_part, quantizers, _parts(quantizers, sets, others)
    ):
        if is_enabled:
            quantizer.enable()
        else:
            quantizer.disable()
    for inputs in factors:
        inputs.fold()
    if fits is not None:
        fits.put_into(model)
    for state in iter_shared_quant_states(model, SharedWeightGlobalAmaxState):
        state.restore_from_members()  # later sets computed it anew, from maxima after a search


def _read_fits(run: str, solution: str) -> Fits:
    if SETS not in READERS:
        raise ValueError(
            f"the algorithm takes what the run {run} fitted, and nothing reads it yet; get the "
            "config from autoquant_ray.load_quantization_config"
        )
    return READERS[SETS](run, solution)


def _calibrate_parts(
    model: Any,
    calibrate_part: Callable[[Algorithm], None],
    quantizers: Quantizers,
    parts: Sequence[tuple[Algorithm, Quantizers]],
) -> list[tuple[TensorQuantizer, bool]]:
    """Calibrate sets in order; returns quantizers, all disabled, and whether each was enabled."""
    last = parts[-1][1] if parts else {}
    results: list[tuple[TensorQuantizer, bool]] = []
    aside: list[_SetAside] = []
    for algorithm, members in parts:
        kept = _SetAside(model, members) if _scales(algorithm) and members is not last else None
        with _only(quantizers, members):
            calibrate_part(algorithm)
            results += [(quantizer, quantizer.is_enabled) for quantizer in members.values()]
        if kept is not None:
            kept.swap()
            aside.append(kept)
    for kept in aside:
        kept.swap()
    return results


def _parts(
    quantizers: Quantizers, sets: Sequence[Mapping[str, Any]], others: Algorithm
) -> list[tuple[Algorithm, Quantizers]]:
    """Algorithms with their quantizers; those that scale weights come last."""
    normal_names = {name: normal_quantizer_name(name) for name in quantizers}
    rest = dict(quantizers)
    parts: list[tuple[Algorithm, Quantizers]] = []
    for set_ in sets:
        wanted = set(set_["quantizers"])
        members = {
            name: rest.pop(name)
            for name, normal in normal_names.items()
            if name in rest and not wanted.isdisjoint((name, normal))
        }
        if not members:
            raise ValueError(
                f"the set of {set_['algorithm']} names no enabled quantizer of the model "
                f"(its first: {next(iter(set_['quantizers']), None)})"
            )
        parts.append((set_["algorithm"], members))
    if rest:
        parts.append((others, rest))
    return sorted(parts, key=lambda part: _scales(part[0]))


def _scales(algorithm: Algorithm) -> bool:
    """Whether an algorithm changes weights."""
    return _method(algorithm) not in FITTED and mutates_weights(algorithm)


def _method(algorithm: Algorithm) -> str:
    return str(algorithm["method"]) if isinstance(algorithm, Mapping) else algorithm


def _calibrate(
    model: Any,
    forward_loop: ForwardLoop | None,
    factors: list[InputFactors],
    shared: _SharedScales,
    algorithm: Algorithm,
) -> None:
    """What ``mtq.calibrate`` does; ``weighted``: by maximum, then by the search; ``awq``: by
    maximum, and appends to the factors, which are folded later."""
    again = partial(_calibrate, model, forward_loop, factors, shared)
    if isinstance(algorithm, dict) and _method(algorithm) in BY_COLUMNS:
        raise ValueError(
            f"{_method(algorithm)} rounds weights to the calibration data of the scan, which "
            "mtq.quantize does not have; get the config from the run, "
            "load_quantization_config('RUN'), which takes its rounding, or solve it without that "
            "method"
        )
    if isinstance(algorithm, dict) and _method(algorithm) == WEIGHTED:
        squares = InputSquares(model)
        with squares.collecting():
            again(MAX)
        squares.search(algorithm, shared.rows)
        return
    if isinstance(algorithm, dict) and _method(algorithm) == AWQ:
        inputs = InputFactors(model, algorithm)
        with inputs.collecting():
            again(MAX)
        with inputs.searching(), set_quantizer_by_cfg_context(model, _ALL_OFF):
            if forward_loop is not None:
                forward_loop(model)
        factors.append(inputs)
        return
    if isinstance(algorithm, dict) and _method(algorithm) == MSE and shared.enabled:
        again(MAX)
        shared.search(algorithm)
        with shared.put_aside():
            again(algorithm)
        return
    calibrate(model, algorithm, forward_loop)
    shared.set_maxima()


class _SharedScales:
    """Scales that weights have in common with all layers that engines fuse with theirs."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        linears = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
        fused = fused_layers(linears if names else ())
        missing = [name for name in names if name not in modules]
        if missing:
            raise ValueError(f"{missing[0]} shares a scale, but the model has no such quantizer")
        self._model = model
        self._layers = {modules[name]: fused[name.rpartition(".")[0]] for name in names}
        self._largest: dict[tuple[str, ...], torch.Tensor] = {}

    @property
    def enabled(self) -> list[Any]:
        """Those of the quantizers that are calibrated now."""
        return [quantizer for quantizer in self._layers if quantizer.is_enabled]

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """While open, these quantizers are disabled."""
        members = self.enabled
        for quantizer in members:
            quantizer.disable()
        yield
        for quantizer in members:
            quantizer.enable()

    def set_maxima(self) -> None:
        """Give them the largest weight of all layers; they were calibrated by their own."""
        for quantizer in self.enabled:
            layers = self._layers[quantizer]
            if layers not in self._largest:
                maxima = [weight.abs().amax().float().cpu() for weight in self._weights(layers)]
                self._largest[layers] = torch.stack(maxima).amax()
            if quantizer.is_nvfp4_static:
                quantizer.global_amax = self._largest[layers].to(quantizer.amax.device)
            else:
                set_common_maximum(quantizer, self._largest[layers])

    def search(self, algorithm: Attributes) -> None:
        """Search their scales, from the common maxima.

        Args:
            algorithm: ``mse`` with its arguments.
        """
        for name, module in self._model.named_modules():
            quantizer: Any = getattr(module, "weight_quantizer", None)
            if quantizer in self._layers and quantizer.is_enabled:
                measured = partial(self.rows, quantizer, *self._weights([name]))
                search_scales(quantizer, measured, algorithm, None)

    def rows(self, quantizer: Any, weight_OI: torch.Tensor) -> torch.Tensor:
        """What a search measures its candidates on: of one common maximum, all layers together.

        Args:
            quantizer: Of a weight.
            weight_OI: The weight.
        """
        if quantizer not in self._layers or quantizer.is_nvfp4_static:
            return weight_OI
        return torch.cat(self._weights(self._layers[quantizer]))

    def _weights(self, layers: Sequence[str]) -> list[torch.Tensor]:
        weights = []
        for layer in layers:
            module = self._model.get_submodule(layer)
            with enable_weight_access_and_writeback(module, self._model):
                weights.append(module.weight.detach())
        return weights


@contextmanager
def _only(quantizers: Quantizers, members: Quantizers) -> Iterator[None]:
    """While open, only the members are enabled; afterwards none is."""
    for name, quantizer in quantizers.items():
        if name in members:
            quantizer.enable()
        else:
            quantizer.disable()
    yield
    for quantizer in members.values():
        quantizer.disable()


class _SetAside:
    """Scaled weights of some layers, with which the original ones can change places.

    Args:
        model: The model, before its layers are scaled.
        members: Quantizers of these layers.
    """

    def __init__(self, model: Any, members: Quantizers) -> None:
        self._model = model
        owners = (model.get_submodule(name.rpartition(".")[0]) for name in members)
        self._layers = list(dict.fromkeys(layer for layer in owners if is_quantized_linear(layer)))
        self._weights = []
        for layer in self._layers:
            with enable_weight_access_and_writeback(layer, model):
                self._weights.append(layer.weight.detach().clone())
        self._is_scaled = True

    def swap(self) -> None:
        """Put the other weights in place, with or without the scaling of inputs."""
        self._is_scaled = not self._is_scaled
        for number, layer in enumerate(self._layers):
            with enable_weight_access_and_writeback(layer, self._model):
                now = layer.weight.detach().clone()
                layer.weight.data.copy_(self._weights[number])
            self._weights[number] = now
            switch_input_scaling(layer.input_quantizer, self._is_scaled)


register_calibration(SETS, SetsCalibConfig, calibrate_sets)
