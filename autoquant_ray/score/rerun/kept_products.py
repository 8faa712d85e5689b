"""Matrix products of the forward pass, kept for the backward pass, which runs each layer again.

The second run of a layer, with a graph, does what the first did, on the same numbers. Most of its
work is in matrix products and attention, whose results are small beside a whole graph: those are
kept, and given to the second run, which does not compute them. All else (norms, activations,
rotations) is computed again: it is little work, and makes up most of a graph's memory. autograd
sees an ordinary run, so hooks, gradients and scores are the same to the bit, whatever is kept.

A result is given only to a call of the same operation, in the same order, with the same layouts
and numbers. One that is changed in place, or leaves its layer, is not kept. Where the room ends,
results with the least work per byte go first, and of these the oldest.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SUMMED = {
    "aten.mm.default": (0, -1),
    "aten.addmm.default": (1, -1),
    "aten.bmm.default": (0, -1),
    "aten.baddbmm.default": (1, -1),
    "aten._grouped_mm.default": (0, -1),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": (1, -2),
    "aten._scaled_dot_product_flash_attention.default": (1, -2),
    "aten._scaled_dot_product_efficient_attention.default": (1, -2),
    "aten._scaled_dot_product_cudnn_attention.default": (1, -2),
}
"""Operations whose results are kept -> argument and dimension of it that they sum over."""

_SUMS_ASKED_AT = {
    "aten._scaled_dot_product_efficient_attention.default": 4,
    "aten._scaled_dot_product_cudnn_attention.default": 4,
}
"""Attentions that give the sums that their gradient needs only if asked -> the argument that asks;
torch asks where a graph is built."""


@dataclass(eq=False)
class ProductRoom:
    """Room for the results that a worker keeps.

    Attributes:
        nbytes: In all.
        used_bytes: Taken.
    """

    nbytes: int
    used_bytes: int = 0


@dataclass(eq=False)
class _Product:
    """What an operation gave.

    Attributes:
        call: The operation and what it was called with, tensors by their layout.
        result: A tensor or several; None where it is not kept.
        nbytes: Of the result.
    """

    call: tuple[Any, ...]
    result: Any = None
    nbytes: int = 0


class LayerProducts:
    """Products of one run of a layer, in their order; a result that is not kept has its place.

    Args:
        room: Where the results are.
    """

    def __init__(self, room: ProductRoom) -> None:
        self._room = room
        self._products: deque[_Product] = deque()

    def add(self, product: _Product) -> None:
        """Add what comes next, without a result."""
        self._products.append(product)

    def take(self, call: tuple[Any, ...]) -> Any:
        """The result that is next in order; None where it is not kept, or another call's."""
        if not self._products:
            return None
        product = self._products.popleft()
        result = product.result
        self.drop(product)
        if product.call == call:
            return result
        self.clear()  # the layer runs another way than before
        return None

    def drop(self, product: _Product) -> None:
        """Let go of a result."""
        self._room.used_bytes -= product.nbytes
        product.result, product.nbytes = None, 0

    def clear(self) -> None:
        """Let go of all results."""
        while self._products:
            self.drop(self._products.pop())

    def __del__(self) -> None:
        """Nobody can take the results any more: their room is free."""
        self.clear()


class ProductKeeper:
    """Keeps results of the layers of one visit.

    Args:
        room: Shared with other visits, whose results stay.
    """

    def __init__(self, room: ProductRoom) -> None:
        self._room = room
        self._cheapest: list[tuple[int, int, _Product, LayerProducts]] = []
        self._order = count()

    def recording(self) -> Recording:
        """A context in which results are kept."""
        return Recording(self, LayerProducts(self._room))

    def keep(self, product: _Product, of_layer: LayerProducts, result: Any, summed: int) -> None:
        """Keep a result, in place of others with less work per byte if need be.

        Args:
            product: Without its result.
            of_layer: Has it.
            result: A tensor or several.
            summed: Terms that each number of the result is the sum of.
        """
        nbytes = sum(tensor.nbytes for tensor in _tensors(result))
        while self._room.used_bytes + nbytes > self._room.nbytes:
            if not self._cheapest or self._cheapest[0][0] > summed:
                return
            *_, cheapest, of_its_layer = heapq.heappop(self._cheapest)
            of_its_layer.drop(cheapest)
        product.result, product.nbytes = result, nbytes
        self._room.used_bytes += nbytes
        heapq.heappush(self._cheapest, (summed, next(self._order), product, of_layer))


class Recording(TorchDispatchMode):
    """Notes what operations give; see :meth:`ProductKeeper.recording`.

    Attributes:
        products: Seen so far.
    """

    def __init__(self, keeper: ProductKeeper, products: LayerProducts) -> None:
        super().__init__()
        self.products = products
        self._keeper = keeper
        self._of_storage: dict[int, _Product] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; called by torch."""
        kwargs = kwargs or {}
        for position, name in _written(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in _tensors(value):
                self.changes(tensor)
        if (asked := _SUMS_ASKED_AT.get(str(func))) is not None:
            args = (*args[:asked], True, *args[asked + 1 :])
        result = func(*args, **kwargs)
        summed_over = _summed_over(func)
        if summed_over is not None:
            argument, dimension = summed_over
            product = _Product(_call(func, args, kwargs))
            self.products.add(product)
            self._keeper.keep(product, self.products, result, args[argument].shape[dimension])
            self._of_storage |= {_storage(tensor): product for tensor in _tensors(product.result)}
        return result

    def changes(self, tensor: torch.Tensor) -> None:
        """Say that a tensor changes, or may change later: nothing that shares it is kept."""
        product = self._of_storage.pop(_storage(tensor), None)
        if product is not None:
            self.products.drop(product)

    def leaving(self, output: torch.Tensor) -> torch.Tensor:
        """Pass on what the layer gives: nothing that shares it is kept."""
        self.changes(output)
        return output


class _Giving(TorchDispatchMode):
    """Gives products to a second run, and lets go of those that it does not take."""

    def __init__(self, products: LayerProducts) -> None:
        super().__init__()
        self._products = products

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or give what it gave before; called by torch."""
        kwargs = kwargs or {}
        if _summed_over(func) is not None:
            result = self._products.take(_call(func, args, kwargs))
            if result is not None:
                return result
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        """Close the context."""
        self._products.clear()
        super().__exit__(*error)


@contextmanager
def recording(
    keeper: ProductKeeper | None, products: dict[int, LayerProducts], number: int
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """While open, the products of a layer's first run are kept.

    Args:
        keeper: Keeps them; None: nothing does.
        products: Where they are put, by the layer's number.
        number: The layer's.

    Yields:
        Passes the layer's output on, which what it enters may change.
    """
    if keeper is None:
        yield lambda output: output
        return
    with keeper.recording() as record:
        products[number] = record.products
        yield record.leaving


def giving(products: LayerProducts | None) -> AbstractContextManager[object]:
    """A context in which a layer's second run is given the products of its first.

    Args:
        products: Of the first run; None: none.
    """
    return nullcontext() if products is None else _Giving(products)


def _call(func: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """An operation and what it is called with, tensors by their layout."""
    return (func, *map(_layout, args), *((n, _layout(value)) for n, value in keywords.items()))


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [tensor for tensor in values if isinstance(tensor, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@cache
def _summed_over(func: Any) -> tuple[int, int] | None:
    return _SUMMED.get(str(func))


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Arguments that an operation changes, by position and name."""
    return [
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
