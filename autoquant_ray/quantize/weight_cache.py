"""Quantized weights, made once and kept while memory allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

UNBOUNDED = 2**62
"""A limit that keeps everything."""


class WeightCache:
    """Keeps tensors up to a number of bytes; the least recently used one goes first.

    A value larger than the limit is made each time.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor of ``key``; if it is missing it is made, and kept where it fits."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tensor = make()
        if tensor.nbytes <= self.limit:
            self._make_room(tensor.nbytes)
            self._kept[key] = tensor
            self.nbytes += tensor.nbytes
        return tensor

    def resize(self, limit: int) -> None:
        """Set another limit; drops what exceeds it."""
        self.limit = limit
        self._make_room(0)

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self.nbytes = 0

    def _make_room(self, needed: int) -> None:
        while self.nbytes + needed > self.limit:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= dropped.nbytes
