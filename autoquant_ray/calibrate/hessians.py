"""Second moments ``sum_t x_t x_t^T`` of the inputs of some weights, a sum for each half.

They are summed by one process, shard after shard in their order, so that the number of workers
changes no bit. Modules that are called with the very same tensor (q, k and v) share a sum. A routed
expert of a fused module runs again on its tokens alone, so that the inputs of its second projection
are seen too; experts share nothing.

Shape letters: T rows (tokens), I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from autoquant_ray.calibrate.input_rows import InputRows
from autoquant_ray.errors import changed_input
from autoquant_ray.formats.algorithms import FACTOR_BYTES
from autoquant_ray.quantize.calibration import NUM_HALVES
from autoquant_ray.quantize.experts import FusedExperts
from autoquant_ray.quantize.second_moments import SecondMoments
from autoquant_ray.quantize.single_experts import sums_by_expert
from autoquant_ray.quantize.weight_cache import WeightCache

Hessians = Mapping[str, SecondMoments]
"""Linear, or ``MODULE.PARAMETER.NUMBER`` of a routed expert -> those of its input; weights that saw
no token are missing."""


class RoutedExperts(NamedTuple):
    """Some experts of a fused experts module.

    Attributes:
        module: The module in the model.
        experts: Runs it.
        numbers: Which experts.
    """

    module: Any
    experts: FusedExperts
    numbers: Sequence[int]


class HessianCollector:
    """Sums second moments while batches run forward.

    Args:
        modules: Name -> linear module.
        experts: Name of a fused module -> experts of it.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        experts: Mapping[str, RoutedExperts] | None = None,
    ) -> None:
        self._modules = modules
        self._experts = experts or {}
        self._half = 0
        self._rows = InputRows()
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._num_tokens: dict[str, list[int]] = {}
        self._sharing: dict[str, str] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While open, inputs are summed; call :meth:`set_mask` before each batch."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                handle = module.register_forward_pre_hook(self._hook(name))
                stack.callback(handle.remove)
            for name, routed in self._experts.items():
                hook = self._expert_hook(name, routed)
                handle = routed.module.register_forward_pre_hook(hook, with_kwargs=True)
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
        of_linears = {n: sums[first] for n, first in self._sharing.items() if first in sums}
        return of_linears | {n: moments for n, moments in sums.items() if n not in self._modules}

    def num_tokens(self, name: str) -> list[int]:
        """How many tokens each half of the data has at a weight.

        Args:
            name: As in :data:`Hessians`.
        """
        return self._num_tokens.get(self._sharing.get(name, name), [0] * NUM_HALVES)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            first, states_TI = self._rows.of(name, arguments[0])
            self._share(name, first)
            if first == name and len(states_TI):
                states_TI = states_TI.float()
                sum_II = self._sum_of(name, len(states_TI), states_TI)
                sum_II.addmm_(states_TI.T, states_TI)

        return hook

    def _expert_hook(self, name: str, routed: RoutedExperts) -> Callable[..., None]:
        def hook(_: Any, arguments: Any, keywords: Any) -> None:
            inputs = (*arguments, *keywords.values())
            real_T = self._rows.mask.matching(inputs[0])
            for number, sums in sums_by_expert(
                routed.experts, routed.numbers, _second_moments, inputs, real_T
            ):
                for parameter, (added_II, num_tokens) in sums.items():
                    weight = f"{name}.{parameter}.{number}"
                    self._sum_of(weight, num_tokens, added_II).add_(added_II)

        return hook

    def _share(self, name: str, first: str) -> None:
        """Note that a module has the input of another; it must always be the same other."""
        if self._sharing.setdefault(name, first) != first:
            raise changed_input(name)

    def _sum_of(self, name: str, num_tokens: int, like_TI: torch.Tensor) -> torch.Tensor:
        """The sum that tokens are to be added to, which are counted.

        Args:
            name: Of the weight.
            num_tokens: How many.
            like_TI: Has as many columns as there are input channels.
        """
        if name not in self._sums:
            width, device = like_TI.shape[1], like_TI.device
            self._sums[name] = [torch.zeros(width, width, device=device) for _ in range(NUM_HALVES)]
            self._num_tokens[name] = [0] * NUM_HALVES
        self._num_tokens[name][self._half] += num_tokens
        return self._sums[name][self._half]


def _second_moments(states_TI: torch.Tensor) -> torch.Tensor:
    """The sum over the rows; not by ``@``, which is ModelOpt's within its experts."""
    states_TI = states_TI.float()
    return torch.mm(states_TI.T, states_TI)
