"""A model with the weights that a run fitted: factors of inputs, scales and rounded numbers.

Factors are made from the model's own weights, so before any of them is changed. They come first;
scales are fitted to what they give, and numbers are rounded under these scales.

Shape letters: I in features, O out features, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_fitted, needs_hessians, takes_factors
from autoquant_ray.modelopt_api import enable_weight_access_and_writeback
from autoquant_ray.plan.fold import ROWS, Fold
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.folding import (
    divide_bias,
    divide_maxima,
    divide_producer,
    producer_divisor,
)
from autoquant_ray.quantize.quantizers import quantizer_of, rounded_weight
from autoquant_ray.quantize.weight_search import WeightScales


class QuantizedModule(NamedTuple):
    """A module of an allocation.

    Attributes:
        path: The model's module that holds the weights.
        parameters: Its weights: ``weight``, or those of fused experts.
        expert: Of a single expert, its number.
        format: The format.
    """

    path: str
    parameters: tuple[str, ...]
    expert: int | None
    format: Format

    @classmethod
    def of(cls, name: str, facts: Mapping[str, Any], format_: Format) -> QuantizedModule:
        """A module by its name and facts in a plan's summary."""
        expert = facts.get("expert")
        names = tuple(prefix.removesuffix("_") or "weight" for prefix in facts["prefixes"])
        path = name if expert is None else name.rpartition(".")[0]
        return cls(path=path, parameters=names, expert=expert, format=format_)

    @property
    def is_linear(self) -> bool:
        """Whether it holds one matrix, not experts."""
        return self.parameters == ("weight",)

    def weights(self, module: Any) -> Iterator[tuple[tuple[str, ...], torch.Tensor, Any]]:
        """The weights that have scales of their own: part, ``(O, I)`` and quantizer.

        Experts that ModelOpt quantizes as one tensor are ``(E, O, I)``; what is written there is
        written to the module.

        Args:
            module: That of the path, as ModelOpt has prepared it.
        """
        if self.is_linear:
            yield (), module.weight, module.weight_quantizer
            return
        for name in self.parameters:
            weights_EOI = getattr(module, name)
            alone = getattr(module, f"{name}_weight_quantizer", None)
            if alone is not None:
                yield (name,), weights_EOI.mT, alone
                continue
            quantizers = getattr(module, f"{name}_weight_quantizers")
            experts = range(len(quantizers)) if self.expert is None else [self.expert]
            for expert in experts:
                yield (name, str(expert)), weights_EOI[expert], quantizers[expert]


class FittedModel:
    """Puts what a run fitted into a model that ModelOpt has prepared and calibrated by maximum.

    Args:
        model: Its weights are still its own.
        modules: Those that an allocation quantizes; all others stay as they are.
        calibration: Of the run.
        opened: Modules whose weights the caller has opened, see :func:`opened_folds`.
    """

    def __init__(
        self,
        model: Any,
        modules: Mapping[str, QuantizedModule],
        calibration: Calibration,
        opened: Collection[str] = (),
    ) -> None:
        self._model = model
        self._open = opened
        self._modules = modules
        self._scales = WeightScales(model, calibration)
        formats = {name: module.format for name, module in modules.items()}
        self._factors = Factors(model, formats, self._scales)

    @torch.no_grad()
    def set_weights(self) -> None:
        """Give weights the factors of their inputs, their scales and their rounded numbers.

        Where a quantizer is disabled, a weight gets its factors alone.
        """
        for name, quantized in self._modules.items():
            if not (is_fitted(quantized.format) or self._factors.reads(name)):
                continue
            module = self._model.get_submodule(quantized.path)
            with self._access(quantized.path):
                for part, weight, quantizer in quantized.weights(module):
                    given = self._factors.multiplied(name, weight).contiguous()
                    key = (quantized.path, *part)
                    if quantizer.is_enabled:
                        given = self._rounded(quantized.format, given, quantizer, *key)
                    if self._factors.reads(name) or needs_hessians(quantized.format):
                        weight.copy_(given)

    def _rounded(
        self, format_: Format, weight: torch.Tensor, quantizer: Any, *key: str
    ) -> torch.Tensor:
        """A weight on its grid; the quantizer gets its scales."""
        fitted = quantizer_of(format_, weight, self._scales, *key)
        quantizer.amax = fitted.amax
        rounded: torch.Tensor = fitted(rounded_weight(format_, fitted, weight, self._scales, *key))
        return rounded

    @torch.no_grad()
    def divide(self) -> None:
        """Divide what makes the inputs that have factors.

        Where that is a quantized weight, its numbers stay and its scales are divided.
        """
        packed = {}
        for name, quantized in self._modules.items():
            divisor_O = self._factors.divisor(name)
            module = self._model.get_submodule(quantized.path)
            if divisor_O is None or not module.weight_quantizer.is_enabled:
                continue
            packed[name] = quantized.format
            with self._access(quantized.path):
                _divide_rows(module, divisor_O)
        self._factors.divide(packed)

    def _access(self, path: str) -> AbstractContextManager[Any]:
        """Opens the weights of a module, wherever they are kept."""
        if path in self._open:
            return nullcontext()
        return _opened(self._model, path)


