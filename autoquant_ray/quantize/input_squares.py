"""Mean squares of the inputs of a model that ModelOpt has prepared, and the search that needs them.

For ``weighted`` within ``mtq.quantize``. A weight quantizer of one expert is called just after the
quantizer of its input, with the tokens that were routed to it; a weight quantizer that stands alone
belongs to all that its input quantizer sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from autoquant_ray.formats.format import Attributes
from autoquant_ray.modelopt_api import QuantModule, enable_weight_access_and_writeback
from autoquant_ray.quantize.weight_search import search_scales

RowsOf = Callable[[Any, torch.Tensor], torch.Tensor]
"""Quantizer and weight -> what a search measures its candidates on."""

_INPUT = "input_quantizer"
_CHUNK_ELEMENTS = 2**22  # bounds the copy in float64


def row_chunks(states_TI: torch.Tensor) -> Sequence[torch.Tensor]:
    """The rows, so many at a time that a copy in float64 stays small."""
    chunks: Sequence[torch.Tensor] = states_TI.split(max(1, _CHUNK_ELEMENTS // states_TI.shape[1]))
    return chunks


def square_sum(states_TI: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of every channel, float64 ``(I,)``."""
    sum_I = states_TI.new_zeros(states_TI.shape[1], dtype=torch.float64)
    for chunk_CI in row_chunks(states_TI):
        sum_I += chunk_CI.double().square_().sum(dim=0)
    return sum_I


class InputSquares:
    """Collects sums of squares, one record per weight quantizer.

    Args:
        model: Its quantizers are there; those to search are enabled.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sums: dict[Any, torch.Tensor] = {}
        self._num_rows: dict[Any, int] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While open, forward passes are watched."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if isinstance(module, QuantModule):
                    for handle in self._watch(module):
                        stack.callback(handle.remove)
            yield

    def search(self, algorithm: Attributes, rows: RowsOf) -> None:
        """Search the scales of every enabled weight quantizer whose inputs were seen.

        Args:
            algorithm: ``weighted`` with its arguments.
            rows: What candidates are measured on.

        Raises:
            ValueError: No input was seen at all.
        """
        if not self._sums:
            raise ValueError(
                "the algorithm weighted needs inputs; give mtq.quantize a forward_loop that runs "
                "the model on calibration data"
            )
        for module in self._model.modules():
            if not isinstance(module, QuantModule):
                continue
            with enable_weight_access_and_writeback(module, self._model):
                for weight, quantizer in module.iter_weights_for_calibration():
                    if quantizer in self._sums and quantizer.is_enabled:
                        squares_I = self._sums[quantizer] / self._num_rows[quantizer]
                        measured = partial(rows, quantizer, weight)
                        search_scales(quantizer, measured, algorithm, None, squares_I.float())

    def _watch(self, module: Any) -> Iterator[Any]:
        """Hooks on a module's quantizers; yields the handles that end them."""
        for name, input_quantizer in list(module.named_children()):
            if not name.endswith(_INPUT):
                continue
            prefix = name.removesuffix(_INPUT)
            alone = getattr(module, f"{prefix}weight_quantizer", None)
            if alone is not None:
                yield input_quantizer.register_forward_pre_hook(
                    lambda _, arguments, quantizer=alone: self._add(quantizer, arguments[0])
                )
            last: list[torch.Tensor] = []
            experts = list(getattr(module, f"{prefix}weight_quantizers", ()))
            if experts:
                yield input_quantizer.register_forward_pre_hook(
                    lambda _, arguments, last=last: last.__setitem__(slice(None), [arguments[0]])
                )
            for quantizer in experts:
                yield quantizer.register_forward_pre_hook(
                    lambda quantizer, _, last=last: (
                        self._add(quantizer, last.pop()) if last else None
                    )
                )

    @torch.no_grad()
    def _add(self, quantizer: Any, states: torch.Tensor) -> None:
        states_TI = states.reshape(-1, states.shape[-1])
        if len(states_TI):
            added_I = square_sum(states_TI)
            before_I = self._sums.get(quantizer)
            self._sums[quantizer] = added_I if before_I is None else before_I + added_I
            self._num_rows[quantizer] = self._num_rows.get(quantizer, 0) + len(states_TI)
