"""What a run fitted to the weights of a solution, for ``mtq.quantize`` through this package's mode.

Everything is read from the run's files: factors of inputs, scales, rounded numbers and the maxima
of inputs, so that the model is exactly the one that was scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autoquant_ray.calibrate.files import calibration_of
from autoquant_ray.errors import StoreError
from autoquant_ray.formats.algorithms import SETS
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.smoothed import (
    is_fitted,
    is_smoothed,
    needs_hessians,
    takes_factors,
)
from autoquant_ray.modelopt_api import needs_static_maximum
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.calibration_mode import READERS
from autoquant_ray.quantize.fitted_model import FittedModel, QuantizedModule, opened_folds
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_TABLE, solution_folder
from autoquant_ray.runs.state import RunState


class SolutionFits:
    """The fits of a solution.

    Args:
        run: Path of the run, for errors.
        modules: Quantized module -> what it is.
        shapes: Module -> shapes of its weights, as ``(..., out, in)``.
        calibration: Of the run.
    """

    def __init__(
        self,
        run: str,
        modules: Mapping[str, QuantizedModule],
        shapes: Mapping[str, Any],
        calibration: Calibration,
    ) -> None:
        self._run = run
        self._modules = modules
        self._shapes = shapes
        self._calibration = calibration

    def require_match(self, model: Any) -> None:
        """Check that a model has the weights that the run fitted.

        Args:
            model: With ModelOpt's quantizers; nothing is changed.

        Raises:
            ValueError: A module is missing, has another shape, or has the input embedding's weight
                where that would be rounded.
        """
        paths, embedding = dict(model.named_modules()), model.get_input_embeddings()
        for name, quantized in self._modules.items():
            format_ = quantized.format
            if not (is_fitted(format_) or takes_factors(format_)):
                continue
            module: Any = paths.get(quantized.path)
            shapes = None if module is None else _shapes_of(module, quantized)
            expected = [tuple(shape) for shape in self._shapes[name]]
            if shapes != expected:
                raise ValueError(
                    f"{name} has weights of {shapes or 'no shape'}, and the run {self._run} fitted "
                    f"weights of {expected} under {format_.name}; give the model of the run, or "
                    "the manifest's content instead of its path, which fits anew"
                )
            changes = takes_factors(format_) or needs_hessians(format_)
            if changes and getattr(module, "weight", 0) is getattr(embedding, "weight", None):
                raise ValueError(
                    f"{name} has the input embedding's weight, which {format_.name} would change "
                    "too; give the head a weight of its own (a copy) first"
                )

    @torch.no_grad()
    def put_into(self, model: Any) -> None:
        """Give a model the scales, the rounded numbers and the maxima of the run.

        Args:
            model: Calibrated by maximum; its weights are those of the run's model.
        """
        modules = {name: m for name, m in self._modules.items() if m.parameters}
        with opened_folds(model, modules, self._calibration) as opened:
            fitted = FittedModel(model, modules, self._calibration, opened)
            fitted.set_weights()
            fitted.divide()
        for name, quantized in self._modules.items():
            self._set_maxima(model, name, quantized)

    def _set_maxima(self, model: Any, name: str, quantized: QuantizedModule) -> None:
        """Inputs, keys and values; those that a module smooths have maxima of their own."""
        if is_smoothed(quantized.format) and quantized.is_linear:
            return
        module, maxima = model.get_submodule(quantized.path), self._calibration.of(name).maxima
        starts = [f"{p}_" for p in quantized.parameters] or ["k_bmm_", "v_bmm_"]
        for start in [""] if quantized.is_linear else starts:
            input_name = "input_quantizer" if quantized.parameters else "quantizer"
            quantizer = getattr(module, f"{start}{input_name}")
            key = f"{start}input_amax" if quantized.parameters else f"{start}amax"
            if quantizer.is_enabled and needs_static_maximum(quantizer) and key in maxima:
                _set_maximum(quantizer, maxima[key], module)


def read_solution_fits(run: str, solution: str) -> SolutionFits:
    """Read the fits of a solution.

    Args:
        run: Path of the run.
        solution: Folder below ``solutions/``; '' for the scan's own.

    Raises:
        StoreError: The run, the solution, or a file that its formats need is not there.
    """
    state = RunState.open(RunDirectory(run))
    name = f"{solution_folder(solution)}{MANIFEST_TABLE}"
    rows = state.directory.read_table(name).to_pylist()
    chosen = {row["module"]: row["format"] for row in rows if row["format"] != NONE}
    menu = {entry["name"]: entry for entry in state.plan["formats"]}
    facts = state.plan["modules"]
    if not chosen.keys() <= facts.keys():
        raise StoreError(f"{state.directory.path(name)} does not fit the run's plan; solve again")
    modules = {
        module: QuantizedModule.of(module, facts[module], Format.from_json(menu[format_]))
        for module, format_ in chosen.items()
    }
    shapes = {module: facts[module]["shapes"] for module in modules}
    return SolutionFits(run, modules, shapes, calibration_of(state, chosen.values()))


def _shapes_of(module: Any, quantized: QuantizedModule) -> list[tuple[int, ...]] | None:
    """Shapes of a module's weights; None where it has none of these names."""
    if not all(hasattr(module, name) for name in quantized.parameters):
        return None
    shapes = []
    for name in quantized.parameters:
        weight = getattr(module, name)
        is_transposed = hasattr(module, f"{name}_weight_quantizer")
        shape = tuple((weight.mT if is_transposed else weight).shape)
        shapes.append(shape if quantized.expert is None else shape[1:])
    return shapes


def _set_maximum(quantizer: Any, maximum: float, module: Any) -> None:
    before = quantizer.amax
    if before is not None:
        quantizer.amax = torch.full_like(before, maximum)
        return
    like = next(module.parameters())
    quantizer.amax = like.new_full((), maximum)


READERS[SETS] = read_solution_fits