@contextmanager
def opened_folds(
    model: Any, modules: Mapping[str, QuantizedModule], calibration: Calibration
) -> Iterator[frozenset[str]]:
    """While open, the weights around inputs that may have factors are in memory together.

    Args:
        model: The model.
        modules: Of an allocation.
        calibration: Of the run.

    Yields:
        Their modules.
    """
    readers = (name for name, module in modules.items() if takes_factors(module.format))
    folds = [calibration.folds[name] for name in readers if name in calibration.folds]
    names = frozenset(name for fold in folds for name in (*fold.readers, fold.producer))
    with ExitStack() as stack:
        for name in sorted(names):
            stack.enter_context(_opened(model, name))
        yield names


def _opened(model: Any, path: str) -> AbstractContextManager[Any]:
    access: AbstractContextManager[Any] = enable_weight_access_and_writeback(
        model.get_submodule(path), model
    )
    return access


def _divide_rows(module: Any, divisor_O: torch.Tensor) -> None:
    quantizer, by_row = module.weight_quantizer, divisor_O[:, None].to(module.weight.device)
    on_grid_OI = quantizer(module.weight)
    module.weight.copy_((on_grid_OI.float() / by_row).to(module.weight.dtype))
    divide_maxima(quantizer, divisor_O)


class Factors:
    """Factors of all inputs of a model under an allocation, and what they are folded into.

    Args:
        model: Loaded, with its own weights.
        formats: Quantized module -> its format.
        scales: Of the model, with the scan's calibration.
    """

    def __init__(self, model: Any, formats: Mapping[str, Format], scales: WeightScales) -> None:
        self._model = model
        self._of_reader: dict[str, torch.Tensor] = {}
        self._of_producer: dict[str, tuple[Fold, torch.Tensor]] = {}
        for name, format_ in formats.items():
            factors_I = scales.factors((name,), format_)
            if factors_I is not None:
                fold = scales.calibration.folds[name]
                self._of_reader[name] = factors_I
                self._of_producer[fold.producer] = (fold, factors_I)

    def reads(self, name: str) -> bool:
        """Whether a linear's input has factors."""
        return name in self._of_reader

    def multiplied(self, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """A linear's weight with the factors of its input, in float32; itself without any."""
        factors_I = self._of_reader.get(name)
        return weight_OI if factors_I is None else weight_OI.float() * factors_I

    def divisor(self, name: str) -> torch.Tensor | None:
        """What the rows of a linear are divided by, float32 ``(O,)``; None where they are not."""
        fold, factors_I = self._of_producer.get(name, (None, None))
        if fold is None or factors_I is None or fold.kind != ROWS:
            return None
        return producer_divisor(fold, factors_I, self._model.get_submodule(name).out_features)

    def divide(self, packed: Mapping[str, Format]) -> None:
        """Divide what makes the inputs, in place.

        Args:
            packed: Modules whose rounded weights and scales the caller divides by
                :meth:`divisor`; their biases are divided here.
        """
        for name, (fold, factors_I) in self._of_producer.items():
            if name in packed:
                divide_bias(self._model.get_submodule(name), self.divisor(name))
            else:
                divide_producer(self._model, fold, factors_I)

    def fold(self) -> None:
        """Multiply all weights and divide what makes their inputs, in place: nothing is rounded."""
        for name in self._of_reader:
            weight = self._model.get_submodule(name).weight
            weight.data = self.multiplied(name, weight.data).to(weight.dtype)
        self.divide({})
