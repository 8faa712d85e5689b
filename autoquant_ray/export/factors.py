"""The factors of a solution's inputs, and what they are folded into.

They are made from the model's own weights, so before any of them is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoquant_ray.formats.format import Format
from autoquant_ray.plan.fold import ROWS, Fold
from autoquant_ray.quantize.folding import divide_bias, divide_producer, producer_divisor
from autoquant_ray.quantize.weight_search import WeightScales

if TYPE_CHECKING:
    import torch


class Factors:
    """Factors of all inputs of a model under a solution.

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
