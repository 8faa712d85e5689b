"""Second moments ``sum_t x_t x_t^T`` of the inputs of some layers' linears, a sum for each half.

They are summed by one process, shard after shard in their order, so that the number of workers
changes no bit. Modules that are called with the very same tensor (q, k and v) share a sum.

Shape letters: T rows (tokens), I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from autoquant_ray.calibrate.input_rows import InputRows
from autoquant_ray.errors import changed_input
from autoquant_ray.formats.algorithms import FACTOR_BYTES
from autoquant_ray.quantize.calibration import NUM_HALVES
from autoquant_ray.quantize.second_moments import SecondMoments
from autoquant_ray.quantize.weight_cache import WeightCache

Hessians = Mapping[str, SecondMoments]
"""Module name -> those of its input; modules that saw no token are missing."""


class HessianCollector:
    """Sums second moments while batches run forward.

    Args:
        modules: Name -> linear module.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._half = 0
        self._rows = InputRows()
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._sharing: dict[str, str] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While open, inputs are summed; call :meth:`set_mask` before each batch."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                handle = module.register_forward_pre_hook(self._hook(name))
                stack.callback(handle.remove)
            yield
        self.settle()

    def begin(self, half: int) -> None:
        """The next batches are of a shard in this half."""
        self._half = half

    def set_mask(self, mask_BS: torch.Tensor | None) -> None:
        """Say which tokens of the next batch are real (1); None means all."""
        self._rows.mask.set(mask_BS)

    def settle(self) -> None:
        """Release the last input."""
        self._rows.release()

    def moments(self) -> dict[str, SecondMoments]:
        """The sums over all batches; the collector forgets them."""
        kept = WeightCache(FACTOR_BYTES)
        sums = {name: SecondMoments(halves_II, kept) for name, halves_II in self._sums.items()}
        self._sums = {}
        return {n: sums[first] for n, first in self._sharing.items() if first in sums}

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            first, states_TI = self._rows.of(name, arguments[0])
            self._share(name, first)
            if first == name and len(states_TI):
                self._add(name, states_TI.float())

        return hook

    def _share(self, name: str, first: str) -> None:
        """Note that a module has the input of another; it must always be the same other."""
        if self._sharing.setdefault(name, first) != first:
            raise changed_input(name)

    def _add(self, name: str, states_TI: torch.Tensor) -> None:
        if name not in self._sums:
            width, device = states_TI.shape[1], states_TI.device
            self._sums[name] = [torch.zeros(width, width, device=device) for _ in range(NUM_HALVES)]
        self._sums[name][self._half].addmm_(states_TI.T, states_TI)
